"""Jobs whose ranks are on hosts of their own, which may see other folders."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import shutil
import threading
from pathlib import Path

import torch.distributed as dist
from full_disk_jobs import files_at_most

from megapoly import pretrain
from megapoly.checkpoints import choose
from megapoly.training import common_folder, load_checkpoint, save_checkpoint, stored_checkpoints
from megapoly.training.checkpoint_files import ShardFiles
from megapoly.training.save_checkpoint import CheckpointSaver


def on_host(of_ranks: list[list[str]], limit_s: float = 600.0) -> tuple[int, str]:
    """Run the job with the arguments of this rank, whose host has no other rank.

    Args:
        of_ranks: arguments of each rank.
        limit_s: until a host must see what another one has written.

    Returns:
        Exit status, and what was printed and logged.
    """
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    common_folder._LIMIT_S = save_checkpoint.SEEN_WITHIN_S = limit_s  # in this process alone
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        status = pretrain.main(of_ranks[int(os.environ["RANK"])], program="pretrain")
    return status, printed.getvalue()


def on_host_that_lists_nothing(of_ranks: list[list[str]]) -> tuple[int, str]:
    """Run :func:`on_host`; rank 1 sees none of the run's checkpoints when it lists them."""
    if os.environ["RANK"] == "1":
        save_checkpoint.complete_checkpoints = load_checkpoint.complete_checkpoints = lambda _: []
        choose.checkpoint_names = stored_checkpoints.checkpoint_names = lambda _: []
    return on_host(of_ranks)


def on_host_that_cannot_write(of_ranks: list[list[str]]) -> tuple[int, str]:
    """Run :func:`on_host`; no file of rank 1 may grow."""
    look = common_folder._why_not_written

    def look_on_a_full_disk(folder):
        with files_at_most(0):
            return look(folder)

    common_folder._why_not_written = look_on_a_full_disk
    return on_host(of_ranks)


def on_late_host(of_ranks: list[list[str]], shown: str, hidden: str) -> tuple[int, str]:
    """Run :func:`on_host`; rank 1 sees a folder of rank 0 only after it has said that it waits."""

    def appear(record: logging.LogRecord) -> None:
        if "waits to see" in record.getMessage():
            Path(shown).symlink_to(hidden)

    handler = logging.Handler()
    handler.emit = appear  # type: ignore[method-assign]
    logging.getLogger("megapoly.training.common_folder").addHandler(handler)
    common_folder._NOTE_AFTER_S = 0.0
    return on_host(of_ranks)


def on_host_that_loses_the_folder(
    of_ranks: list[list[str]], link: str, own: str, limit_s: float
) -> tuple[int, str]:
    """Run :func:`on_host`; before the first save rank 1 has another folder under the same path."""
    save = CheckpointSaver.save

    def save_elsewhere(self, *, in_background):
        if dist.get_rank() == 1 and os.path.realpath(link) != os.path.realpath(own):
            os.unlink(link)
            os.symlink(own, link)
        return save(self, in_background=in_background)

    CheckpointSaver.save = save_elsewhere
    return on_host(of_ranks, limit_s)


def on_host_that_shows_files_late(of_ranks: list[list[str]]) -> tuple[int, str]:
    """Run :func:`on_host`; what rank 1 writes is not there when rank 0 looks first."""
    gather, check = ShardFiles.gather, save_checkpoint.wait_until_seen

    def hide(self):
        written = gather(self)
        if dist.get_rank() == 0:
            (name,) = written[1].files
            folder = self._strategy.planned.writer.path
            shutil.move(Path(folder, name), Path(folder).parent / "late")
            late.append((Path(folder).parent / "late", Path(folder, name)))
        return written

    def look(folder, sizes, limit_s):
        if not late:  # it looks for the folder
            return check(folder, sizes, limit_s)
        source, target = late.pop()
        assert not target.exists()
        show = threading.Timer(0.5, shutil.move, [source, target])
        show.start()
        unseen = check(folder, sizes, limit_s)
        show.join()
        return unseen

    late: list[tuple[Path, Path]] = []
    ShardFiles.gather, save_checkpoint.wait_until_seen = hide, look
    return on_host(of_ranks)


def without_locks(argv: list[str], after_step: int, begun: str, ended: str) -> tuple[int, str]:
    """Run the job where locks are not supported; wait after a step until a second job has ended."""
    import fcntl

    from megapoly.training.hooks import CheckpointHook

    def not_supported(*args):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    after_record = CheckpointHook.after_record

    def wait(self, step):
        if self._state.iteration == after_step and dist.get_rank() == 0:
            Path(begun).touch()
            while not Path(ended).exists():
                threading.Event().wait(0.01)
        after_record(self, step)

    fcntl.flock = not_supported
    if begun:
        CheckpointHook.after_record = wait
    os.environ |= {"LOCAL_RANK": os.environ["RANK"], "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"]}
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        status = pretrain.main(argv, program="pretrain")
    return status, printed.getvalue()
