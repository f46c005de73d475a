"""Checkpoints of a run are found by their names, in the order of their steps."""

from megapoly.checkpoints.run_folder import (
    checkpoint_path,
    complete_checkpoints,
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
