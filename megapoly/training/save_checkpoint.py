"""Save checkpoints: ``RUN_DIR/checkpoints/iter_0000100``, either complete or not there at all.

Tensors are in the engine's ``torch_dist`` format, which can be loaded at another layout. Next to
them are ``config.yaml`` (resolved) and ``run.json`` (position, data, version).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

import megapoly
from megapoly.checkpoints.run_folder import checkpoint_path, complete_checkpoints, newest_ordinary
from megapoly.config import to_yaml
from megapoly.config.step_ranges import text_of_steps
from megapoly.model.shards import checkpoint_metadata
from megapoly.training import optimizer_state
from megapoly.training.checkpoint_state import (
    generators,
    layout,
    model_state,
    random_state_entry,
    scales_have_history,
)
from megapoly.training.distributed import is_rank_zero
from megapoly.training.state import TrainState, gathered_parameters


def save_checkpoint(state: TrainState) -> Path:
    """Write everything that the run needs to resume; collective.

    The checkpoint is written to a hidden folder, which is renamed when complete: a folder named
    ``iter_*`` is always complete. Then all but the newest ``checkpoint.keep`` are deleted, and
    the newest with an ordinary loss is spared.

    Returns:
        The checkpoint's folder.
    """
    final = checkpoint_path(state.config.run_dir, state.iteration)
    partial = final.with_name(f".{final.name}.partial")
    if final in complete_checkpoints(state.config.run_dir):
        return final  # the run resumed from it, and nothing has been trained since
    dist.barrier()
    if is_rank_zero():
        for unfinished in final.parent.glob(".iter_*.partial"):
            shutil.rmtree(unfinished)
        partial.mkdir(parents=True)
    dist.barrier()
    with gathered_parameters(state):
        dist_checkpointing.save(_state_to_save(state), str(partial))
    dist.barrier()
    if is_rank_zero():
        (partial / "config.yaml").write_text(to_yaml(state.config))
        (partial / "run.json").write_text(json.dumps(_position(state), indent=2) + "\n")
        partial.rename(final)
        _delete_old(state.config.run_dir, state.config.checkpoint.keep)
    dist.barrier()
    return final


def _state_to_save(state: TrainState) -> dict[str, Any]:
    model = model_state(state, with_scales=scales_have_history(state.config))
    return {
        "model": model,
        "optimizer": optimizer_state.state_to_save(state.optimizer, model, checkpoint_metadata()),
        "random_state": random_state_entry(state),
    }


def _position(state: TrainState) -> dict[str, Any]:
    return {
        "iteration": state.iteration,
        "consumed_samples": state.consumed_samples,
        "consumed_tokens": state.consumed_tokens,
        "data_fingerprint": state.corpus.fingerprint,
        "data": state.corpus.description,
        "layout": layout(state.config),
        "generators": generators(state),
        "add_bos": state.add_bos,
        "is_ordinary": state.recent_steps.is_ordinary(state.iteration),
        "passed_over": [text_of_steps([steps]) for steps in state.passed_over],
        "recent_steps": state.recent_steps.state(),
        "megapoly_version": megapoly.__version__,
    }


def _delete_old(run_dir: str, keep: int) -> None:
    spared = newest_ordinary(run_dir)  # what a run goes back to after a spike
    for path in complete_checkpoints(run_dir)[:-keep] if keep else []:
        if path == spared:
            continue
        # Renamed first: a folder named `iter_*` is complete even while it is being deleted.
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.partial")))
