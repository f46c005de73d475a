"""Traces of a real job: which ranks, which steps, which ranges."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest

from megapoly.config import Config
from megapoly.config.schema import LoggingConfig
from megapoly.testing import run_job
from megapoly.training.profiling import disturbed_steps

OVERRIDES = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 96,
    "model.activation_backend": "reference",
    "training.train_iters": 5,
    "training.seq_length": 32,
    "training.micro_batch_size": 1,
    "training.global_batch_size": 4,
    "training.eval_interval": 0,
    "optimizer.lr_warmup_iters": 1,
    "checkpoint.save": False,
    "logging.tensorboard": False,
    "logging.profile": True,
}


def trace(path):
    with gzip.open(path, "rt") as file:
        return json.load(file)


def ranges(path):
    events = trace(path)["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def profiled(run_dir, options, num_ranks=1):
    run_job("dense_tiny", run_dir, OVERRIDES | options, num_ranks=num_ranks)
    folder = run_dir / "profile"
    return sorted(folder.iterdir()) if folder.exists() else []


@pytest.fixture(scope="module")
def of_second_rank(tmp_path_factory):
    options = {
        "logging.profile_step_start": 3,
        "logging.profile_step_end": 4,
        "logging.profile_ranks": [1],
    }
    return profiled(tmp_path_factory.mktemp("run"), options, num_ranks=2)


def test_only_the_chosen_rank_writes(of_second_rank):
    names = [path.name for path in of_second_rank]
    assert names == ["rank_1.steps_3-4.json.gz", "rank_1.steps_3-4.txt"]
    assert trace(of_second_rank[0])["distributedInfo"]["rank"] == 1


def test_trace_has_the_chosen_steps_and_their_parts(of_second_rank):
    found = ranges(of_second_rank[0])
    steps = {name: count for name, count in found.items() if name.startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#3": 1, "ProfilerStep#4": 1}
    # Two steps of two micro-batches.
    for name in ("forward-compute", "backward-compute"):
        assert found[name] == 4
    for name in ("gradients", "update", "all-grads-sync", "optimizer-inner-step"):
        assert found[name] == 2


def test_ranges_lie_in_their_steps(of_second_rank):
    events = trace(of_second_rank[0])["traceEvents"]
    spans = [
        (event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation"
    ]
    steps = [span for span in spans if span[0].startswith("ProfilerStep")]
    for name, start, end in spans:
        if name in ("gradients", "update", "forward-compute", "backward-compute"):
            assert sum(first <= start and end <= last for _, first, last in steps) == 1
    assert sum(event["name"] == "aten::mm" for event in events if "name" in event) > 20


def test_table_has_the_operators(of_second_rank):
    assert "aten::mm" in of_second_rank[1].read_text()


def test_a_resumed_run_traces_what_is_left(tmp_path):
    """Its first step is the first of the trace: there is no warm-up."""
    options = {"checkpoint.save": True, "optimizer.lr_decay_iters": 5}
    first = {"training.train_iters": 2, "logging.profile": False}
    assert profiled(tmp_path, options | first) == []
    steps = {"logging.profile_step_start": 1, "logging.profile_step_end": 3}
    files = profiled(tmp_path, options | steps)
    assert [path.name for path in files] == ["rank_0.steps_3-3.json.gz", "rank_0.steps_3-3.txt"]
    assert ranges(files[0])["ProfilerStep#3"] == ranges(files[0])["update"] == 1


def test_steps_in_no_average():
    options = {"profile_step_start": 7, "profile_step_end": 9}
    assert not disturbed_steps(Config(logging=LoggingConfig()))
    config = Config(logging=LoggingConfig(profile=True, **options))
    assert list(disturbed_steps(config)) == [6, 7, 8, 9]
