"""Labels that ``eod_mask_loss`` excludes are in the samples of a check, as is its mean."""

import copy
from pathlib import Path

import pytest

from megapoly.config import load_yaml
from megapoly.data.corpus import load_corpus
from megapoly.data.tokenizer import load_tokenizer
from megapoly.preflight.layouts import parse_layout
from megapoly.preflight.parallel_check import job
from megapoly.preflight.parallel_check.comparison import FP32, compare
from megapoly.preflight.parallel_check.scaled import scaled_down
from megapoly.testing.jobs import RECIPES, shared_cache


def test_excluded_labels(tmp_path):
    config = load_yaml(RECIPES / "dense_tiny.yaml")
    config.data.eod_mask_loss = True
    small = scaled_down(config, steps=1, bf16=False)
    assert small.data.eod_mask_loss

    with_data = copy.deepcopy(small)
    job.set_data(with_data, tmp_path)
    tokenizer = load_tokenizer(None)
    train = load_corpus(with_data, tokenizer=tokenizer).train
    order = train.order(with_data.data.seed)
    samples = [train[order[i]] for i in range(with_data.training.global_batch_size)]
    excluded = [int((sample["loss_mask"] == 0).sum()) for sample in samples]
    ends = [int((sample["tokens"] == tokenizer.eod).sum()) for sample in samples]
    assert excluded == ends and sum(excluded) >= 4

    expected, actual = (
        job.train_at(small, parse_layout(name), cache_dir=tmp_path, timeout_s=300)
        for name in ("1", "cp2")
    )
    assert compare(actual, expected).is_within(FP32)


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
