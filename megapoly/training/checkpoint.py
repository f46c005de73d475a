"""Checkpoints: ``RUN_DIR/checkpoints/iter_0000100``, either complete or not there at all.

Tensors are in the engine's ``torch_dist`` format, which can be loaded at another layout. Next to
them are ``config.yaml`` (resolved) and ``run.json`` (position, data, version).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

import megapoly
from megapoly.config import Config, load_yaml, to_yaml
from megapoly.config.resolve import sequence_parts
from megapoly.data.fingerprint import differences
from megapoly.errors import CheckpointError
from megapoly.model.builder import unwrap
from megapoly.model.shards import checkpoint_metadata
from megapoly.platform.run_folder import checkpoint_path, complete_checkpoints
from megapoly.training import optimizer_state
from megapoly.training.distributed import is_rank_zero
from megapoly.training.random_state import random_state, seed_generators, set_random_state
from megapoly.training.state import ModelState, Position, TrainState, gathered_parameters

logger = logging.getLogger(__name__)

# Fields of the model that may differ between a checkpoint and the run that loads it: they change
# how the model is computed or trained, not what its weights mean.
_MAY_CHANGE = {
    "activation_backend",
    "activation_deterministic",
    "make_vocab_size_divisible_by",
    "max_position_embeddings",
    "moe_token_dispatcher_type",
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "moe_router_dtype",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "hidden_dropout",
    "attention_dropout",
    "init_method",
    "init_method_std",
    "scale_residual_init",
    "transformer_engine",
    "apply_rope_fusion",
}


def save_checkpoint(state: TrainState) -> Path:
    """Write everything that the run needs to resume; collective.

    The checkpoint is written to a hidden folder, which is renamed when complete: a folder named
    ``iter_*`` is always complete. Then all but the newest ``checkpoint.keep`` are deleted.

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


def restore(state: TrainState) -> Path | None:
    """Resume from the newest checkpoint of the run, or start from ``checkpoint.load``; collective.

    Returns:
        The checkpoint that was loaded, or None if the run starts from the beginning.

    Raises:
        CheckpointError: the run has a checkpoint and ``checkpoint.resume`` is false, or a
            checkpoint does not fit.
    """
    settings = state.config.checkpoint
    own = complete_checkpoints(state.config.run_dir)
    if own and not settings.resume:
        raise CheckpointError(
            f"`checkpoint.resume` is false and {state.config.run_dir} has {own[-1].name}; choose "
            "another `run_dir`, or delete the folder."
        )
    if own:
        load_checkpoint(state, own[-1])
        return own[-1]
    if settings.load is not None:
        load_checkpoint(state, Path(settings.load), weights_only=settings.load_weights_only)
        return Path(settings.load)
    return None


def load_checkpoint(state: TrainState, path: Path, *, weights_only: bool = False) -> None:
    """Load a checkpoint, saved at any layout, into this run; collective.

    Args:
        state: changed in place.
        path: an ``iter_*`` folder.
        weights_only: leave optimizer, schedule, random state and position unchanged. This is always
            so for an imported checkpoint, which has none of them.

    Raises:
        CheckpointError: the checkpoint is not complete, or of another model, data or batch size
            that the configuration does not accept.
    """
    position = read_position(path)
    imported = position.get("weights_only", False)
    state.add_bos = position.get("add_bos", False)
    if imported:
        logger.info("%s has only weights: optimizer and schedule start from the beginning", path)
    if weights_only or imported:
        load_weights(state, path)
        state.optimizer.reload_model_params()
        return
    _check_model(state.config, path)
    with torch.no_grad():
        _check_data(state, position, path)
        _check_batch(state.config, path)
        own = {"layout": _layout(state.config), "generators": _generators(state)}
        has_state = own.items() <= position.items()
        expected = _state_to_load(state, load_yaml(path / "config.yaml"))
        if has_state:
            expected["random_state"] = _random_state_entry(state)
        loaded = dist_checkpointing.load(expected, str(path))
        # "model" is absent if the optimizer's state has all parameters.
        _load_model_state(state, loaded.get("model", {}))
        optimizer_state.load_state(state.optimizer, loaded["optimizer"])
    state.start_from(
        Position(position["iteration"], position["consumed_samples"], position["consumed_tokens"])
    )
    if has_state:
        set_random_state(loaded["random_state"], state.platform)
    else:
        if state.config.model.hidden_dropout or state.config.model.attention_dropout:
            logger.info("no random state of this layout and device: dropout draws from other seeds")
        seed_generators(state.config.training.seed, consumed_samples=state.consumed_samples)


def load_weights(state: ModelState, path: Path) -> None:
    """Load the weights of a checkpoint, saved at any layout, into a model; collective.

    From a checkpoint in bf16 these are the weights that the model computed with, in bf16.

    Args:
        state: its model is changed in place.
        path: an ``iter_*`` folder.

    Raises:
        CheckpointError: the checkpoint is not complete, or of another model.
    """
    read_position(path)  # only a complete checkpoint has it
    _check_model(state.config, path)
    expected = _model_state(state, with_scales=False)
    loaded = dist_checkpointing.load({"model": expected}, str(path))
    with torch.no_grad():
        _load_model_state(state, loaded["model"])


def _state_to_save(state: TrainState) -> dict[str, Any]:
    model = _model_state(state, with_scales=_scales_have_history(state.config))
    return {
        "model": model,
        "optimizer": optimizer_state.state_to_save(state.optimizer, model, checkpoint_metadata()),
        "random_state": _random_state_entry(state),
    }


def _state_to_load(state: TrainState, saved: Config) -> dict[str, Any]:
    """Return what to load; parameters are read with the optimizer's state, in fp32."""
    with_scales = _scales_have_history(state.config)
    if with_scales and not _scales_have_history(saved):
        logger.info("scaling factors of FP8 start again: the checkpoint has none")
        with_scales = False
    model = _model_state(state, with_scales=with_scales)
    return {
        "model": {
            chunk: optimizer_state.without_parameters(entries, state.optimizer)
            for chunk, entries in model.items()
        },
        "optimizer": optimizer_state.state_to_load(
            state.optimizer, model, saved_in_bf16=saved.training.bf16
        ),
    }


def _model_state(state: ModelState, *, with_scales: bool) -> dict[str, Any]:
    """Return the entries of each chunk of a stage; each chunk numbers its layers from 0.

    Besides weights the engine's modules have ``_extra_state``. It is empty except for FP8 and
    differs between families of layers. Without it, a checkpoint loads with and without
    Transformer Engine.

    Args:
        state: a run, or a model alone.
        with_scales: keep ``_extra_state``, for the history of FP8's scaling factors.
    """
    metadata = checkpoint_metadata()
    entries = {
        str(i): unwrap(chunk).sharded_state_dict(metadata=metadata)
        for i, chunk in enumerate(state.chunks)
    }
    return {
        chunk: {
            name: entry
            for name, entry in of_chunk.items()
            if with_scales or not isinstance(entry, ShardedObject)
        }
        for chunk, of_chunk in entries.items()
    }


def _scales_have_history(config: Config) -> bool:
    """Return whether FP8 scales by earlier steps; other recipes have no history."""
    return config.training.fp8 is not None and config.training.fp8_recipe == "delayed"


def _load_model_state(state: ModelState, loaded: dict[str, Any]) -> None:
    for i, chunk in enumerate(state.chunks):
        # Parameters that are missing here come with the optimizer's state.
        unwrap(chunk).load_state_dict(loaded.get(str(i), {}), strict=False)


def _random_state_entry(state: TrainState) -> ShardedObject:
    return ShardedObject(
        "random_state",
        random_state(state.platform),
        global_shape=(dist.get_world_size(),),
        global_offset=(dist.get_rank(),),
    )


def _position(state: TrainState) -> dict[str, Any]:
    return {
        "iteration": state.iteration,
        "consumed_samples": state.consumed_samples,
        "consumed_tokens": state.consumed_tokens,
        "data_fingerprint": state.corpus.fingerprint,
        "data": state.corpus.description,
        "layout": _layout(state.config),
        "generators": _generators(state),
        "add_bos": state.add_bos,
        "megapoly_version": megapoly.__version__,
    }


def _generators(state: TrainState) -> dict[str, str]:
    """Return what a random state fits: devices have other generators, and replicas other seeds."""
    return {"device": state.platform.device.type, "seeds": "one for each replica"}


def _layout(config: Config) -> dict[str, int]:
    """Return the layout, by which ranks find their own random states."""
    parallel = config.parallel
    return {
        "world_size": dist.get_world_size(),
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "virtual_pipeline": parallel.virtual_pipeline_model_parallel_size or 1,
        "context": parallel.context_parallel_size,
        "sequence": sequence_parts(parallel),
        "expert": parallel.expert_model_parallel_size,
        "expert_tensor": parallel.expert_tensor_parallel_size or 1,
    }


def read_position(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's ``run.json``.

    Raises:
        CheckpointError: the checkpoint is not complete.
    """
    try:
        return json.loads((path / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a complete checkpoint ({error}); give the path of an `iter_*` folder."
        ) from error


def _check_model(config: Config, path: Path) -> None:
    saved, current = load_yaml(path / "config.yaml").model, config.model
    differences = [
        f"`model.{field.name}` is {getattr(current, field.name)} here and "
        f"{getattr(saved, field.name)} in the checkpoint"
        for field in dataclasses.fields(current)
        if field.name not in _MAY_CHANGE
        and getattr(saved, field.name) != getattr(current, field.name)
    ]
    if differences:
        raise CheckpointError(
            f"{path} is of another model: {'; '.join(differences)}. Use the checkpoint's values, "
            "or another `run_dir`."
        )


def _check_data(state: TrainState, position: dict[str, Any], path: Path) -> None:
    if position["data_fingerprint"] != state.corpus.fingerprint:
        saved = position.get("data")
        found = "the checkpoint does not say which"
        if saved is not None:
            found = "; ".join(differences(saved, state.corpus.description))
        if not state.config.checkpoint.accept_other_data:
            raise CheckpointError(
                f"{path} was trained on other data: {found}. To resume at its step with this data, "
                "add `--checkpoint.accept_other_data true`; to train its weights from step 0, use "
                f"another `run_dir` with `--checkpoint.load {path} "
                "--checkpoint.load_weights_only true`."
            )
        logger.info(
            "the data differs from the checkpoint's after step %d: %s", position["iteration"], found
        )


def _check_batch(config: Config, path: Path) -> None:
    saved = load_yaml(path / "config.yaml").training.global_batch_size
    batch = config.training.global_batch_size
    if saved != batch and not config.checkpoint.accept_other_batch:
        raise CheckpointError(
            f"{path} was trained with another `training.global_batch_size` ({saved}, here "
            f"{batch}): use that one, or add `--checkpoint.accept_other_batch true` to resume "
            "after its samples. Lengths in steps then count steps of the batch size here; lengths "
            "in tokens stay the same."
        )


def _delete_old(run_dir: str, keep: int) -> None:
    for path in complete_checkpoints(run_dir)[:-keep] if keep else []:
        # Renamed first: a folder named `iter_*` is complete even while it is being deleted.
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.partial")))
