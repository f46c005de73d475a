"""Random generators that training draws from, on one rank: their seeds and their state.

Dropout alone draws from them. Weights and the order of samples have their own seeds, and do not
depend on the layout.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megapoly.platform.device import Platform
from megapoly.platform.engine_workarounds import seed_model_parallel_rng

# The engine adds 2718 + the tensor-parallel rank and 1024 + 100 * the expert-parallel rank + the
# expert-tensor-parallel rank to a seed (tensor_parallel/random.py:402-420): no two seeds are equal
# up to these sums. The generator on CPU takes the lowest 32 bits, enough for 42,949 streams.
_STRIDE = 100_000


def seed_generators(seed: int, *, consumed_samples: int = 0) -> None:
    """Seed the generators of this rank; process groups must exist.

        stream = stage + num_stages * replica,   seed of the rank = seed + 100,000 * stream

    where ``replica`` is the rank among those with the same weights and other tokens: data- and
    context-parallel. Tensor-parallel ranks have the same tokens and the same seed: what they all
    compute has one mask, and what they share (heads, with sequence parallelism also the sequence)
    has a mask on each, from the engine's tracker.

    Args:
        seed: of the run.
        consumed_samples: position of the run. From a position after the first, ``seed`` is replaced
            by 32 bits of ``SeedSequence([seed, consumed_samples])``, so that a run that cannot
            restore its state does not draw the masks of its first steps again.
    """
    if consumed_samples:
        sequence = np.random.SeedSequence([seed, consumed_samples])
        seed = int(sequence.generate_state(1)[0])
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    num_stages = parallel_state.get_pipeline_model_parallel_world_size()
    stream = parallel_state.get_pipeline_model_parallel_rank() + num_stages * replica
    seed_model_parallel_rng(seed + _STRIDE * stream)


def random_state(platform: Platform) -> dict[str, Any]:
    """Return the current state, for :func:`set_random_state`."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    if platform.is_cuda:
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any], platform: Platform) -> None:
    """Restore a state; a GPU's part of it has no effect without a GPU."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state and platform.is_cuda:
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def preserved_random_state(platform: Platform) -> Iterator[None]:
    """Restore the state at the end, whatever the body drew or seeded."""
    state = random_state(platform)
    try:
        yield
    finally:
        set_random_state(state, platform)
