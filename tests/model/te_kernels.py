"""Transformer Engine's kernels in torch, as far as training a small model calls them.

With these its own autograd functions, quantizers and contexts run on CPU: what is compared then is
everything between the engine and the kernels, not the kernels. FP8 is per tensor.
"""

from __future__ import annotations

import enum
import functools
import importlib
import os

import torch

from megapoly.platform.engine_workarounds import _TorchWithoutCuda
from megapoly.testing.transformer_engine import called_by_transformer_engine

FLOAT8 = {"kFloat8E4M3": torch.float8_e4m3fn, "kFloat8E5M2": torch.float8_e5m2}
MODULES_WITH_CUDA_LITERALS = (
    "quantization",
    "module.base",
    "cpp_extensions.gemm",
    "tensor.float8_tensor",
    "triton.permutation",
)
unit = 16  # by which cuBLAS wants every axis of an FP8 matrix to divide
quantized: list[torch.dtype] = []  # dtype of every tensor that was cast to FP8


def install():
    """Let Transformer Engine's checks and defaults of a device see the CPU."""
    for name in MODULES_WITH_CUDA_LITERALS:
        module = importlib.import_module(f"transformer_engine.pytorch.{name}")
        module.torch = _TorchWithoutCuda()
    os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"  # scales of delayed scaling, in torch
    torch.cuda.is_current_stream_capturing = lambda: False
    on_gpu = torch.Tensor.is_cuda
    torch.Tensor.is_cuda = property(
        lambda self: on_gpu.__get__(self) or called_by_transformer_engine()
    )
    gemm = importlib.import_module("transformer_engine.pytorch.cpp_extensions.gemm")
    gemm.get_cublas_workspace = lambda device, ub, grouped: (
        [torch.empty(1)] if grouped else torch.empty(1)
    )
    gemm.get_sm_count = lambda: 1
    gemm._empty_tensor = lambda: torch.empty(0)
    recomputation = importlib.import_module("transformer_engine.pytorch.distributed")
    recomputation._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    recomputation._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    permutation = importlib.import_module("transformer_engine.pytorch.triton.permutation")
    for name, kernel in vars(permutation).items():
        if hasattr(kernel, "configs"):
            setattr(permutation, name, Untuned(kernel))
    attention = importlib.import_module("transformer_engine.pytorch.attention")
    attention.DotProductAttention.forward = causal_attention


class Untuned:
    """A Triton kernel with the first of its configurations, which nothing here could time."""

    def __init__(self, tuned):
        self.tuned = tuned

    def __getitem__(self, grid):
        return functools.partial(self.tuned.fn[grid], **self.tuned.configs[0].kwargs)


def causal_attention(self, query, key, value, attention_mask=None, **settings):
    """[s, b, heads, d] -> [s, b, heads * d], for what stands for flash-attn and cuDNN."""
    assert settings["attn_mask_type"] == "causal"
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    return output.permute(2, 0, 1, 3).flatten(2)


def values(tensor):
    """A tensor, or what one in FP8 stands for."""
    if isinstance(tensor, torch.Tensor) and not hasattr(tensor, "_scale_inv"):
        return tensor
    data = tensor._transpose.flatten(1).t() if tensor._data is None else tensor._data
    return data.view(FLOAT8[tensor._fp8_dtype.name]).float() * tensor._scale_inv


def product(a, transa, b, transb, out, dtype, accumulate):
    a, b = values(a), values(b)
    lead = b.shape[:-1]
    a, b = a.flatten(0, -2), b.flatten(0, -2)
    result = (b.t() if transb else b).float() @ (a.t() if transa else a).float()
    if not transb:
        result = result.view(*lead, -1)
    if out is None:
        return result.to(dtype)
    return out.add_(result.view(out.shape)) if accumulate else out.copy_(result.view(out.shape))


def generic_gemm(
    a, transa, b, transb, out, quantizer, dtype, bias, bias_dtype, gelu, *others, **ub
):
    assert quantizer is None and bias is None and not gelu and ub["alpha"] == 1.0
    accumulate = others[4]
    dtype = torch.bfloat16 if dtype is None else TORCH_DTYPE[dtype.name]
    return product(a, transa, b, transb, out, dtype, accumulate), None, None, None


def te_general_grouped_gemm(a, transa, b, transb, out, dtype, splits, bias, *others):
    _, single, *_ = others
    accumulate = others[6]
    out = out[0].split(splits) if single else out
    for each in zip(a, b, out, strict=True):
        product(each[0], transa, each[1], transb, each[2], None, accumulate)
    return bias


def rmsnorm_fwd(x, weight, eps, out, quantizer, dtype, sm_margin, zero_centered):
    assert not zero_centered
    scale = (x.float().square().mean(-1) + eps).rsqrt()
    y = (x.float() * scale.unsqueeze(-1) * weight.float()).to(TORCH_DTYPE[dtype.name])
    if quantizer is not None:
        y = quantize(y, quantizer, out)
    elif out is not None:
        y = out.copy_(y)
    return y, None, scale


def rmsnorm_bwd(grad, x, scale, weight, sm_margin, zero_centered):
    normalised = x.float() * scale.unsqueeze(-1)
    grad_weight = (grad.float() * normalised).flatten(0, -2).sum(0)
    grad = grad.float() * weight.float()
    mean = (grad * normalised).mean(-1, keepdim=True)
    return ((grad - normalised * mean) * scale.unsqueeze(-1)).to(x.dtype), grad_weight.to(x.dtype)


def fused_multi_row_padding(rows, out, splits, padded):
    for mine, theirs in zip(rows.split(splits), out.split(padded), strict=True):
        theirs.zero_()[: len(mine)] = mine


def fused_multi_row_unpadding(rows, out, padded, splits):
    for mine, theirs in zip(rows.split(padded), out.split(splits), strict=True):
        theirs.copy_(mine[: len(theirs)])


def fused_rope_forward(x, freqs, *others, sign=1):
    width = freqs.shape[-1]
    turned, rest = x.float().split([width, x.shape[-1] - width], -1)
    first, second = turned.chunk(2, -1)
    rotated = torch.cat([-second, first], -1) * sign
    return torch.cat([turned * freqs.cos() + rotated * freqs.sin(), rest], -1).to(x.dtype)


fused_rope_backward = functools.partial(fused_rope_forward, sign=-1)


def quantize(x, quantizer, out=None, noop=None):
    """To FP8 with one scale: that of earlier tensors, or by this one's largest value."""
    quantized.append(x.dtype)
    assert x.shape[-1] % unit == 0 and x.shape[:-1].numel() % unit == 0, x.shape
    dtype = FLOAT8[quantizer.dtype.name]
    if out is None:
        out = quantizer.make_empty(x.shape, dtype=x.dtype, device=x.device)
    largest = x.abs().max().float() if x.numel() else torch.zeros(())
    if type(quantizer).__name__ == "Float8Quantizer":
        quantizer.amax.copy_(torch.maximum(quantizer.amax, largest))
        scale = quantizer.scale.clone()
    else:
        if quantizer.with_amax_reduction:
            group = quantizer.amax_reduction_group
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
        scale = torch.where(largest > 0, torch.finfo(dtype).max / largest, 1.0)
    largest = torch.finfo(dtype).max
    data = (x.float() * scale).clamp(-largest, largest).to(dtype).view(torch.uint8)
    if quantizer.rowwise_usage:
        out._data = data
    if quantizer.columnwise_usage:
        out._transpose, out._transpose_invalid = fp8_transpose(data, None), False
    out._scale_inv = (1 / scale).reshape(1)
    return out


def fp8_transpose(data, dtype, *, out=None):
    """[.., columns] -> [columns, ..]."""
    transpose = data.movedim(-1, 0).contiguous()
    return transpose if out is None else out.copy_(transpose)


def split_quantize(x, splits, quantizers):
    return [quantize(rows, each) for rows, each in zip(x.split(splits), quantizers, strict=True)]


def dequantize(tensor, dtype):
    return values(tensor).to(TORCH_DTYPE[dtype.name])


TORCH_DTYPE = {"kFloat32": torch.float32, "kBFloat16": torch.bfloat16}
# Places of tensors in FP8 metadata.
_PLACES = [f"GEMM{i}_{kind}" for i in (1, 2, 3) for kind in ("INPUT", "WEIGHT", "OUTPUT")]
_GRAD_PLACES = [f"GRAD_{kind}{i}" for i in (1, 2, 3) for kind in ("OUTPUT", "INPUT")]
KERNELS = dict(
    fp8_transpose=fp8_transpose,
    get_cublasLt_version=lambda: 120900,
    FP8FwdTensors=enum.IntEnum("FP8FwdTensors", _PLACES, start=0),
    FP8BwdTensors=enum.IntEnum("FP8BwdTensors", _GRAD_PLACES, start=0),
    generic_gemm=generic_gemm,
    te_general_grouped_gemm=te_general_grouped_gemm,
    rmsnorm_fwd=rmsnorm_fwd,
    rmsnorm_bwd=rmsnorm_bwd,
    fused_multi_row_padding=fused_multi_row_padding,
    fused_multi_row_unpadding=fused_multi_row_unpadding,
    fused_rope_forward=fused_rope_forward,
    fused_rope_backward=fused_rope_backward,
    quantize=quantize,
    split_quantize=split_quantize,
    dequantize=dequantize,
)
