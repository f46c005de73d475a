import multiprocessing
import signal
from collections import Counter
from fractions import Fraction
from itertools import islice

import pytest
import torch
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from megapoly.data.loader import (
    BatchLayout,
    ended_worker,
    evaluation_batches,
    num_evaluation_steps,
    training_batches,
)
from megapoly.data.sample_order import BlendOrder, EpochOrder
from megapoly.errors import ConfigError, DataError


class Numbers(Dataset):
    """A pool whose samples are their own index."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index):
        mask = 0.0 if index is None else 1.0
        return {"tokens": torch.tensor([index or 0]), "loss_mask": torch.tensor([mask])}


def layouts(size: int, micro: int = 2, batch: int = 8) -> list[BatchLayout]:
    return [BatchLayout(micro, batch, rank, size) for rank in range(size)]


def micro_batches(batches, count: int | None = None) -> list[tuple[int, ...]]:
    return [tuple(batch["tokens"].flatten().tolist()) for batch in islice(batches, count)]


def training(layout: BatchLayout, steps: int, consumed: int = 0, **options):
    order = EpochOrder(27, seed=5)
    batches = training_batches(Numbers(27), order, layout, consumed_samples=consumed, **options)
    return micro_batches(batches, steps * layout.num_microbatches)


def test_steps_take_the_samples_of_the_order_one_after_the_other():
    visited = sum(training(BatchLayout(2, 8), 27), ())
    assert Counter(visited) == Counter(list(range(27)) * 8)
    assert sorted(visited[:27]) == sorted(visited[27:54]) == list(range(27))
    assert visited[:27] != visited[27:54]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_of_a_step_are_the_same_at_every_data_parallel_size(size):
    whole = training(BatchLayout(2, 8), 12)
    ranks = [training(layout, 12) for layout in layouts(size)]
    each = 4 // size
    for step in range(12):
        parts = [rank[step * each : (step + 1) * each] for rank in ranks]
        assert all(len(part) == each for part in parts)
        # Round robin: micro-batch k is on rank k % size.
        assert [part[j] for j in range(each) for part in parts] == whole[4 * step : 4 * step + 4]


class Pairs(Dataset):
    """A blend whose samples are 1000 times their source, and their number in it."""

    def __getitem__(self, key):
        return {"tokens": torch.tensor([1000 * key[0] + key[1]])}


def blended(layout: BatchLayout, steps: int, consumed: int = 0, **options):
    order = BlendOrder([27, 5, 40], [Fraction(2, 7), Fraction(1, 7), Fraction(4, 7)], seed=5)
    batches = training_batches(Pairs(), order, layout, consumed_samples=consumed, **options)
    return micro_batches(batches, steps * layout.num_microbatches)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 1, 127, 150])
def test_a_blend_is_the_same_at_every_size_and_resumes_where_it_stopped(size, step):
    """Steps of 8: a block of 1024 samples ends with step 128."""
    whole = sum(blended(BatchLayout(2, 8), 160), ())
    sources = Counter(sample // 1000 for sample in whole[:1024])
    assert [sources[i] for i in range(3)] == [293, 146, 585]  # 1024 times 2/7, 1/7 and 4/7
    each = 4 // size
    ranks = [blended(layout, 160 - step, consumed=8 * step) for layout in layouts(size)]
    merged = [rank[each * s + k] for s in range(160 - step) for k in range(each) for rank in ranks]
    assert sum(merged, ()) == whole[8 * step :]


def test_reading_a_blend_ahead_changes_nothing():
    layout = BatchLayout(2, 8)
    assert blended(layout, 4, consumed=1008, num_workers=2) == blended(layout, 4, consumed=1008)


@pytest.mark.parametrize("step", [0, 1, 3, 4, 11])
@pytest.mark.parametrize("size", [1, 2])
def test_a_resumed_run_continues_where_it_stopped(step, size):
    for layout in layouts(size):
        whole = training(layout, 16)
        resumed = training(layout, 16 - step, consumed=8 * step)
        assert whole[step * layout.num_microbatches :] == resumed


def test_a_run_may_resume_with_another_batch_size():
    whole = sum(training(BatchLayout(2, 8), 6), ())
    resumed = sum(training(BatchLayout(3, 12), 2, consumed=24), ())
    assert resumed == whole[24:48]


def test_reading_ahead_changes_nothing(capfd):
    layout = BatchLayout(2, 8)
    assert training(layout, 4, consumed=24, num_workers=2) == training(layout, 4, consumed=24)
    assert capfd.readouterr().err == ""


class Unreadable(Numbers):
    def __getitem__(self, index):
        raise DataError("`text.bin` has a token id 5000; ids must be below 4096.")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_sample_is_the_same_from_a_worker(num_workers):
    pool = Unreadable(100)
    batches = training_batches(pool, EpochOrder(100, 1), BatchLayout(2, 8), num_workers=num_workers)
    with pytest.raises(DataError) as caught:
        next(batches)
    assert str(caught.value) == "`text.bin` has a token id 5000; ids must be below 4096."


def test_the_end_of_a_worker_is_told_in_a_sentence():
    before = set(multiprocessing.active_children())
    batches = training_batches(Numbers(100), EpochOrder(100, 1), BatchLayout(2, 8), num_workers=1)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    # torch's handler raises the same error wherever the main process is, such as in pytest.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        worker.kill()
        worker.join()
        with pytest.raises(RuntimeError) as caught:
            for _ in batches:
                pass
    finally:
        signal.signal(signal.SIGCHLD, handler)
    assert ended_worker(caught.value).startswith(f"the data worker {worker.pid} ")
    assert ended_worker(RuntimeError("another error")) is None


def test_batches_are_stacked_samples(make_pool):
    pool = make_pool()
    batch = next(training_batches(pool, EpochOrder(len(pool), 0), BatchLayout(3, 6)))
    assert set(batch) == {"tokens", "labels", "loss_mask", "position_ids"}
    for name, tensor in batch.items():
        assert tensor.shape == (3, 32)
        assert tensor.dtype == (torch.float32 if name == "loss_mask" else torch.int64)
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert len({tuple(row.tolist()) for row in batch["tokens"]}) == 3


@pytest.mark.parametrize("num_samples", [5, 12, 23, 24, 25])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_evaluation_counts_every_sample_once(num_samples, size):
    counts, lengths = Counter(), set()
    for layout in layouts(size, micro=2, batch=12):
        batches = list(evaluation_batches(Numbers(num_samples), layout, eval_iters=None))
        lengths.add(len(batches))
        for batch in batches:
            assert batch["tokens"].shape == (2, 1)
            counts.update(batch["tokens"][batch["loss_mask"] == 1].tolist())
    assert counts == Counter(range(num_samples))
    steps = num_evaluation_steps(Numbers(num_samples), layout, None)
    assert lengths == {steps * layout.num_microbatches}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_evaluation_of_part_of_a_set_is_the_same_at_every_data_parallel_size(size):
    seen = set()
    for layout in layouts(size, micro=2, batch=12):
        batches = micro_batches(evaluation_batches(Numbers(100), layout, eval_iters=2))
        assert len(batches) == 2 * layout.num_microbatches
        assert batches == micro_batches(evaluation_batches(Numbers(100), layout, eval_iters=2))
        seen.update(batches)
    assert seen == set(
        micro_batches(evaluation_batches(Numbers(100), BatchLayout(2, 12), eval_iters=2))
    )
    assert len({sample for batch in seen for sample in batch}) == 24
    assert max(sample for batch in seen for sample in batch) > 60  # not only the beginning


def test_evaluation_iterations_end_with_the_set():
    layout = BatchLayout(2, 4)
    assert num_evaluation_steps(Numbers(9), layout, 2) == 2
    assert num_evaluation_steps(Numbers(9), layout, 100) == 3
    assert len(list(evaluation_batches(Numbers(9), layout, eval_iters=100))) == 6


def test_evaluation_covers_every_label_of_a_real_file(make_pool, prefix):
    num_tokens = prefix.with_suffix(".bin").stat().st_size // 2
    masks = [
        batch["loss_mask"].sum().item()
        for layout in layouts(3, micro=2, batch=12)
        for batch in evaluation_batches(make_pool(Split.valid), layout, eval_iters=None)
    ]
    assert sum(masks) == num_tokens - 1


def test_iterating_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    training(BatchLayout(2, 8), 2)
    list(evaluation_batches(Numbers(9), BatchLayout(2, 4), eval_iters=None))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_global_batch_that_cannot_be_cut_evenly_is_refused():
    message = r"global_batch_size` \(8\).*micro_batch_size` \(2\).*data-parallel size \(3\)"
    with pytest.raises(ConfigError, match=message):
        BatchLayout(2, 8, 0, 3)
