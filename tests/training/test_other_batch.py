"""A run that resumes with another global batch size: samples, schedule, what it counts."""

import json

import pytest
import torch
from resuming_jobs import TINY, checkpoint, train

HIGH, LOW = TINY["optimizer.lr"], TINY["optimizer.min_lr"]
WARMUP = TINY["optimizer.lr_warmup_iters"]
LENGTH = TINY["training.seq_length"]


def options(batch, **more):
    names = {"steps": "training.train_iters", "tokens": "training.train_tokens"}
    return {
        "optimizer.lr_decay_style": "linear",
        "training.global_batch_size": batch,
        "checkpoint.accept_other_batch": True,
        **{names[name]: value for name, value in more.items()},
    }


def rate(consumed, batch, end):
    """Return the rate after samples: up for WARMUP steps of a batch, then a line to the end."""
    warmup = WARMUP * batch
    if consumed <= warmup:
        return HIGH * consumed / warmup
    return HIGH - (HIGH - LOW) * (consumed - warmup) / (end - warmup)


def test_continues_after_the_samples_of_the_checkpoint(tmp_path):
    """Samples 0-11 in batches of 4, 12-29 of 6 on two ranks, 30-44 of 5, 45-51 of 7."""
    whole = train(tmp_path / "whole", options(13, steps=4)).samples[0]
    assert whole.shape == (52, LENGTH) and len({tuple(sample.tolist()) for sample in whole}) == 52

    run_dir = tmp_path / "run"
    jobs = [
        train(run_dir, options(4, steps=3)),
        train(run_dir, options(6, steps=5), num_ranks=2),
        train(run_dir, options(5, tokens=45 * LENGTH)),
        train(run_dir, options(7, steps=7)),  # 49 samples: four more, a whole step
    ]
    # Each rank takes every second micro-batch, here of one sample.
    jobs[1].samples = [torch.stack(jobs[1].samples, dim=1).flatten(0, 1)]
    assert torch.equal(torch.cat([job.samples[0] for job in jobs]), whole)

    lines = jobs[-1].metrics
    consumed = [4, 8, 12, 18, 24, 30, 35, 40, 45, 52]
    assert [line["iteration"] for line in lines] == list(range(1, 11))
    assert [line["consumed_samples"] for line in lines] == consumed
    assert [line["consumed_tokens"] for line in lines] == [LENGTH * count for count in consumed]
    shapes = [(4, 12)] * 3 + [(6, 30)] * 3 + [(5, 45)] * 3 + [(7, 49)]
    expected = [rate(c, *shape) for c, shape in zip([0, *consumed], shapes, strict=False)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(expected)

    for line in [
        "changed since the checkpoint: `optimizer.lr_decay_iters` 3 -> 5, "
        "`training.train_iters` 3 -> 5, `training.global_batch_size` 4 -> 6, processes 1 -> 2",
        "the run ends after 30 samples, at step 6; by the checkpoint's configuration after 12",
        "learning rate of step 4: 5.00e-01; by the checkpoint's schedule 5.00e-02. "
        "`--optimizer.lr_decay_iters 2` keeps the length of its decay",
    ]:
        assert line in jobs[1].printed
    assert "at step 6" in next(line for line in jobs[2].printed if line.startswith("loaded"))

    # The batch of the newest checkpoint needs no option, and other runs are at its end.
    again = train(run_dir, options(7, steps=7) | {"checkpoint.accept_other_batch": False})
    assert "nothing is left to train: the checkpoint is after 52 samples of 49" in again.printed
    assert again.metrics == lines
    position = json.loads((checkpoint(run_dir, 10) / "run.json").read_text())
    assert position["consumed_samples"] == 52 and position["consumed_tokens"] == 52 * LENGTH
    refused = options(4, steps=20) | {"checkpoint.accept_other_batch": False}
    with pytest.raises(
        RuntimeError, match=r"\(7, here 4\): use that one, or add `--checkpoint.acc"
    ):
        train(run_dir, refused)
