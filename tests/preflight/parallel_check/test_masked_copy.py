"""The copy of a configuration with masked tokens has them, and the configuration's mean of them."""

from pathlib import Path

import pytest

from megapoly.config import load_yaml
from megapoly.preflight.layouts import parse_layout
from megapoly.preflight.parallel_check import job
from megapoly.preflight.parallel_check.scaled import scaled_down
from megapoly.testing.jobs import RECIPES, shared_cache


def losses(layout, *, masks, per_token=None):
    config = load_yaml(RECIPES / "dense_tiny.yaml")
    config.data.eod_mask_loss = masks
    config.training.calculate_per_token_loss = per_token
    small = scaled_down(config, steps=1, bf16=False)
    steps = job.train_at(
        small, parse_layout(layout), cache_dir=Path(shared_cache().name), timeout_s=300
    )
    return [step.losses["lm_loss"] for step in steps]


@pytest.mark.slow
def test_masked_tokens_are_those_of_one_process():
    expected = losses("1", masks=True)
    assert losses("dp2", masks=True) == pytest.approx(expected, rel=1e-6)
    other_means = (losses("1", masks=False), losses("1", masks=True, per_token=False))
    for mean in other_means:
        assert abs(mean[0] / expected[0] - 1) > 1e-5
