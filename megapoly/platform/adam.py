"""Adam with decoupled weight decay, in the state layout of the fused GPU optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Adam(torch.optim.Optimizer):
    """AdamW in plain torch, with the interface and state layout of Transformer Engine's FusedAdam.

        m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
        p <- (1 - lr wd) p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    The step t is kept in the parameter group and the state of a parameter is only ``exp_avg`` and
    ``exp_avg_sq``, so that checkpoints written with either optimizer are the same. It replaces the
    fused one if neither Transformer Engine nor apex is installed.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (ICLR 2019).

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        bias_correction: divide the moments by 1 - b^t.
        betas: b1 and b2.
        eps: added to the root of the second moment.
        adam_w_mode: decay the parameters (true), or add the decay to the gradients (false).
        weight_decay: wd.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        self.adam_w_mode = adam_w_mode
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; ``closure`` is not supported."""
        if closure is not None:
            raise ValueError("Adam.step takes no closure; compute the gradients before the call.")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                group["step"] = group.get("step", 0) + 1
                self._update(group, parameters)

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if "exp_avg" not in self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        gradients: Any = [p.grad for p in parameters]
        first = [self.state[p]["exp_avg"] for p in parameters]
        second = [self.state[p]["exp_avg_sq"] for p in parameters]
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        if decay and self.adam_w_mode:
            torch._foreach_mul_(parameters, 1 - lr * decay)
        elif decay:
            gradients = torch._foreach_add(gradients, parameters, alpha=decay)
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        step = group["step"] if group["bias_correction"] else float("inf")
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(parameters, first, denominator, -lr / (1 - beta1**step))
