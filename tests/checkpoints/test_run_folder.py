"""Checkpoints of a run are found by their names, in the order of their steps."""

import errno
import os
import shutil

from megapoly.checkpoints.run_folder import (
    checkpoint_path,
    complete_checkpoints,
    delete_unfinished,
    partial_path,
    run_of,
    step_of,
)


def test_checkpoints_are_in_the_order_of_steps_and_other_folders_are_ignored(tmp_path):
    paths = [checkpoint_path(tmp_path, step) for step in (9_999_999, 10_000_000)]
    others = [paths[0].with_name(name) for name in ("iter_best", "iter_0000100_copy")]
    for path in (*paths[::-1], *others):
        path.mkdir(parents=True)
        (path / "run.json").touch()
    checkpoint_path(tmp_path, 20_000_000).mkdir()  # not complete
    assert complete_checkpoints(tmp_path) == paths
    assert [step_of(path) for path in paths] == [9_999_999, 10_000_000]
    assert run_of(paths[0]) == tmp_path.resolve() and run_of(tmp_path / "imported") is None


def test_what_is_left_of_checkpoints_is_deleted(tmp_path, monkeypatch, caplog):
    """Of a link only the link; what cannot be deleted is named and keeps nothing from going."""
    paths = [partial_path(checkpoint_path(tmp_path, step)) for step in range(4)]
    folder, file, link, busy = paths
    kept = tmp_path / "elsewhere"
    for path in (folder, busy, kept):
        path.mkdir(parents=True)
        (path / "run.json").touch()
    file.touch()
    link.symlink_to(kept)
    rmtree = shutil.rmtree

    def rmtree_of_nfs(path):
        if path == busy:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", rmtree_of_nfs)
    delete_unfinished(tmp_path)
    assert [path for path in paths if os.path.lexists(path)] == [busy]
    assert (kept / "run.json").exists()
    (message,) = caplog.messages
    assert message.startswith(f"{busy} is left of a checkpoint and cannot be deleted: ")
