"""Learning rates against their formulas."""

import math

import pytest

from megapoly.config import Config
from megapoly.config.schema import OptimizerConfig, TrainingConfig
from megapoly.training.optimizer import build_scheduler, learning_rate_at

BATCH = 12


class Optimizer:
    """The part of an optimizer that the engine's scheduler uses."""

    def __init__(self):
        self.param_groups = [{"lr": 0.0, "weight_decay": 0.0}]


def learning_rates(steps, **settings):
    fixed = {"lr": 1.0, "min_lr": 0.1, "lr_warmup_iters": 4, "lr_decay_iters": 20}
    training = TrainingConfig(global_batch_size=BATCH)
    config = Config(optimizer=OptimizerConfig(**(fixed | settings)), training=training)
    optimizer = Optimizer()
    scheduler = build_scheduler(config, optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(increment=config.training.global_batch_size)
    assert [learning_rate_at(config, n * BATCH) for n in range(steps)] == rates
    return rates


def expected(shape):
    """Warm-up over 4 steps, then ``shape`` of the fraction of the remaining 16 that is done."""
    return [i / 4 if i <= 4 else shape(min(1.0, (i - 4) / 16)) for i in range(25)]


SHAPES = {
    "cosine": lambda done: 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1.0 - 0.9 * done,
    # The engine's "constant" ends with the schedule, as all its styles do: then min_lr.
    "constant": lambda done: 1.0,
}


@pytest.mark.parametrize("style", SHAPES)
def test_styles(style):
    steps = 20 if style == "constant" else 25
    rates = learning_rates(steps, lr_decay_style=style)
    assert rates == pytest.approx(expected(SHAPES[style])[:steps])


def test_warmup_begins_at_its_own_rate():
    """As in OLMo's, which the released mixture of experts uses: by default at a tenth."""
    rates = learning_rates(6, lr_warmup_init=0.1)
    assert rates[:5] == pytest.approx([0.1 + 0.9 * step / 4 for step in range(5)])
    assert rates[5] == pytest.approx(SHAPES["cosine"](1 / 16))


def test_wsd_is_flat_and_then_falls():
    rates = learning_rates(21, lr_decay_style="WSD", lr_wsd_decay_iters=5)
    assert rates[4:16] == pytest.approx([1.0] * 12)
    assert rates[16:21] == pytest.approx([1.0 - 0.9 * k / 5 for k in range(1, 6)])
