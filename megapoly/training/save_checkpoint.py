"""Save checkpoints: ``RUN_DIR/checkpoints/iter_0000100``, either complete or not there at all.

Tensors are in the engine's ``torch_dist`` format, which can be loaded at another layout. Next to
them are ``config.yaml`` (resolved) and ``run.json`` (position, data, version, and what proves the
files, see :mod:`megapoly.checkpoints.seal`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

import megapoly
from megapoly.checkpoints.choose import check_saved, make_room
from megapoly.checkpoints.run_folder import checkpoint_path, complete_checkpoints
from megapoly.checkpoints.seal import flush_folder, seal
from megapoly.config import to_yaml
from megapoly.model.shards import checkpoint_metadata
from megapoly.training import optimizer_state
from megapoly.training.checkpoint_state import (
    generators,
    layout,
    model_state,
    random_state_entry,
    scales_have_history,
)
from megapoly.training.distributed import all_ranks, is_rank_zero
from megapoly.training.state import TrainState, gathered_parameters


def save_checkpoint(state: TrainState) -> Path:
    """Write everything that the run needs to resume; collective.

    The checkpoint is written to a hidden folder, which is renamed when complete: a folder named
    ``iter_*`` is always complete. When it is verified, all but the newest ``checkpoint.keep`` are
    deleted.

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
        seal(partial, _position(state))
        make_room(final)
        partial.rename(final)
        flush_folder(final.parent)
    dist.barrier()
    check_saved(final, all_ranks())
    if is_rank_zero():
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
        "megapoly_version": megapoly.__version__,
    }


def _delete_old(run_dir: str, keep: int) -> None:
    for path in complete_checkpoints(run_dir)[:-keep] if keep else []:
        # Renamed first: a folder named `iter_*` is complete even while it is being deleted.
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.partial")))
