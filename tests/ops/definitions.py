"""The operators as the paper writes them: float64, plain autograd, experts and rows spelled out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


def polynorm_definition(
    x: Tensor,
    coefficients: Tensor,
    *,
    eps: float = 1e-6,
    norm: str = "rms",
    offsets: Tensor | None = None,
    probs: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """a0 + a1 n(x) + .. + ar n(x^r), times probability and gate."""
    a = _of_each_row(coefficients, offsets)
    y = a[..., :1].expand_as(x)
    for k in range(1, a.shape[-1]):
        power = x**k
        square = power**2
        size = square.mean(-1, keepdim=True) if norm == "rms" else square.sum(-1, keepdim=True)
        y = y + a[..., k : k + 1] * power / (size + eps).sqrt()
    return _scaled(y, probs, gate)


def polyrelu_definition(
    x: Tensor,
    coefficients: Tensor,
    *,
    slope: Tensor | None = None,
    offsets: Tensor | None = None,
    probs: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """a0 + a1 h + .. + ar h^r, h = relu(x) or prelu(x), times probability and gate."""
    a = _of_each_row(coefficients, offsets)
    below = torch.zeros(1, dtype=x.dtype) if slope is None else _of_each_row(slope, offsets)
    h = torch.where(x > 0, x, below * x)
    y = a[..., :1].expand_as(x)
    for k in range(1, a.shape[-1]):
        y = y + a[..., k : k + 1] * h**k
    return _scaled(y, probs, gate)


def _of_each_row(parameter: Tensor, offsets: Tensor | None) -> Tensor:
    return parameter if offsets is None else parameter.repeat_interleave(offsets.diff(), dim=0)


def _scaled(y: Tensor, probs: Tensor | None, gate: Tensor | None) -> Tensor:
    y = y if probs is None else y * probs[..., None]
    return y if gate is None else y * gate


def module_operator(kind: type[torch.nn.Module]) -> Callable[..., Tensor]:
    """A module as a function with the arguments of its operator."""

    def call(
        x: Tensor,
        coefficients: Tensor,
        *,
        slope: Tensor | None = None,
        offsets: Tensor | None = None,
        probs: Tensor | None = None,
        gate: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        parameters = {"coefficients": coefficients}
        if slope is not None:
            options["slope"], parameters["slope"] = 0.25, slope
        if offsets is not None:
            options["num_experts"] = coefficients.shape[0]
        module = kind(coefficients.shape[-1] - 1, gated=gate is not None, **options)
        inputs = {"gate": gate, "probs": probs, "offsets": offsets}
        return torch.func.functional_call(module, parameters, (x,), inputs, strict=True)

    return call


@dataclass
class Arguments:
    """Tensors of one call, and the gradient that comes back."""

    x: Tensor
    coefficients: Tensor
    grad_output: Tensor
    slope: Tensor | None = None
    probs: Tensor | None = None
    gate: Tensor | None = None
    offsets: Tensor | None = None

    def columns(self, rank: int, num_ranks: int) -> Arguments:
        """What one of several ranks holds of them."""
        return self._with(
            {
                name: getattr(self, name).chunk(num_ranks, dim=-1)[rank]
                for name in ("x", "gate", "grad_output")
                if getattr(self, name) is not None
            }
        )

    def to(self, dtype: torch.dtype) -> Arguments:
        """Every tensor but the offsets in another dtype."""
        return self._with(
            {
                name: tensor.to(dtype)
                for name, tensor in self._tensors().items()
                if name != "offsets"
            }
        )

    def run(self, operator: Callable[..., Tensor], **options: Any) -> dict[str, Tensor]:
        """``output`` and the gradient of every tensor, by its name."""
        leaves = {
            name: tensor.detach().requires_grad_()
            for name, tensor in self._tensors().items()
            if name not in ("grad_output", "offsets")
        }
        keywords = {
            name: leaf for name, leaf in leaves.items() if name not in ("x", "coefficients")
        }
        if self.offsets is not None:
            keywords["offsets"] = self.offsets
        output = operator(leaves["x"], leaves["coefficients"], **keywords, **options)
        gradients = torch.autograd.grad(output, list(leaves.values()), self.grad_output)
        return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}

    def _tensors(self) -> dict[str, Tensor]:
        pairs = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in pairs.items() if tensor is not None}

    def _with(self, changes: dict[str, Tensor]) -> Arguments:
        return Arguments(**(self._tensors() | changes))


FORMS = {
    "plain": (),
    "gated": ("gate",),
    "routed": ("probs",),
    "experts": ("offsets", "probs"),
    "gated_experts": ("offsets", "probs", "gate"),
    "prelu": ("slope",),
    "prelu_experts": ("slope", "offsets", "probs"),
}
POLYNORM_FORMS = [form for form, names in FORMS.items() if "slope" not in names]


def make_arguments(form: str, *, order: int = 3, shape: tuple[int, ...] = (10, 24)) -> Arguments:
    """Float64 arguments of a form; of its four experts the second has no rows."""
    names = FORMS[form]
    generator = torch.Generator().manual_seed(order)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    rows = shape[0]
    sets = (4,) if "offsets" in names else ()
    return Arguments(
        x=normal(*shape),
        coefficients=normal(*sets, order + 1),
        grad_output=normal(*shape),
        slope=normal(*sets, 1) if "slope" in names else None,
        probs=normal(*shape[:-1]).abs() if "probs" in names else None,
        gate=normal(*shape) if "gate" in names else None,
        offsets=torch.tensor([0, rows // 3, rows // 3, rows - 1, rows], dtype=torch.int32)
        if "offsets" in names
        else None,
    )


def assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12
) -> None:
    """Same names; every tensor within a tolerance relative to its largest entry."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        scale = tensor.abs().max().item() if tensor.numel() else 0.0
        error = (actual[name] - tensor).abs().max().item() if tensor.numel() else 0.0
        assert error <= tolerance * scale, f"{name}: off by {error}, largest entry {scale}"
