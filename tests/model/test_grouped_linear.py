"""Products of all experts: both forms against float64, and where the weights lie."""

from __future__ import annotations

import functools
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from layouts import EXPERTS, random_batches, small_config
from torch.testing import assert_close

from megapoly.model import grouped_linear
from megapoly.model.builder import unwrap
from megapoly.model.grouped_linear import (
    GroupedLinear,
    GroupedMatmul,
    LoopedMatmul,
    grouped_mm_obstacle,
    stacked,
)
from megapoly.platform.device import select_platform
from megapoly.testing import run_on_ranks
from megapoly.training.distributed import process_groups
from megapoly.training.state import build_state
from megapoly.training.step import run_microbatches

IN, OUT = 16, 24
SPLITS = {
    "uneven": [5, 1, 17, 3],
    "idle experts": [0, 9, 0, 0],
    "no rows": [0, 0, 0, 0],
    "one expert": [7],
}
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


def operands(splits, dtype):
    """Rows, weights and the output's gradient, small enough for absolute tolerances."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(splits), IN), *[(OUT, IN)] * len(splits), (sum(splits), OUT)]
    x, *weights, grad = ((torch.rand(s, generator=generator) - 0.5).to(dtype) for s in shapes)
    return x, weights, grad


def by_hand(splits, x, weights, grad):
    """Output and gradients of rows and weights, in float64."""
    y, grad_x, grad_weights = [], [], []
    begin = 0
    for number, weight in zip(splits, weights, strict=True):
        rows = slice(begin, begin + number)
        y.append(x[rows].double() @ weight.double().T)
        grad_x.append(grad[rows].double() @ weight.double())
        grad_weights.append(grad[rows].double().T @ x[rows].double())
        begin += number
    return [torch.cat(y), torch.cat(grad_x), *grad_weights]


def output_and_gradients(matmul, splits, x, weights, grad):
    x, *weights = (tensor.clone().requires_grad_() for tensor in (x, *weights))
    y = matmul.apply(x, splits, *weights)
    return [y.detach(), *torch.autograd.grad(y, (x, *weights), grad)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("matmul", [LoopedMatmul, GroupedMatmul])
def test_output_and_gradients(matmul, splits, dtype):
    case = operands(splits, dtype)
    actual, expected = output_and_gradients(matmul, splits, *case), by_hand(splits, *case)
    for value, exact in zip(actual, expected, strict=True):
        assert value.dtype == dtype
        assert_close(value.double(), exact, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
    for number, grad_weight in zip(splits, actual[2:], strict=True):
        assert grad_weight.any() == (number > 0)


@pytest.mark.parametrize("matmul", [LoopedMatmul, GroupedMatmul])
def test_rows_and_gradient_may_be_transposed_views(matmul):
    splits = SPLITS["uneven"]
    x, weights, grad = operands(splits, torch.float32)
    views = x.T.contiguous().T, weights, grad.T.contiguous().T
    expected = output_and_gradients(matmul, splits, x, weights, grad)
    assert_close(output_and_gradients(matmul, splits, *views), expected)


@pytest.mark.parametrize(
    ("matmul", "error"), [(LoopedMatmul, RuntimeError), (GroupedMatmul, AssertionError)]
)
def test_every_row_has_an_expert(matmul, error):
    x, weights, _ = operands([2, 3], torch.float32)
    with pytest.raises(error):
        matmul.apply(x, [2, 2], *weights)


def test_idle_expert_has_no_gradient_whatever_the_kernel_leaves_there(monkeypatch):
    def without_idle_groups(a, b, *, offs):
        y = F_grouped_mm(a, b, offs=offs)
        if y.dim() == 3:
            y[torch.diff(offs, prepend=offs.new_zeros(1)) == 0] = torch.nan
        return y

    F_grouped_mm = F.grouped_mm  # noqa: N806
    monkeypatch.setattr(F, "grouped_mm", without_idle_groups)
    splits = SPLITS["idle experts"]
    _, _, *grads = output_and_gradients(GroupedMatmul, splits, *operands(splits, torch.float32))
    assert [bool(grad.any()) for grad in grads] == [False, True, False, False]


def test_weights_are_stacked_without_a_copy_where_they_lie_evenly():
    buffer = torch.arange(60.0)
    even = [buffer[begin : begin + 6].view(3, 2) for begin in (4, 12, 20)]
    assert torch.equal(stacked(even), torch.stack(even))
    assert stacked(even).data_ptr() == even[0].data_ptr()
    assert stacked(even[:1]).data_ptr() == even[0].data_ptr()
    elsewhere = (-buffer)[20:26].view(3, 2)
    for weights in (even[::-1], [even[0], even[2], even[1]], [*even[:2], elsewhere]):
        assert torch.equal(stacked(weights), torch.stack(weights))


CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "dtype", "shape", "capability", "part"),
    [
        (CUDA, torch.bfloat16, (768, 2048), (9, 0), None),
        (CUDA, torch.bfloat16, (768, 2048), (10, 0), None),
        (torch.device("cpu"), torch.bfloat16, (768, 2048), None, "no faster on cpu"),
        (CUDA, torch.float32, (768, 2048), (9, 0), "float32"),
        (CUDA, torch.bfloat16, (768, 2048), (8, 0), "capability 8"),
        (CUDA, torch.bfloat16, (764, 2048), (9, 0), "divisible by 8, not 764 x 2048"),
    ],
)
def test_grouped_mm_is_taken_where_it_has_a_kernel(
    monkeypatch, device, dtype, shape, capability, part
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    obstacle = grouped_mm_obstacle(device, dtype, shape)
    assert obstacle is None if part is None else part in obstacle


def gradients_and_views(options, obstacle):
    """Gradients of a model, and whether its grouped linears stack their weights without a copy."""
    config = small_config(EXPERTS | options)
    platform = select_platform("cpu")
    messages = []
    with (
        process_groups(config, platform),
        patch.object(grouped_linear, "grouped_mm_obstacle", lambda *_: obstacle),
        patch.object(grouped_linear, "_log_once", functools.cache(lambda *m: messages.append(m))),
    ):
        state = build_state(config, platform, corpus=None)
        state.chunks[0].zero_grad_buffer()
        number = state.layout.num_microbatches
        run_microbatches(state, random_batches(config, state.layout), number, forward_only=False)
        model = unwrap(state.chunks[0])
        gradients = {name: p.main_grad.clone() for name, p in model.named_parameters()}
        linears = [module for module in model.modules() if isinstance(module, GroupedLinear)]
        views = [
            stacked([getattr(linear, f"weight{i}") for i in range(4)]).data_ptr()
            == linear.weight0.data_ptr()
            for linear in linears
        ]
    return gradients, views, messages


@pytest.mark.parametrize("use_distributed_optimizer", [False, True])
def test_model_with_grouped_mm(use_distributed_optimizer):
    options = {"parallel.use_distributed_optimizer": use_distributed_optimizer}
    looped, _, loop_messages = run_on_ranks(gradients_and_views, 1, options, "a reason")[0]
    grouped, views, messages = run_on_ranks(gradients_and_views, 1, options, None)[0]
    assert loop_messages == [("products of experts: torch.mm for each, %s", "a reason")]
    assert messages == [("products of experts: torch.nn.functional.grouped_mm",)]
    assert views == [True] * 4  # two of each layer, in the engine's buffers
    for name, gradient in looped.items():
        assert_close(grouped[name], gradient, rtol=1e-5, atol=1e-6)
