"""PolyNorm and PolyReLU as modules: the operators with their coefficients as parameters."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapoly.errors import ShapeError
from megapoly.ops.arguments import check_eps, check_norm, check_order
from megapoly.ops.backends import check_backend
from megapoly.ops.polynorm import polynorm
from megapoly.ops.polyrelu import polyrelu
from megapoly.polynomial import DEFAULT_EPS, DEFAULT_ORDER, Backend, Norm, initial_coefficients


class _PolynomialActivation(torch.nn.Module):
    """Coefficients, gate and state dict of both modules."""

    if TYPE_CHECKING:  # torch types a call of a module as Any

        def __call__(
            self,
            x: Tensor,
            gate: Tensor | None = None,
            *,
            probs: Tensor | None = None,
            offsets: Tensor | None = None,
        ) -> Tensor: ...

    def __init__(
        self,
        order: int,
        num_experts: int | None,
        gated: bool,
        group: dist.ProcessGroup | None,
        deterministic: bool,
        backend: Backend,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_order(order)
        check_backend(backend)
        if num_experts is not None and num_experts < 1:
            raise ValueError(
                f"`num_experts` ({num_experts}) must be at least 1, or None for one set."
            )
        self.order = order
        self.num_experts = num_experts
        self.gated = gated
        self.group = group
        self.deterministic = deterministic
        self.backend: Backend = backend
        self.coefficients = self._new_parameter(order + 1, device, dtype)

    def _new_parameter(
        self, size: int, device: torch.device | str | int | None, dtype: torch.dtype | None
    ) -> torch.nn.Parameter:
        """Make an uninitialised parameter, [size] or [num_experts, size]."""
        sets = () if self.num_experts is None else (self.num_experts,)
        return torch.nn.Parameter(torch.empty(*sets, size, device=device, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set a0 to 0 and a1 .. ar to 1 / r."""
        self.coefficients.copy_(torch.tensor(initial_coefficients(self.order)))

    def forward(
        self,
        x: Tensor,
        gate: Tensor | None = None,
        *,
        probs: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """Activate the output of an FFN's first linear map.

        Args:
            x: [.., d / tp]; of a gated activation without ``gate`` [.., 2 d / tp], the activated
                half first.
            gate: [.., d / tp], multiplies the result; of a gated activation only.
            probs: one per row, multiplied in (the router probability).
            offsets: [num_experts + 1] int32, required with ``num_experts``: first row of each
                expert and then the number of rows, see :func:`megapoly.ops.expert_offsets`.

        Returns:
            [.., d / tp] in the dtype of ``x``.
        """
        if gate is not None and not self.gated:
            raise ValueError(
                "`gate` has no effect in an ungated activation; construct it with gated=True."
            )
        if self.gated and gate is None:
            if x.shape[-1] % 2:
                raise ShapeError(
                    "`x` of a gated activation must be [.., 2 d], the activated half first, got "
                    f"{tuple(x.shape)}; pass `gate` if `x` is the activated half alone."
                )
            x, gate = x.chunk(2, dim=-1)
        return self._activate(x, gate, probs, offsets)

    def _activate(
        self, x: Tensor, gate: Tensor | None, probs: Tensor | None, offsets: Tensor | None
    ) -> Tensor:
        raise NotImplementedError

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load ``coefficients``, or ``weight`` and ``bias`` of the authors' release."""
        names = (f"{prefix}weight", f"{prefix}bias")
        if all(name in state_dict for name in names):
            weight, bias = (state_dict.pop(name) for name in names)
            state_dict[f"{prefix}coefficients"] = torch.cat([bias, weight.flip(-1)], dim=-1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _PolynomialActivation:
        """Copy the parameters and share the process group, which cannot be copied."""
        memo[id(self.group)] = self.group
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def _options(self) -> dict[str, object]:
        """Return options to print, by name; None and False are not printed."""
        return {
            "num_experts": self.num_experts,
            "gated": self.gated,
            "ranks": None if self.group is None else self.group.size(),
            "deterministic": self.deterministic,
            "backend": self.backend,
        }

    def extra_repr(self) -> str:
        """Return the options that ``print`` shows."""
        options = {
            name: v for name, v in self._options().items() if v is not None and v is not False
        }
        return ", ".join(
            f"{name}={value}" for name, value in {"order": self.order, **options}.items()
        )


class PolyNorm(_PolynomialActivation):
    """Weighted sum of powers of the input, each normalised over the whole FFN width.

        y = p (a0 + a1 n(x) + .. + ar n(x^r)) u,   n(v) = v / sqrt(mean(v^2) + eps)

    Source: PolyCom (ICLR 2025), Eq. 3. See :func:`megapoly.ops.polynorm`.

    Args:
        order: highest power r; 2, 3 or 4.
        num_experts: coefficient sets for rows sorted by expert; None: one set for all rows.
        eps: added to the mean square; 1e-30 to 1e6.
        norm: divides a power by its root mean square (``rms``) or its L2 norm (``l2``).
        gated: multiply by a gate u, the second half of the input or a separate input.
        group: ranks that share one row, each with the same number of columns.
        deterministic: give the same bits on 1, 2, 4 and 8 ranks.
        backend: ``auto``, ``reference``, ``compiled`` or ``triton``.
        device: of the coefficients.
        dtype: of the coefficients; operators compute in fp32 whatever it is (fp64 for fp64 inputs).

    Raises:
        ValueError: an option is not valid.

    Note:
        ``coefficients`` is [order + 1] or [num_experts, order + 1], ascending: a0 = 0 and
        a1 .. ar = 1 / r at the start. State dicts of the authors' release also load: ``weight``
        [order], highest power first, and ``bias`` [1]. Gradients of the coefficients are complete
        and equal on every rank of ``group``.
    """

    def __init__(
        self,
        order: int = DEFAULT_ORDER,
        *,
        num_experts: int | None = None,
        eps: float = DEFAULT_EPS,
        norm: Norm = "rms",
        gated: bool = False,
        group: dist.ProcessGroup | None = None,
        deterministic: bool = False,
        backend: Backend = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(order, num_experts, gated, group, deterministic, backend, device, dtype)
        check_eps(eps)
        check_norm(norm)
        self.eps = eps
        self.norm: Norm = norm
        self.reset_parameters()

    def _activate(
        self, x: Tensor, gate: Tensor | None, probs: Tensor | None, offsets: Tensor | None
    ) -> Tensor:
        return polynorm(
            x,
            self.coefficients,
            eps=self.eps,
            norm=self.norm,
            group=self.group,
            offsets=offsets,
            probs=probs,
            gate=gate,
            deterministic=self.deterministic,
            backend=self.backend,
        )

    def _options(self) -> dict[str, object]:
        return {"eps": self.eps, "norm": self.norm, **super()._options()}


class PolyReLU(_PolynomialActivation):
    """Polynomial of ``relu(x)``, or of ``prelu(x)`` with a learned slope.

        y = p (a0 + a1 h + a2 h^2 + .. + ar h^r) u,   h = max(x, 0) + slope min(x, 0)

    Source: PolyCom (ICLR 2025), Eq. 2; PolyPReLU: Fig. 5(b). See :func:`megapoly.ops.polyrelu`.

    Args:
        order: highest power r; 2, 3 or 4.
        num_experts: coefficient sets for rows sorted by expert; None: one set for all rows.
        slope: initial value of the learned slope below zero (PolyPReLU's is 0.25); None: the slope
            is 0 and not learned.
        gated: multiply by a gate u, the second half of the input or a separate input.
        group: ranks that share one row.
        deterministic: give the same bits on 1, 2, 4 and 8 ranks.
        backend: ``auto``, ``reference``, ``compiled`` or ``triton``.
        device: of the coefficients.
        dtype: of the coefficients; operators compute in fp32 whatever it is (fp64 for fp64 inputs).

    Raises:
        ValueError: an option is not valid.

    Note:
        ``coefficients`` are as in :class:`PolyNorm`; ``slope`` is [1] or [num_experts, 1].
    """

    def __init__(
        self,
        order: int = DEFAULT_ORDER,
        *,
        num_experts: int | None = None,
        slope: float | None = None,
        gated: bool = False,
        group: dist.ProcessGroup | None = None,
        deterministic: bool = False,
        backend: Backend = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(order, num_experts, gated, group, deterministic, backend, device, dtype)
        self.initial_slope = slope
        self.slope = None if slope is None else self._new_parameter(1, device, dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set a0 to 0, a1 .. ar to 1 / r, and the slope to its initial value."""
        super().reset_parameters()
        if self.slope is not None and self.initial_slope is not None:
            self.slope.fill_(self.initial_slope)

    def _activate(
        self, x: Tensor, gate: Tensor | None, probs: Tensor | None, offsets: Tensor | None
    ) -> Tensor:
        return polyrelu(
            x,
            self.coefficients,
            slope=self.slope,
            group=self.group,
            offsets=offsets,
            probs=probs,
            gate=gate,
            deterministic=self.deterministic,
            backend=self.backend,
        )

    def _options(self) -> dict[str, object]:
        return {"slope": self.initial_slope, **super()._options()}
