"""Save checkpoints: ``RUN_DIR/checkpoints/iter_0000100``, either complete or not there at all.

Tensors are in the engine's ``torch_dist`` format, which can be loaded at another layout. Next to
them are ``config.yaml`` (resolved) and ``run.json`` (position, data, version, and what proves the
files, see :mod:`megapoly.checkpoints.seal`).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

import megapoly
from megapoly.checkpoints.choose import make_room, newest_ordinary
from megapoly.checkpoints.run_folder import (
    checkpoint_path,
    checkpoints_folder,
    complete_checkpoints,
    delete_all,
    delete_unfinished,
    partial_path,
)
from megapoly.checkpoints.seal import flush_folder, seal
from megapoly.config import to_yaml
from megapoly.config.step_ranges import text_of_steps
from megapoly.errors import CheckpointError, LockError
from megapoly.platform.files import SEEN_WITHIN_S, free_space, wait_until_seen
from megapoly.training import optimizer_state
from megapoly.training.checkpoint_files import ShardFiles, Written
from megapoly.training.checkpoint_state import (
    generators,
    layout,
    model_state,
    random_state_entry,
    scales_have_history,
)
from megapoly.training.distributed import is_rank_zero, on_rank_zero
from megapoly.training.run_lock import check_sole
from megapoly.training.state import TrainState, gathered_parameters

logger = logging.getLogger(__name__)

_MAX_REASONS = 3  # of a failure: when a disk is full, every rank says so


@dataclass(frozen=True)
class _Saving:
    """A checkpoint that is being written: what was true of the run when it began.

    Args:
        final: its folder when it is complete.
        common: the part of the state that is the same on every rank.
        config: content of ``config.yaml``.
        run: content of ``run.json``.
    """

    final: Path
    common: dict[str, Any]
    config: str
    run: dict[str, Any]

    @property
    def partial(self) -> Path:
        return partial_path(self.final)

    @property
    def run_dir(self) -> Path:
        return self.final.parents[1]


class CheckpointSaver:
    """Saves the checkpoints of a run, one at a time; every method is collective, except close.

    A checkpoint is written to a hidden folder, which is renamed when complete: a folder named
    ``iter_*`` is always complete. When it is verified, all but the newest ``checkpoint.keep`` are
    deleted, except the newest with an ordinary loss.

    In the background a process that is forked from each rank writes, while the rank trains on: its
    memory is the rank's at the time of the fork. Tensors of a GPU are copied to the host before.

    Args:
        state: the run.
    """

    def __init__(self, state: TrainState) -> None:
        self._state, self._files = state, ShardFiles()
        self._calls, self._is_checked = AsyncCallsQueue(), False
        self._saving: _Saving | None = None
        # Only at the start: when its disk is gone later, another one would fill up.
        if state.config.checkpoint.save and is_rank_zero():
            checkpoints_folder(state.config.run_dir).mkdir(parents=True, exist_ok=True)

    @property
    def path(self) -> Path | None:
        """Folder of the checkpoint that is being saved; None if there is none."""
        return None if self._saving is None else self._saving.final

    def save(self, *, in_background: bool) -> Path | None:
        """Save everything that the run needs to resume.

        The checkpoint before must have been finished.

        Args:
            in_background: only begin to; :meth:`finish` completes it.

        Returns:
            The checkpoint's folder if it is complete.

        Raises:
            CheckpointError: the checkpoint could not be saved; on every rank.
            LockError: another job has begun in the run's folder; on every rank.
        """
        assert self._saving is None, "the checkpoint before is not finished"
        state = self._state
        final = checkpoint_path(state.config.run_dir, state.iteration)
        if _is_saved(final):
            return final  # the run resumed from it, and nothing has been trained since
        with gathered_parameters(state):
            tensors, common = save_preprocess(_state_to_save(state), not self._is_checked)
            self._is_checked = True
            saving = _Saving(final, common, to_yaml(state.config), _position(state))
            _on_rank_zero(saving, lambda: _make_folder(state.config.run_dir, saving.partial))
            # Otherwise the engine would make it again, and fail where it is there but not shown.
            wait_until_seen(saving.partial.parent, {saving.partial.name: None}, SEEN_WITHIN_S)
            request = self._files.plan(tensors, saving.partial)
            request.add_finalize_fn(self._publish)
            self._saving = saving
            if in_background:
                self._calls.schedule_async_request(request)
                return None
        request.execute_sync()
        return final

    def finish(self, *, wait: bool) -> Path | None:
        """Complete the checkpoint that :meth:`save` began.

        Args:
            wait: until it is written; otherwise do nothing while some rank still writes.

        Returns:
            The checkpoint's folder, if this call has completed it.

        Raises:
            CheckpointError: the checkpoint could not be saved; on every rank.
            LockError: another job has begun in the run's folder; on every rank.
        """
        path = self.path
        if path is not None:
            self._calls.maybe_finalize_async_calls(blocking=wait)
        return None if self._saving is not None else path

    def close(self) -> None:
        """End the process that still writes, if there is one; its checkpoint is not saved."""
        for call in self._calls.async_calls:
            process = call.async_caller.process
            if process is not None:
                process.kill()
                process.join()

    def _publish(self) -> None:
        """Give the checkpoint its name; when the files of all ranks are written."""
        saving, self._saving = self._saving, None
        assert saving is not None
        written = self._files.gather()
        _on_rank_zero(saving, lambda: self._complete(saving, written or []))

    def _complete(self, saving: _Saving, written: list[Written | str]) -> None:
        failures = [f"rank {i}: {each}" for i, each in enumerate(written) if isinstance(each, str)]
        if failures:
            raise CheckpointError("; ".join(failures[:_MAX_REASONS]))
        partial, of_ranks = saving.partial, [each for each in written if isinstance(each, Written)]
        _check_seen(partial, of_ranks)
        self._files.write_metadata(of_ranks)
        TorchCommonSaveStrategy("torch", 1).save_common(saving.common, partial)
        save_config(CheckpointingConfig("torch_dist", 1), str(partial))
        (partial / "config.yaml").write_text(saving.config)
        files = {name: crc for each in of_ranks for name, crc in each.files.items()}
        seal(partial, saving.run, read_back=files)
        check_sole(saving.run_dir)
        make_room(saving.final)
        partial.rename(saving.final)
        flush_folder(saving.final.parent)
        _delete_old(self._state.config.run_dir, self._state.config.checkpoint.keep)


def _is_saved(final: Path) -> bool:
    """Return whether rank 0 sees a checkpoint; collective.

    Raises:
        LockError: another job has begun in the run's folder, which may have saved it; on every
            rank.
    """

    def look() -> bool | LockError:
        run_dir = final.parents[1]
        try:
            check_sole(run_dir)
        except LockError as error:
            return error
        return final in complete_checkpoints(run_dir)

    found = on_rank_zero(look)
    if isinstance(found, LockError):
        raise found
    return found


class _UnseenError(CheckpointError):
    """Rank 0 does not see what another rank has written."""


def _check_seen(folder: Path, of_ranks: list[Written]) -> None:
    """Check that rank 0 sees all files of all ranks, which other hosts may have written.

    Args:
        folder: of the checkpoint.
        of_ranks: what each rank has written, in the order of ranks.

    Raises:
        _UnseenError: it does not see one.
    """
    sizes = {name: size for each in of_ranks for name, (size, _) in each.files.items()}
    named = {entry.storage_data.relative_path for each in of_ranks for entry in each.entries}
    assert named <= sizes.keys(), "a rank reports the files that its entries are in"
    unseen = wait_until_seen(folder, sizes, SEEN_WITHIN_S)
    for rank, each in enumerate(of_ranks):
        for name in each.files.keys() & unseen.keys():
            raise _UnseenError(
                f"rank {rank} on {each.host} wrote {name} ({sizes[name]:,} bytes), which "
                f"{unseen[name]} for rank 0 on {of_ranks[0].host}, {SEEN_WITHIN_S:g} s later: all "
                "hosts must see the same `run_dir`, so mount its file system on each"
            )


def _on_rank_zero(saving: _Saving, act: Callable[[], None]) -> None:
    """Do something on rank 0; collective.

    Raises:
        CheckpointError: it failed; on every rank. The files that were written are deleted.
        LockError: another job has begun in the run's folder, where nothing is changed any more.
    """
    failure = on_rank_zero(lambda: _failure(saving, act))
    if isinstance(failure, _UnseenError):
        shutil.rmtree(saving.partial, ignore_errors=True)  # on a disk of its own
        dist.barrier()  # the next try has the same folder
    if failure is not None:
        raise failure


def _failure(saving: _Saving, act: Callable[[], None]) -> CheckpointError | LockError | None:
    """Do something; return the error with which it failed."""
    try:
        check_sole(saving.run_dir)
        try:
            act()
        except (OSError, RuntimeError, CheckpointError) as error:  # torch.save raises RuntimeError
            check_sole(saving.run_dir)  # the files may be the other job's
            shutil.rmtree(saving.partial, ignore_errors=True)
            return _explained(saving, error)
    except LockError as error:
        return error
    return None


def _explained(saving: _Saving, error: Exception) -> CheckpointError:
    before = f"{saving.final} was not saved: {error}"
    if isinstance(error, _UnseenError):
        return _UnseenError(f"{before}. The checkpoints before are as they were")
    return CheckpointError(
        f"{before}; without its files {free_space(saving.final)}. The checkpoints before are as "
        "they were; make the disk writable, with room for one more"
    )


def _make_folder(run_dir: str, partial: Path) -> None:
    delete_unfinished(run_dir)
    partial.mkdir()


def _state_to_save(state: TrainState) -> ShardedStateDict:
    model = model_state(state, with_scales=scales_have_history(state.config))
    return {
        "model": model,
        "optimizer": optimizer_state.state_to_save(state.optimizer, model),
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
        try:
            # Renamed first: a folder named `iter_*` is complete even while it is being deleted.
            delete_all(path.rename(partial_path(path)))
        except OSError as error:
            logger.warning("%s could not be deleted: %s", path, error)
