"""Forms of PolyNorm and PolyReLU that ``operators.py`` compares, and their exact results.

Every form gets the same tensors as leaves of a separate graph. Its output and gradients are
compared with the same formula in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megapoly import ops
from megapoly.errors import UnavailableError
from megapoly.ops.backends import compiler_missing, resolve_backend
from megapoly.polynomial import DEFAULT_EPS, Backend

EPS = DEFAULT_EPS
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPERATORS = ("polynorm", "polyrelu")
OTHERS = ("eager", "compile", "liger", "swiglu")
# Rows whose exact results are computed at once: float64 and autograd need about 100 bytes for each
# element.
EXACT_ROWS = 1024

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One comparison of operators.

    Args:
        operator: ``polynorm`` or ``polyrelu``.
        order: highest power.
        rows: tokens.
        width: FFN width.
        dtype: a key of ``DTYPES``.
        num_experts: number of coefficient sets, for rows sorted by expert; None for a dense layer.
    """

    operator: str
    order: int
    rows: int
    width: int
    dtype: str
    num_experts: int | None = None

    def __str__(self) -> str:
        experts = f", {self.num_experts} experts" if self.num_experts else ""
        shape = f"{self.rows} x {self.width}"
        return f"{self.operator} of order {self.order}, {shape}, {self.dtype}{experts}"


@dataclass
class Inputs:
    """Tensors of a case; the last four are None for a dense layer.

    Args:
        x: [rows, width].
        up: [rows, width], SwiGLU's second input.
        grad_output: [rows, width].
        coefficients: [order + 1] or [experts, order + 1], fp32, ascending powers.
        probs: [rows], fp32, the router's probabilities.
        offsets: [experts + 1], int32: expert e has the rows offsets[e] to offsets[e + 1].
        expert: [rows], the expert of each row.
    """

    x: Tensor
    up: Tensor
    grad_output: Tensor
    coefficients: Tensor
    probs: Tensor | None = None
    offsets: Tensor | None = None
    expert: Tensor | None = None


@dataclass
class Candidate:
    """A form that is ready to run.

    Args:
        name: for the table.
        leaves: inputs of the gradients, by the name under which results are compared.
        forward: function that computes the output.
        exact: results in float64.
        num_tensors: tensors of the size of ``x`` that forward and backward must at least move.
        to_exact_names: converts results to the form of ``exact`` if its parameters differ.
    """

    name: str
    leaves: dict[str, Tensor]
    forward: Callable[[], Tensor]
    exact: Results
    # Forward reads x and writes y; backward reads x and dy and writes dx.
    num_tensors: tuple[int, int] = (2, 3)
    to_exact_names: Callable[[Results], Results] = dict

    def results(self, grad_output: Tensor) -> Results:
        """Return output and gradients, by the names of ``exact``."""
        output = self.forward()
        # A copy: Liger-Kernel writes dx over it.
        gradients = torch.autograd.grad(output, list(self.leaves.values()), grad_output.clone())
        named = {f"grad_{n}": g for n, g in zip(self.leaves, gradients, strict=True)}
        return self.to_exact_names({"output": output.detach(), **named})

    def errors(self, grad_output: Tensor) -> dict[str, float]:
        """Return the largest difference from ``exact`` over its largest value, for each result."""
        results = self.results(grad_output)
        return {name: largest_error(results[name], exact) for name, exact in self.exact.items()}

    def saved_bytes(self) -> int:
        """Return the bytes that forward keeps for backward, without learned parameters."""
        learned = [leaf for name, leaf in self.leaves.items() if name in LEARNED]
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = self.forward()  # keeps saved tensors alive, so that no address is reused
        for leaf in learned:
            sizes.pop(leaf.untyped_storage().data_ptr(), None)
        del output
        return sum(sizes.values())


LEARNED = ("coefficients", "weight", "bias")


def largest_error(value: Tensor, exact: Tensor) -> float:
    """Return the largest difference over the largest exact value; NaN if a value is NaN."""
    return ((value.double() - exact).abs().max() / exact.abs().max()).item()


def polynorm_form(
    x: Tensor, coefficients: Tensor, expert: Tensor | None = None, probs: Tensor | None = None
) -> Tensor:
    """Compute a0 + a1 n(x) + .. + ar n(x^r) like the authors' code: a power, then its norm.

    It computes in fp32 (fp64 for fp64); the output has the dtype of ``x``.
    """
    wide = _wide(x)
    constant, *factors = _coefficients_of_rows(coefficients, expert)
    terms = (a * _normalised(_power(wide, k)) for k, a in enumerate(factors, start=1))
    y = sum(terms, start=constant)
    return (y if probs is None else y * probs[:, None]).to(x.dtype)


def polyrelu_form(
    x: Tensor, coefficients: Tensor, expert: Tensor | None = None, probs: Tensor | None = None
) -> Tensor:
    """Compute a0 + a1 h + .. + ar h^r with h = relu(x), power by power, in fp32."""
    h = _wide(x).relu()
    constant, *factors = _coefficients_of_rows(coefficients, expert)
    y = sum((a * _power(h, k) for k, a in enumerate(factors, start=1)), start=constant)
    return (y if probs is None else y * probs[:, None]).to(x.dtype)


def swiglu_form(x: Tensor, up: Tensor) -> Tensor:
    """Compute silu(x) up."""
    return functional.silu(x) * up


FORMS: dict[str, Callable[..., Tensor]] = {"polynorm": polynorm_form, "polyrelu": polyrelu_form}


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _power(x: Tensor, k: int) -> Tensor:
    return x if k == 1 else x.pow(k)


def _normalised(v: Tensor) -> Tensor:
    return v * (v.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()


def _coefficients_of_rows(coefficients: Tensor, expert: Tensor | None) -> tuple[Tensor, ...]:
    """Return a0, a1, .., each [1] or [rows, 1].

    ``unbind`` has one backward node; indexing would have one for each coefficient.
    """
    a = coefficients if expert is None else coefficients[expert]
    return a.unsqueeze(-2).unbind(-1)


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Return random tensors, and coefficients that all differ so that a mix-up shows."""
    generator = torch.Generator(device).manual_seed(0)

    def normal() -> Tensor:
        x = torch.randn(case.rows, case.width, generator=generator, device=device)
        return x.to(DTYPES[case.dtype])

    coefficients = torch.arange(1.0, case.order + 2, device=device) / case.order
    inputs = Inputs(normal(), normal(), normal(), coefficients)
    if case.num_experts:
        set_of_expert = torch.arange(case.num_experts, device=device)[:, None]
        inputs.coefficients = coefficients + 0.1 * set_of_expert
        inputs.probs = torch.rand(case.rows, generator=generator, device=device)
        inputs.offsets = uneven_offsets(case.rows, case.num_experts).to(device)
        inputs.expert = torch.arange(case.num_experts, device=device).repeat_interleave(
            inputs.offsets.diff()
        )
    return inputs


def uneven_offsets(num_rows: int, num_experts: int) -> Tensor:
    """Return the first row of each expert and the end; the share of expert e is e + 1."""
    parts = torch.arange(num_experts + 1)
    parts = parts * (parts + 1) // 2
    return (num_rows * parts // parts[-1]).int()


def exact_results(
    form: Callable[..., Tensor],
    parameters: Mapping[str, Tensor],
    of_rows: Mapping[str, Tensor],
    grad_output: Tensor,
) -> Results:
    """Compute output and gradients of a form in float64.

    Args:
        form: takes all tensors by name.
        parameters: tensors that are the same for every row.
        of_rows: tensors whose first dimension is rows; integers have no gradient.
        grad_output: [rows, width].

    Returns:
        ``output``, and ``grad_NAME`` for each tensor that is not of integers.
    """
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in parameters.items()}
    blocks: dict[str, list[Tensor]] = {}
    for start in range(0, len(grad_output), EXACT_ROWS):
        rows = slice(start, start + EXACT_ROWS)
        block = {name: _exact_leaf(tensor[rows]) for name, tensor in of_rows.items()}
        leaves = {n: t for n, t in (block | wide).items() if t.requires_grad}
        output = form(**block, **wide)
        gradients = torch.autograd.grad(output, list(leaves.values()), grad_output[rows].double())
        blocks.setdefault("output", []).append(output.detach())
        for name, gradient in zip(leaves, gradients, strict=True):
            blocks.setdefault(f"grad_{name}", []).append(gradient)
    summed = {f"grad_{name}" for name in parameters}
    return {n: torch.stack(b).sum(0) if n in summed else torch.cat(b) for n, b in blocks.items()}


def _exact_leaf(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.double().requires_grad_() if tensor.is_floating_point() else tensor


def make_candidates(
    case: Case, inputs: Inputs, backends: Sequence[Backend], others: Sequence[str]
) -> tuple[list[Candidate], dict[str, str]]:
    """Return all candidates, and the reasons why others are not available."""
    form, device = FORMS[case.operator], inputs.x.device
    rows = {"x": inputs.x, "probs": inputs.probs, "expert": inputs.expert}
    exact = exact_results(
        form,
        {"coefficients": inputs.coefficients},
        {name: tensor for name, tensor in rows.items() if tensor is not None},
        inputs.grad_output,
    )
    candidates = [
        _operator_candidate(case, inputs, backend, exact)
        for backend in dict.fromkeys(resolve_backend(name, device.type) for name in backends)
    ]
    makers: dict[str, Callable[[], Candidate]] = {
        "eager": lambda: _form_candidate("eager", form, inputs, exact),
        "compile": lambda: _compiled_candidate(form, inputs, exact),
        "liger": lambda: _liger_candidate(case, inputs, exact),
        "swiglu": lambda: _swiglu_candidate(inputs),
    }
    missing = {}
    for name in dict.fromkeys(others):
        try:
            candidates.append(makers[name]())
        except UnavailableError as error:
            missing[name] = str(error)
    return candidates, missing


def _leaves(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {n: t.detach().requires_grad_() for n, t in tensors.items() if t is not None}


def _operator_candidate(case: Case, inputs: Inputs, backend: Backend, exact: Results) -> Candidate:
    leaves = _leaves(x=inputs.x, coefficients=inputs.coefficients, probs=inputs.probs)
    operator: Callable[..., Tensor] = getattr(ops, case.operator)
    keywords: dict[str, Any] = {"offsets": inputs.offsets, "backend": backend}
    return Candidate(f"megapoly, {backend}", leaves, lambda: operator(**leaves, **keywords), exact)


def _form_candidate(
    name: str, form: Callable[..., Tensor], inputs: Inputs, exact: Results
) -> Candidate:
    leaves = _leaves(x=inputs.x, coefficients=inputs.coefficients, probs=inputs.probs)
    return Candidate(name, leaves, lambda: form(**leaves, expert=inputs.expert), exact)


def _compiled_candidate(form: Callable[..., Tensor], inputs: Inputs, exact: Results) -> Candidate:
    reason = compiler_missing(inputs.x.device.type)
    if reason:
        raise UnavailableError(reason)
    # The compiler keeps a few variants of a function and runs further ones uncompiled, silently.
    torch.compiler.reset()
    # Compiling each shape separately gives the fastest code.
    compiled = torch.compile(form, dynamic=False, fullgraph=True)
    return _form_candidate("torch.compile", compiled, inputs, exact)


def _liger_candidate(case: Case, inputs: Inputs, exact: Results) -> Candidate:
    if inputs.x.device.type != "cuda":
        raise UnavailableError(f"runs on CUDA, not on {inputs.x.device.type}")
    if case.operator != "polynorm" or case.order != 3 or case.num_experts:
        raise UnavailableError("has only PolyNorm of order 3 with one set of coefficients")
    return liger_candidate(inputs, exact)


def liger_candidate(inputs: Inputs, exact: Results) -> Candidate:
    """Return Liger-Kernel's module with its defaults: the highest power first, a0 separate."""
    try:
        from liger_kernel.transformers.poly_norm import LigerPolyNorm
    except ImportError as error:
        raise UnavailableError(
            f"cannot be imported ({error}): `pip install liger-kernel`"
        ) from None
    module = LigerPolyNorm(eps=EPS).to(inputs.x.device)
    with torch.no_grad():
        module.weight.copy_(inputs.coefficients[1:].flip(0))
        module.bias.copy_(inputs.coefficients[0])
    leaves = _leaves(x=inputs.x) | {"weight": module.weight, "bias": module.bias}

    def ascending(results: Results) -> Results:
        weight, bias = results.pop("grad_weight"), results.pop("grad_bias")
        return results | {"grad_coefficients": torch.cat([bias.reshape(1), weight.flip(0)])}

    return Candidate("liger", leaves, lambda: module(leaves["x"]), exact, to_exact_names=ascending)


def _swiglu_candidate(inputs: Inputs) -> Candidate:
    """Return SwiGLU, which reads x and u and writes y, then reads x, u, dy and writes dx, du."""
    leaves = _leaves(x=inputs.x, up=inputs.up)
    exact = exact_results(swiglu_form, {}, leaves, inputs.grad_output)
    return Candidate("swiglu", leaves, lambda: swiglu_form(**leaves), exact, num_tensors=(3, 5))
