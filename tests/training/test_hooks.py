"""The loop and its hooks: when methods are called, what they can do, and that no loss changes."""

import json
from types import SimpleNamespace

import pytest

import megapoly.pretrain
from megapoly.testing import run_job, run_on_ranks
from megapoly.testing.jobs import RECIPES, shared_cache
from megapoly.training import loop
from megapoly.training.hooks import Hook, is_due
from megapoly.training.step import StepResult
from megapoly.training.stop import StopRequest


class Noting(Hook):
    """Notes each call under a name."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def note(self, method):
        self.calls.append(f"{self.name}.{method}")

    def before_step(self):
        self.note("before_step")

    def after_step(self, step):
        self.note("after_step")

    def after_record(self, step):
        self.note("after_record")

    def at_end(self):
        self.note("at_end")

    def close(self):
        self.note("close")


class Stopping(Noting):
    def after_step(self, step):
        super().after_step(step)
        step.stop = True


class Failing(Noting):
    def after_step(self, step):
        raise OSError("no space left")


def trained(monkeypatch, hooks, calls, *, train_iters, requested_at=None):
    """Run the loop on steps that only count; returns the state."""

    def step(state, batches, *, stop_requested):
        state.iteration += 1
        calls.append(f"step {state.iteration}")
        return StepResult(1.0, 1.0, 0.1, stop_requested=state.iteration == requested_at)

    state = SimpleNamespace(
        iteration=0,
        train_iters=train_iters,
        pass_over=lambda: None,
        training_batches=lambda: iter(()),
        platform=SimpleNamespace(synchronize=lambda: None),
    )
    reporter = SimpleNamespace(
        record=lambda step: calls.append("record"),
        message=calls.append,
        end=lambda: calls.append("end"),
    )
    monkeypatch.setattr(loop, "train_step", step)
    loop.train(state, reporter, hooks, StopRequest())
    return state


STEP = ["a.after_step", "b.after_step", "record", "a.after_record", "b.after_record"]
END = ["a.at_end", "b.at_end", "end", "b.close", "a.close"]


def test_order_of_calls(monkeypatch):
    calls = []
    hooks = [Noting("a", calls), Noting("b", calls)]
    trained(monkeypatch, hooks, calls, train_iters=2)
    before = ["a.before_step", "b.before_step"]
    assert calls == [*before, "step 1", *STEP, *before, "step 2", *STEP, *END]


@pytest.mark.parametrize("by_hook", [True, False])
def test_a_run_that_is_to_stop_ends_after_its_step(monkeypatch, by_hook):
    calls = []
    hooks = [Noting("a", calls), (Stopping if by_hook else Noting)("b", calls)]
    requested_at = None if by_hook else 1
    state = trained(monkeypatch, hooks, calls, train_iters=5, requested_at=requested_at)
    assert state.iteration == 1
    assert calls[2:] == ["step 1", *STEP, "stop requested: ending after step 1", *END]


def test_after_an_error_hooks_are_closed_and_nothing_else(monkeypatch):
    calls = []
    with pytest.raises(OSError, match="no space left"):
        trained(monkeypatch, [Noting("a", calls), Failing("b", calls)], calls, train_iters=2)
    assert calls[2:] == ["step 1", "a.after_step", "b.close", "a.close"]


def test_due_every_interval_and_at_the_end():
    def due(interval):
        states = [SimpleNamespace(iteration=i, train_iters=7) for i in range(1, 8)]
        return [state.iteration for state in states if is_due(state, interval)]

    assert (due(3), due(8), due(0)) == ([3, 6, 7], [7], [])


TINY = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 192,
    "model.hidden_dropout": 0.1,
    "model.activation_backend": "reference",
    "training.train_iters": 5,
    "training.seq_length": 32,
    "training.micro_batch_size": 1,
    "training.global_batch_size": 4,
    "training.eval_interval": 2,
    "training.eval_iters": 1,
    "optimizer.lr_warmup_iters": 2,
    "checkpoint.save_interval": 2,
    "checkpoint.keep": 0,
    "logging.tensorboard": False,
}


class StopsAtThree(Hook):
    """A user's own: a metric at every step, and an end of the run."""

    def __init__(self, state):
        self._state = state

    def after_step(self, step):
        step.metrics["mine/loss_times_two"] = 2 * step.result.lm_loss
        step.stop = self._state.iteration == 3


def job_with_own_hook(argv, recipe):
    built = megapoly.pretrain.build_hooks
    megapoly.pretrain.build_hooks = lambda state, *args: [*built(state, *args), StopsAtThree(state)]
    config = megapoly.pretrain.configure(argv, default_recipe=recipe, program="pretrain")
    assert megapoly.pretrain.pretrain(config) is False


TIMES = {"step_time_s", "tokens_per_second", "tflops_per_device", "time"}


def test_own_hook_records_and_ends_a_run_without_changing_it(tmp_path):
    plain = run_job("dense_tiny", tmp_path / "plain", TINY)
    options = TINY | {"run_dir": tmp_path / "own", "data.cache_dir": shared_cache().name}
    argv = [f"--{name}={value}" for name, value in options.items()] + ["--training.device=cpu"]
    run_on_ranks(job_with_own_hook, 1, argv, str(RECIPES / "dense_tiny.yaml"))
    lines = (tmp_path / "own" / "metrics.jsonl").read_text().splitlines()
    for line, expected in zip(map(json.loads, lines), plain[:3], strict=True):
        assert line.pop("mine/loss_times_two") == 2 * line["lm_loss"]
        assert list(line) == list(expected)
        assert {name: line[name] for name in line.keys() - TIMES} == {
            name: expected[name] for name in expected.keys() - TIMES
        }
    saved = sorted(path.name for path in (tmp_path / "own" / "checkpoints").iterdir())
    assert saved == ["iter_0000002", "iter_0000003"]
