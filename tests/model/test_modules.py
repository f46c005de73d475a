"""Norms, attention and grouped linear maps against plain formulas in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from layouts import small_config
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType

from megapoly.model.attention import ScaledDotProductAttention
from megapoly.model.grouped_linear import ColumnParallelGroupedLinear, RowParallelGroupedLinear
from megapoly.model.norms import ProjectionRMSNorm, RMSNorm
from megapoly.model.transformer_config import transformer_config
from megapoly.platform.device import select_platform
from megapoly.testing import run_on_ranks
from megapoly.training.distributed import process_groups

EPS = 1e-2  # large enough to matter
TENSOR_PARALLEL = {"parallel.tensor_model_parallel_size": 2}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).to(dtype)


def rms_norm(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_rms_norm(sequence_parallel):
    engine = transformer_config(
        small_config(TENSOR_PARALLEL if sequence_parallel else {}), on_cpu=True
    )
    norm = RMSNorm(engine, 32, eps=EPS).double()
    norm.weight.data.copy_(normal(32, seed=1))
    x = normal(3, 2, 32)
    torch.testing.assert_close(norm(x), rms_norm(x, norm.weight))
    assert RMSNorm(engine, 32).weight.sequence_parallel is sequence_parallel


def projection_norm():
    """Output and gradients of one rank's heads: of 4 heads, 8 wide, and a random gradient."""
    config = small_config(TENSOR_PARALLEL)
    with process_groups(config, select_platform("cpu")):
        rank = parallel_state.get_tensor_model_parallel_rank()
        norm = ProjectionRMSNorm(transformer_config(config, on_cpu=True), 8, EPS, num_heads=4)
        norm.weight.data.copy_(normal(32, seed=1).chunk(2)[rank])
        x = normal(3, 2, 4, 8, dtype=torch.float32).chunk(2, dim=2)[rank].requires_grad_()
        y = norm(x)
        y.backward(normal(3, 2, 4, 8, seed=2, dtype=torch.float32).chunk(2, dim=2)[rank])
        return y.detach(), x.grad, norm.weight.grad


def test_projection_norm_is_over_the_heads_of_all_ranks():
    outputs, grad_inputs, grad_weights = zip(*run_on_ranks(projection_norm, 2), strict=True)
    x, weight = normal(3, 2, 4, 8).requires_grad_(), normal(32, seed=1).requires_grad_()
    y = rms_norm(x.flatten(-2), weight).view_as(x)
    y.backward(normal(3, 2, 4, 8, seed=2))
    for actual, expected in (
        (torch.cat(outputs, dim=2), y.detach()),
        (torch.cat(grad_inputs, dim=2), x.grad),
        (torch.cat(grad_weights), weight.grad),
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def attention(**overrides):
    engine = transformer_config(small_config({}), on_cpu=True)
    arguments = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    return ScaledDotProductAttention(engine, **(arguments | overrides))


def plain_attention(query, key, value, scale):
    """Causal softmax attention with the [s, s] matrix written out, one head after the other."""
    seq_length, _, heads, _ = query.shape
    share = heads // key.shape[2]
    future = torch.ones(seq_length, seq_length).triu(1).bool()
    outputs = []
    for head in range(heads):
        q, k, v = query[:, :, head], key[:, :, head // share], value[:, :, head // share]
        scores = torch.einsum("sbd,tbd->bst", q, k) * scale
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        outputs.append(torch.einsum("bst,tbd->sbd", weights, v))
    return torch.cat(outputs, dim=-1)


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention(groups, scale):
    inputs = [normal(6, 2, heads, 8, seed=heads) for heads in (4, groups, groups)]
    leaves = [[tensor.clone().requires_grad_() for tensor in inputs] for _ in range(2)]
    actual = attention(softmax_scale=scale)(*leaves[0], attention_mask=None)
    expected = plain_attention(*leaves[1], scale or 8**-0.5)
    torch.testing.assert_close(actual, expected)
    grad_output = normal(6, 2, 32, seed=9)
    actual.backward(grad_output)
    expected.backward(grad_output)
    for a, b in zip(*leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


CONTEXT_PARALLEL = {"parallel.context_parallel_size": 2, "training.seq_length": 16}


def context_parallel_attention(kind, groups):
    """Output and gradients of one rank's half of the sequence, and which half it is."""
    config = small_config(CONTEXT_PARALLEL | {"parallel.cp_comm_type": kind})
    with process_groups(config, select_platform("cpu")):
        groups_of_engine = ProcessGroupCollection.use_mpu_process_groups()
        core = ScaledDotProductAttention(
            transformer_config(config, on_cpu=True),
            1,
            AttnMaskType.causal,
            "self",
            cp_comm_type=kind,
            pg_collection=groups_of_engine,
        )
        rank = parallel_state.get_context_parallel_rank()
        mine = torch.cat([torch.arange(16).chunk(4)[piece] for piece in (rank, 3 - rank)])
        inputs = [normal(16, 2, heads, 8, seed=heads)[mine] for heads in (4, groups, groups)]
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = core(*leaves, attention_mask=None)
        output.backward(normal(16, 2, 32, seed=9)[mine])
        return mine, [output.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("kind", ["all_gather", "a2a"])
def test_attention_over_shared_sequences(kind, groups):
    leaves = [normal(16, 2, n, 8, seed=n).requires_grad_() for n in (4, groups, groups)]
    output = plain_attention(*leaves, 8**-0.5)
    output.backward(normal(16, 2, 32, seed=9))
    expected = [output.detach(), *(leaf.grad for leaf in leaves)]
    for mine, actual in run_on_ranks(context_parallel_attention, 2, kind, groups):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e[mine])


def test_attention_refuses_what_it_would_ignore():
    with pytest.raises(ValueError, match="causal"):
        attention(attn_mask_type=AttnMaskType.padding)
    query = normal(6, 2, 4, 8)
    for ignored in ({"attention_bias": query}, {"packed_seq_params": object()}):
        with pytest.raises(ValueError, match="not supported"):
            attention()(query, query, query, attention_mask=None, **ignored)


class OneRank:
    """A process group of one."""

    def size(self):
        return 1

    def rank(self):
        return 0


@pytest.mark.parametrize("linear", [ColumnParallelGroupedLinear, RowParallelGroupedLinear])
def test_grouped_linear(linear):
    splits = [3, 0, 4]
    module = linear(
        3,
        input_size=8,
        output_size=5,
        config=transformer_config(small_config({}), on_cpu=True),
        init_method=lambda weight: None,
        bias=False,
        skip_bias_add=False,
        is_expert=True,
        pg_collection=SimpleNamespace(expt_tp=OneRank(), ep=OneRank(), expt_dp=OneRank()),
    ).double()
    weights = [normal(5, 8, seed=i).requires_grad_() for i in range(3)]
    for i, weight in enumerate(weights):
        getattr(module, f"weight{i}").data.copy_(weight)
    x, y = (normal(7, 8, seed=4).requires_grad_() for _ in range(2))
    expected = torch.cat([F.linear(r, w) for r, w in zip(y.split(splits), weights, strict=True)])
    actual, bias = module(x, splits)
    assert bias is None
    torch.testing.assert_close(actual, expected)

    strided = normal(5, 7, seed=5).t()
    actual.backward(strided)
    expected.backward(strided)
    torch.testing.assert_close(x.grad, y.grad)
    for i in (0, 2):
        torch.testing.assert_close(getattr(module, f"weight{i}").grad, weights[i].grad)
    assert torch.equal(module.weight1.grad, torch.zeros(5, 8, dtype=torch.float64))
