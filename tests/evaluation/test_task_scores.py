"""Benchmarks during training: when they are due, what is written, and that training continues."""

import json

import pytest
from stopping_jobs import job_stopped_in_tasks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megapoly.testing import run_job, run_on_ranks
from megapoly.testing.jobs import RECIPES, shared_cache

OVERRIDES = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 192,
    "model.hidden_dropout": 0.1,
    "model.activation_backend": "reference",
    "training.train_iters": 5,
    "training.seq_length": 32,
    "training.micro_batch_size": 1,
    "training.global_batch_size": 4,
    "optimizer.lr_warmup_iters": 2,
    "checkpoint.save": False,
}
QUESTIONS = [
    ("Who hunts the whale?", "Ahab", ("Hamlet", "Satan", "Eve")),
    ("Who speaks to a skull?", "Hamlet", ("Ishmael", "Adam", "Starbuck")),
    ("Who falls from heaven?", "Satan", ("Ahab", "Ophelia", "Queequeg")),
]


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """Return a folder with questions in SciQ's format."""
    folder = tmp_path_factory.mktemp("benchmarks")
    lines = [
        {
            "support": "Of books.",
            "question": question,
            "correct_answer": right,
            **{f"distractor{i}": answer for i, answer in enumerate(wrong, start=1)},
        }
        for question, right, wrong in QUESTIONS
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "sciq__none__validation.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def tasks(benchmarks):
    return {
        "training.eval_tasks": "[sciq]",
        "training.eval_tasks_interval": 2,
        "training.eval_tasks_data": benchmarks,
    }


def test_tasks_are_evaluated_when_due_and_change_no_step(tmp_path, tasks):
    """Dropout draws from generators that the harness seeds."""
    plain = run_job("dense_tiny", tmp_path / "plain", OVERRIDES)
    lines = run_job("dense_tiny", tmp_path / "tasks", OVERRIDES | tasks)
    assert [line["iteration"] for line in lines if "task/sciq" in line] == [2, 4, 5]
    for line in lines:
        assert round(line.get("task/sciq", 0.0) * 3 / 100, 6) in (0, 1, 2, 3)
        if "task/sciq" in line:  # of the mean of three answers, each right or wrong
            p = line["task/sciq"] / 100
            error = 100 * (p * (1 - p) / 2) ** 0.5
            assert line["task_stderr/sciq"] == pytest.approx(error)
    assert [line["lm_loss"] for line in lines] == [line["lm_loss"] for line in plain]
    events = EventAccumulator(str(tmp_path / "tasks" / "tensorboard"))
    events.Reload()
    written = {event.step: event.value for event in events.Scalars("task/sciq")}
    assert written == pytest.approx(
        {line["iteration"]: line["task/sciq"] for line in lines if "task/sciq" in line}
    )


def test_ranks_evaluate_together(tmp_path, tasks):
    """At two replicas whose forward pass gathers the parameters."""
    options = OVERRIDES | tasks | {"model.hidden_dropout": 0.0}
    (*_, one) = run_job("dense_tiny", tmp_path / "one", options)
    sharded = {
        "parallel.use_distributed_optimizer": True,
        "parallel.overlap_grad_reduce": True,
        "parallel.overlap_param_gather": True,
    }
    (*_, two) = run_job("dense_tiny", tmp_path / "two", options | sharded, num_ranks=2)
    assert two["task/sciq"] == one["task/sciq"]
    assert two["lm_loss"] == pytest.approx(one["lm_loss"], abs=1e-5)


def test_what_is_wrong_with_a_task_is_known_before_the_first_step(tmp_path, tasks):
    with pytest.raises(RuntimeError, match="no_such_task"):
        run_job(
            "dense_tiny", tmp_path, OVERRIDES | tasks | {"training.eval_tasks": "[no_such_task]"}
        )
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_stop_request_during_a_task_saves_and_stops(tmp_path, tasks):
    options = OVERRIDES | tasks | {"checkpoint.save": True, "run_dir": tmp_path}
    options["data.cache_dir"] = shared_cache().name
    argv = [f"--{name}={value}" for name, value in options.items()]
    run_on_ranks(job_stopped_in_tasks, 2, argv, str(RECIPES / "dense_tiny.yaml"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    assert not any("task/sciq" in line for line in lines)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["iter_0000002"]
