"""Load checkpoints: resume a run, or start from another run's checkpoint, at any layout."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint import CheckpointException

from megapoly.checkpoints.choose import check_whole, newest_to_resume
from megapoly.checkpoints.module_state import check_module_state
from megapoly.checkpoints.run_file import DamageError, read_run_file
from megapoly.checkpoints.run_folder import complete_checkpoints
from megapoly.checkpoints.tensor_metadata import read_metadata
from megapoly.checkpoints.tensor_reader import TensorReader, load_object
from megapoly.checkpoints.verify import total_bytes
from megapoly.config import Config, load_yaml
from megapoly.data.fingerprint import differences
from megapoly.errors import CheckpointError
from megapoly.model.builder import unwrap
from megapoly.platform.engine_workarounds import read_checkpoints_with
from megapoly.training import optimizer_state
from megapoly.training.checkpoint_state import (
    generators,
    layout,
    model_state,
    random_state_entry,
    scales_have_history,
)
from megapoly.training.distributed import all_ranks, on_rank_zero
from megapoly.training.random_state import seed_generators, set_random_state
from megapoly.training.rewind import check_skipped, passed_over, set_aside_trained
from megapoly.training.state import ModelState, Position, TrainState

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


def restore(state: TrainState, copied: Path | None = None) -> Path | None:
    """Resume from the newest checkpoint of the run, or start from ``checkpoint.load``; collective.

    The checkpoint is verified before, by all ranks together. Damaged ones of the run are set aside,
    and the newest that is whole is taken.

    Args:
        state: changed in place.
        copied: copy of ``checkpoint.load``, if that is a URL.

    Returns:
        The checkpoint that was loaded, or None if the run starts from the beginning.

    Raises:
        CheckpointError: the run has a checkpoint and ``checkpoint.resume`` is false, a
            checkpoint does not fit, or none of those to choose from is whole.
    """
    settings, run_dir = state.config.checkpoint, Path(state.config.run_dir)
    if settings.resume:
        set_aside_trained(state)
    elif complete := on_rank_zero(lambda: complete_checkpoints(run_dir)):
        raise CheckpointError(
            f"`checkpoint.resume` is false and {run_dir} has {complete[-1].name}; choose "
            "another `run_dir`, or delete the folder."
        )
    begin = time.monotonic()
    path, weights_only = newest_to_resume(run_dir, all_ranks()), False
    if path is None and settings.load is not None:
        path, weights_only = copied or Path(settings.load), settings.load_weights_only
        check_whole(path, all_ranks())
    if path is None:
        return None
    verified = time.monotonic()
    load_checkpoint(state, path, weights_only=weights_only)
    logger.info(
        "verified %s MB in %.2f s, loaded in %.2f s",
        f"{total_bytes(path) / 1e6:,.0f}",
        verified - begin,
        time.monotonic() - verified,
    )
    return path


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
    check_model(state.config, path)
    with torch.no_grad():
        _check_data(state, position, path)
        _check_batch(state.config, path)
        check_skipped(state, path)
        own = {"layout": layout(state.config), "generators": generators(state)}
        has_state = own.items() <= position.items()
        expected = _state_to_load(state, load_yaml(path / "config.yaml"))
        if has_state:
            expected["random_state"] = random_state_entry(state)
        loaded = _load_entries(expected, path)
        # "model" is absent if the optimizer's state has all parameters.
        _load_model_state(state, loaded.get("model", {}))
        optimizer_state.load_state(state.optimizer, loaded["optimizer"])
    state.start_from(
        Position(position["iteration"], position["consumed_samples"], position["consumed_tokens"])
    )
    _restore_recent_steps(state, position, path)
    if has_state:
        set_random_state(loaded["random_state"], state.platform)
    else:
        if state.config.model.hidden_dropout or state.config.model.attention_dropout:
            logger.info("no random state of this layout and device: dropout draws from other seeds")
        seed_generators(state.config.training.seed, consumed_samples=state.consumed_samples)


def _restore_recent_steps(state: TrainState, position: dict[str, Any], path: Path) -> None:
    """Continue with what the checkpoint remembers of its steps, if it was saved with that."""
    state.passed_over = passed_over(position)
    if "recent_steps" in position:
        saved = load_yaml(path / "config.yaml").training.global_batch_size
        is_same = saved == state.config.training.global_batch_size
        is_same &= position["data_fingerprint"] == state.corpus.fingerprint
        state.recent_steps.restore(position["recent_steps"], with_values=is_same)


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
    check_model(state.config, path)
    expected = model_state(state, with_scales=False)
    loaded = _load_entries({"model": expected}, path)
    with torch.no_grad():
        _load_model_state(state, loaded["model"])


class _CommonReader(TorchCommonLoadStrategy):
    """Reader of ``common.pt``. The engine's unpickles with TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1."""

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        """Return the entries that are not sharded."""
        path = Path(checkpoint_dir) / "common.pt"
        with path.open("rb") as stream:
            try:
                return load_object(stream)
            except CheckpointError as error:
                raise CheckpointError(f"{path} cannot be loaded: {error}") from error


def _load_entries(expected: dict[str, Any], path: Path) -> dict[str, Any]:
    """Load entries with the engine; nothing that a file names is executed; collective.

    Raises:
        CheckpointError: a file is damaged, is missing or names code, or the entries do not fit.
    """
    read_checkpoints_with(TensorReader, load_object)
    read_metadata(path)  # torch logs the stack trace of an index that it cannot read
    try:
        # Given here, they are not chosen by the checkpoint's own metadata.json.
        return dist_checkpointing.load(
            expected,
            str(path),
            sharded_strategy=TorchDistLoadShardedStrategy(),
            common_strategy=_CommonReader(),
        )
    except dist.DistError:
        raise
    except CheckpointException as error:  # a BaseException, of all ranks that failed
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{path} cannot be loaded (rank {rank}): {_line(cause)}") from error
    except (OSError, RuntimeError, ValueError, CheckpointingException) as error:
        raise CheckpointError(f"{path} cannot be loaded: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    lines = str(error).strip().splitlines()
    if isinstance(error, CheckpointError) and lines:
        return lines[0]
    return ": ".join([type(error).__name__, *lines[:1]])


def _state_to_load(state: TrainState, saved: Config) -> dict[str, Any]:
    """Return what to load; parameters are read with the optimizer's state, in fp32."""
    with_scales = scales_have_history(state.config)
    if with_scales and not scales_have_history(saved):
        logger.info("scaling factors of FP8 start again: the checkpoint has none")
        with_scales = False
    model = model_state(state, with_scales=with_scales)
    return {
        "model": {
            chunk: optimizer_state.without_parameters(entries, state.optimizer)
            for chunk, entries in model.items()
        },
        "optimizer": optimizer_state.state_to_load(
            state.optimizer, model, saved_in_bf16=saved.training.bf16
        ),
    }


def _load_model_state(state: ModelState, loaded: dict[str, Any]) -> None:
    for i, chunk in enumerate(state.chunks):
        for name, entry in loaded.get(str(i), {}).items():
            if "_extra_state" in name:
                check_module_state(name, entry)
        # Parameters that are missing here come with the optimizer's state.
        unwrap(chunk).load_state_dict(loaded.get(str(i), {}), strict=False)


def read_position(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's ``run.json``.

    Raises:
        CheckpointError: the checkpoint is not complete.
    """
    try:
        return read_run_file(path)
    except DamageError as error:
        raise CheckpointError(
            f"{path} is not a complete checkpoint ({error}); give the path of an `iter_*` folder."
        ) from error


def check_model(config: Config, path: Path) -> None:
    """Check that a checkpoint is of the model that a configuration describes.

    Raises:
        CheckpointError: it is of another one, with what differs.
    """
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
