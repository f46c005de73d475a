"""The replacements of CUDA and nccl behave as they do."""

from __future__ import annotations

import queue

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import checkpoint, get_cuda_rng_tracker

from megapoly.config.resolve import resolve
from megapoly.config.schema import Config
from megapoly.ops import polynorm
from megapoly.platform import engine_workarounds
from megapoly.platform.device import select_platform
from megapoly.platform.machine import CPU
from megapoly.testing import run_on_ranks
from megapoly.training.distributed import process_groups


def gather(lengths):
    """Gather rows from all ranks; the rows of rank r hold r + 1."""
    select_platform("cpu")
    dist.init_process_group("gloo")
    try:
        own = torch.full((lengths[dist.get_rank()], 2), dist.get_rank() + 1.0)
        received = [torch.full((length, 2), -1.0) for length in lengths]
        dist.all_gather(received, own)
        return received
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("lengths", [(3, 1), (0, 2), (2, 2)])
def test_all_gather_takes_uneven_first_dimensions(lengths):
    for received in run_on_ranks(gather, 2, lengths):
        for rank, rows in enumerate(received):
            assert torch.equal(rows, torch.full((lengths[rank], 2), rank + 1.0))


def recompute_polynorm():
    """Run PolyNorm on rows that two ranks share, with the engine's recomputation and without."""
    platform = select_platform("cpu")
    config = Config()
    config.training.train_iters = 1
    config = resolve(config, tokenizer_vocab_size=8, machine=CPU)
    calls = []
    with process_groups(config, platform):
        all_reduce = dist.all_reduce

        def counted(tensor, *args, **kwargs):
            calls.append(tuple(tensor.shape))
            return all_reduce(tensor, *args, **kwargs)

        dist.all_reduce = counted
        generator = torch.Generator().manual_seed(dist.get_rank())
        x = torch.randn(5, 8, generator=generator)
        a = torch.tensor([0.5, 1.0, -2.0, 0.25])
        results = []
        for recomputes in (True, False):
            calls.clear()
            leaf = x.clone().requires_grad_()

            def two_layers(x):
                for _ in range(2):
                    x = polynorm(x, a, group=dist.group.WORLD, backend="reference")
                return x

            y = checkpoint(two_layers, False, leaf) if recomputes else two_layers(leaf)
            y.square().sum().backward()
            results.append((leaf.grad, list(calls)))
        dist.all_reduce = all_reduce
    return results


def test_recomputation_does_not_repeat_the_all_reduce_of_polynorm():
    for (recomputed, calls), (plain, expected_calls) in run_on_ranks(recompute_polynorm, 2):
        assert torch.equal(recomputed, plain)
        assert calls == expected_calls == [(5, 3), (5, 3), (5, 4), (5, 4)]


def uneven_gather_without_waiting():
    select_platform("cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="asynchronous"):
            dist.all_gather([torch.ones(1), torch.ones(2)], torch.ones(1), async_op=True)
    finally:
        dist.destroy_process_group()


def test_uneven_all_gather_cannot_be_asynchronous():
    run_on_ranks(uneven_gather_without_waiting, 1)


def use_tracker():
    select_platform("cpu")
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("named", 7)
    with pytest.raises(ValueError, match="already added"):
        tracker.add("named", 8)
    with pytest.raises(ValueError, match="not added"), tracker.fork("other"):
        pass

    torch.manual_seed(0)
    undisturbed = torch.rand(4)
    torch.manual_seed(0)
    outside, inside = [torch.rand(1)], []
    for _ in range(2):
        with tracker.fork("named"):
            inside.append(torch.rand(1))
        outside.append(torch.rand(1))
    with pytest.raises(RuntimeError, match="inside"), tracker.fork("named"):
        raise RuntimeError("inside")
    outside.append(torch.rand(1))

    named = torch.rand(2, generator=torch.Generator().manual_seed(7))
    return torch.equal(torch.cat(outside), undisturbed), torch.equal(torch.cat(inside), named)


def test_fork_restores_the_state_and_goes_on_where_it_was():
    assert run_on_ranks(use_tracker, 1) == [(True, True)]


def draw():
    """Return numbers that a rank draws by default and from the tensor-parallel stream."""
    config = Config()
    config.parallel.tensor_model_parallel_size = 2
    config.training.train_iters = 1
    config = resolve(config, tokenizer_vocab_size=8, machine=CPU)
    with process_groups(config, select_platform("cpu")):
        assert parallel_state.get_tensor_model_parallel_world_size() == 2
        with get_cuda_rng_tracker().fork():
            forked = torch.rand(3)
        return torch.rand(3), forked


def test_tensor_parallel_ranks_share_the_default_stream_and_not_the_forked_one():
    (default, forked), (other_default, other_forked) = run_on_ranks(draw, 2)
    assert torch.equal(default, other_default)
    assert not torch.equal(forked, other_forked)


def install_again():
    before = dist.all_gather, torch.Tensor.type, torch.cuda.current_device
    engine_workarounds.install_on_cpu()
    assert (dist.all_gather, torch.Tensor.type, torch.cuda.current_device) == before
    return torch.cuda.current_device(), torch.ones(1).type()


def test_installing_again_changes_nothing():
    assert run_on_ranks(install_again, 1) == [(torch.device("cpu"), "torch.FloatTensor")]


def test_saving_starts_no_process_to_hold_a_queue():
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    select_platform("cpu")
    results = filesystem_async._get_write_results_queue()
    assert type(results) is queue.Queue
    assert filesystem_async._get_write_results_queue() is results
