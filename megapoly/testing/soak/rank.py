"""A process of a job under test: it notes its id, prepares the faults inside it, and trains.

The launcher runs this file where it would run ``megapoly train``. Nothing else differs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megapoly import pretrain
from megapoly.platform import launcher

# Environment variables of a job: the folder where each rank writes its process id, and the steps
# that meet NaN, ``[[step, rank], ...]``.
PIDS = "MEGAPOLY_SOAK_PIDS"
NAN_STEPS = "MEGAPOLY_SOAK_NAN_STEPS"


def main(argv: Sequence[str]) -> int:
    """Train as ``megapoly train`` does; return its exit status."""
    pids = Path(os.environ[PIDS])
    temporary = pids / f".{launcher.rank()}"
    temporary.write_text(str(os.getpid()))
    temporary.rename(pids / str(launcher.rank()))
    nan_steps = json.loads(os.environ.get(NAN_STEPS, "[]"))
    if steps := {step for step, rank in nan_steps if rank == launcher.rank()}:
        _poison_gradients(steps)
    return pretrain.main(argv, program="megapoly train")


def _poison_gradients(steps: set[int]) -> None:
    """Let the gradient of a norm's weight be NaN at some steps, as a fault of the device would.

    It is NaN before the gradients are reduced, so that it reaches the other ranks.
    """
    from megapoly.platform import engine_workarounds

    engine_workarounds.install_on_every_device()  # before the engine's first import
    from megapoly.training import state as module
    from megapoly.training.state import TrainState

    build = module.build_state

    def build_and_poison(*args: object, **kwargs: object) -> TrainState:
        state = build(*args, **kwargs)  # type: ignore[arg-type]
        vectors = [p for chunk in state.chunks for p in chunk.parameters() if p.dim() == 1]
        vectors[-1].register_hook(
            lambda gradient: gradient * float("nan") if state.iteration + 1 in steps else None
        )
        return state

    module.build_state = build_and_poison


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
