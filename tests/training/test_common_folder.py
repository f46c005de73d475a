"""Hosts that do not share the folder of a run: refused before the first step, and named."""

import os
from concurrent.futures import ThreadPoolExecutor

import host_jobs
import pytest
from processes import names, num_lines, wait_until
from tiny_jobs import TINY

from megapoly.checkpoints.verify import verify
from megapoly.data.token_files import write_token_file
from megapoly.data.tokenizer import load_tokenizer
from megapoly.testing import run_on_ranks
from megapoly.testing.jobs import shared_cache

HOST = os.uname().nodename


def arguments(run_dir, options):
    fixed = {"run_dir": run_dir, "data.cache_dir": shared_cache().name}
    options = TINY | {"training.train_iters": 2} | options | fixed
    return ["--config", "dense_tiny", *(f"--{name}={value}" for name, value in options.items())]


def on_hosts(*run_dirs, **options):
    return [arguments(run_dir, options) for run_dir in run_dirs]


def saved(run_dir):
    return names(run_dir / "checkpoints", "*")


def test_hosts_with_disks_of_their_own_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    jobs = on_hosts(tmp_path / "a", tmp_path / "b")
    (status, first), (status_1, second) = run_on_ranks(host_jobs.on_host, 2, jobs, 1.0)
    assert (status, status_1) == (2, 2)
    sentence = first[first.index("`run_dir`") :].strip()
    assert sentence.startswith(
        f"`run_dir` ({tmp_path / 'a'}) must be one folder that all hosts of the job see and can "
        f"write to: rank 1 on {HOST} does not see {tmp_path / 'b' / 'checkpoints'}/.seen_by_all_"
    )
    assert f", which rank 0 on {HOST} sees (No such file or directory), after 1 s. " in sentence
    assert "--run_dir FOLDER" in sentence and "docker/launch.sh --runs FOLDER" in sentence
    assert second.count("must be one folder") == 1 and sentence in second
    assert saved(tmp_path / "a") == saved(tmp_path / "b") == []
    assert num_lines(tmp_path / "a" / "metrics.jsonl") == 0


def test_a_host_without_the_folder_is_named(tmp_path):
    jobs = on_hosts(tmp_path / "a", tmp_path / "b")
    (_, first), _ = run_on_ranks(host_jobs.on_host, 2, jobs, 0.0)
    assert f"rank 1 on {HOST} has no folder {tmp_path / 'b' / 'checkpoints'}" in first
    assert not (tmp_path / "b").exists()


def test_a_host_that_cannot_write_is_named(tmp_path):
    jobs = on_hosts(tmp_path, tmp_path)
    results = run_on_ranks(host_jobs.on_host_that_cannot_write, 2, jobs)
    assert [status for status, _ in results] == [2, 2]
    wanted = f"rank 1 on {HOST} cannot write in {tmp_path / 'checkpoints'} (File too large)"
    assert all(wanted in printed for _, printed in results)
    assert saved(tmp_path) == [] and num_lines(tmp_path / "metrics.jsonl") == 0


def test_a_folder_with_another_path_on_each_host_is_saved_to_and_resumed_from(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for steps in (2, 4):
        jobs = on_hosts(tmp_path / "a", tmp_path / "b", **{"training.train_iters": steps})
        results = run_on_ranks(host_jobs.on_host, 2, jobs)
        assert [status for status, _ in results] == [0, 0], results
    assert saved(tmp_path / "a") == ["iter_0000002", "iter_0000004"]
    assert "loaded" in results[0][1] and num_lines(tmp_path / "a" / "metrics.jsonl") == 4
    files = verify(tmp_path / "a" / "checkpoints" / "iter_0000004").files
    assert len([name for name in files if name.endswith(".distcp")]) == 2


def test_a_folder_that_shows_late_is_waited_for(tmp_path):
    jobs = on_hosts(tmp_path / "a", tmp_path / "b")
    results = run_on_ranks(
        host_jobs.on_late_host, 2, jobs, str(tmp_path / "b"), str(tmp_path / "a")
    )
    assert [status for status, _ in results] == [0, 0], results
    assert f"rank 1 on {HOST} waits to see what rank 0 on {HOST} has written" in results[1][1]
    assert saved(tmp_path / "a") == ["iter_0000002"]


def test_rank_0_decides_which_checkpoints_there_are(tmp_path):
    jobs = on_hosts(tmp_path, tmp_path)
    for line in ("saved", "loaded"):  # the second time it has nothing to train, nor to save
        results = run_on_ranks(host_jobs.on_host_that_lists_nothing, 2, jobs)
        assert [status for status, _ in results] == [0, 0], results
        assert f"{line} {tmp_path / 'checkpoints' / 'iter_0000002'}" in results[0][1]
    jobs = on_hosts(tmp_path, tmp_path, **{"checkpoint.resume": False})
    results = run_on_ranks(host_jobs.on_host_that_lists_nothing, 2, jobs)
    assert [status for status, _ in results] == [2, 2], results
    assert all("`checkpoint.resume` is false and" in printed for _, printed in results)


def test_runs_that_save_nothing_need_a_common_folder_only_to_load(tmp_path):
    nothing = {"checkpoint.save": False}
    jobs = on_hosts(tmp_path / "a", tmp_path / "b", **nothing)
    results = run_on_ranks(host_jobs.on_host, 2, jobs, 0.0)
    assert [status for status, _ in results] == [0, 0], results
    assert num_lines(tmp_path / "a" / "metrics.jsonl") == 2 and not (tmp_path / "b").exists()
    together = on_hosts(tmp_path / "c", tmp_path / "c")
    assert [status for status, _ in run_on_ranks(host_jobs.on_host, 2, together)] == [0, 0]
    jobs = on_hosts(tmp_path / "c", tmp_path / "b", **nothing | {"training.train_iters": 3})
    results = run_on_ranks(host_jobs.on_host, 2, jobs, 0.0)
    assert [status for status, _ in results] == [2, 2]
    assert "all hosts of the job see, since it has checkpoints: rank 1" in results[0][1]
    assert saved(tmp_path / "c") == ["iter_0000002"]


def test_a_folder_that_is_lost_later_fails_the_save(tmp_path):
    """Never `saved`, no checkpoint's name, and no files left on the other disk."""
    (tmp_path / "a").mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    options = {"checkpoint.save_interval": 1}
    jobs = on_hosts(tmp_path / "a", tmp_path / "b", **options)
    results = run_on_ranks(
        host_jobs.on_host_that_loses_the_folder,
        2,
        jobs,
        str(tmp_path / "b"),
        str(tmp_path / "own"),
        0.5,
    )
    assert [status for status, _ in results] == [2, 2], results
    printed = results[0][1]
    assert "warning: " in printed and "\nsaved" not in printed
    wanted = f"iter_0000001 was not saved: rank 1 on {HOST} wrote __1_0.distcp ("
    assert wanted in printed and "which is missing for rank 0 on" in printed
    assert saved(tmp_path / "a") == saved(tmp_path / "own") == []


def test_files_that_rank_0_sees_late_are_waited_for(tmp_path):
    results = run_on_ranks(host_jobs.on_host_that_shows_files_late, 2, on_hosts(tmp_path, tmp_path))
    assert [status for status, _ in results] == [0, 0], results
    verdict = verify(tmp_path / "checkpoints" / "iter_0000002")
    assert not verdict.damages and "__1_0.distcp" in verdict.files


@pytest.mark.parametrize("in_background", [False, True])
def test_the_first_of_two_jobs_without_locks_ends_and_keeps_the_second_ones_checkpoints(
    tmp_path, in_background
):
    """It finds them when it is to complete a checkpoint, or begins one that there is by then."""
    options = {"training.train_iters": 4, "checkpoint.save_interval": 2}
    argv = arguments(tmp_path / "run", options | {"checkpoint.async_save": in_background})
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    with ThreadPoolExecutor() as pool:
        job = [argv, 3, str(begun), str(ended)]
        first = pool.submit(run_on_ranks, host_jobs.without_locks, 2, *job)
        wait_until(lambda: begun.exists() or first.done())
        (status, printed), _ = run_on_ranks(host_jobs.without_locks, 2, argv, 0, "", "")
        ended.touch()
        results = first.result()
    assert status == 0 and "has no locks (Operation not supported)" in printed
    assert "the last one there was a job on" in printed
    assert [status for status, _ in results] == [2, 2]
    (told,) = {printed for _, printed in results if "has begun in" in printed}  # by one of them
    assert "saves nothing more there" in told
    assert saved(tmp_path / "run") == ["iter_0000002", "iter_0000004"]
    assert not verify(tmp_path / "run" / "checkpoints" / "iter_0000004").damages


def test_hosts_with_other_options_are_refused_and_other_paths_are_not(tmp_path):
    (tmp_path / "b").symlink_to(tmp_path)
    same = arguments(tmp_path, {"checkpoint.save": False})
    other = [*same, "--optimizer.lr=0.5", "--training.train_iters=7", f"--run_dir={tmp_path / 'b'}"]
    results = run_on_ranks(host_jobs.on_host, 2, [same, other])
    assert [status for status, _ in results] == [2, 2]
    wanted = (
        f"all ranks must have the same configuration: on rank 1 on {HOST} `optimizer.lr` is 0.5 "
        "and not 0.002, `optimizer.lr_decay_iters` is 7 and not 3, `training.train_iters` is 7 "
        f"and not 2 as on rank 0 on {HOST}"
    )
    assert wanted in results[0][1] and wanted in results[1][1]
    assert num_lines(tmp_path / "metrics.jsonl") == 0


def test_hosts_with_other_validation_data_are_refused(tmp_path):
    """Otherwise one host would evaluate more batches than the other, and wait for it."""
    tokenizer = load_tokenizer(None)
    of_ranks = []
    for rank, number in enumerate((3, 30)):
        prefix = tmp_path / f"host{rank}" / "text"
        prefix.parent.mkdir()
        write_token_file(prefix, [f"A text of {i} words. " * 9 for i in range(number)], tokenizer)
        of_ranks.append(arguments(tmp_path, {"data.validation": f"{{text: {prefix}}}"}))
    results = run_on_ranks(host_jobs.on_host, 2, of_ranks)
    assert [status for status, _ in results] == [2, 2], results
    wanted = "All ranks must read the same validation data; on rank 1 it has fingerprint "
    assert all(wanted in printed for _, printed in results)
