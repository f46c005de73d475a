"""Decide whether two models are the same; name the first module that differs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

import megapoly
from megapoly.conversion.module_outputs import ModuleOutputs
from megapoly.errors import MegapolyError

# Largest difference of a logit, relative to the largest logit at the same position if that is
# above 1.
TOLERANCE = 1e-5
# A module differs if its output is off by more than this, relative to its norm: well above
# rounding in fp32, well below the effect of any wrong weight.
MODULE_TOLERANCE = 1e-4
# The same for a module that is given the other model's inputs: rounding of the modules before it
# does not add up.
ALONE_TOLERANCE = 1e-5
# If the probabilities of two experts are closer than this, rounding may decide between them.
TIE = 1e-5


class ParityError(MegapolyError):
    """A converted model does not compute what its source computes."""


@dataclasses.dataclass(frozen=True)
class Parity:
    """Comparison of a checkpoint's model with one in Hugging Face's form, computed in fp32.

    Args:
        weights: dtype that the weights of both models were rounded to.
        num_tokens: number of compared positions.
        excluded_positions: number of positions left out because rounding alone decides between two
            experts there, or earlier in the same text.
        max_difference: largest difference of a logit.
        max_relative_difference: the same, divided by the largest logit of the position if that is
            above 1.
        mean_difference: mean difference of a logit.
        max_logit: largest logit of the checkpoint's model.
        kl: mean Kullback-Leibler divergence of the next token's distribution, nats.
        argmax_agreement: share of positions with the same most likely next token.
        checkpoint_loss: loss of the checkpoint's model on the text, nats.
        export_loss: loss of the other model.
        tolerance: largest allowed ``max_relative_difference``.
        experts_not_reached: number of experts that no row reached, so that they are not compared.
        last_position: largest position that was compared.
        near_difference: ``max_relative_difference`` on the texts that count from 0.
        far_difference: the same on the text that ends at ``last_position``; None if there was none.
        first_difference: first module in order of computation that differs although it is given
            the same inputs, see :func:`differing_module`; None if there is none, or the models are
            the same.
        module_differences: difference of each module's output, relative to its norm; None if it is
            missing or not finite.
        loading: keys that ``from_pretrained`` missed, did not expect, or found in another shape;
            texts that transformers' tokenizer encodes differently.
    """

    weights: str
    num_tokens: int
    excluded_positions: int
    max_difference: float
    max_relative_difference: float
    mean_difference: float
    max_logit: float
    kl: float
    argmax_agreement: float
    checkpoint_loss: float
    export_loss: float
    tolerance: float
    experts_not_reached: int
    last_position: int
    near_difference: float
    far_difference: float | None
    first_difference: str | None
    module_differences: dict[str, float | None]
    loading: dict[str, list[str]]

    @property
    def passed(self) -> bool:
        """Whether the two are the same model."""
        # Not `>`, which is false for NaN.
        logits_agree = self.max_relative_difference <= self.tolerance
        modules_agree = all(
            off is not None and off <= MODULE_TOLERANCE for off in self.module_differences.values()
        )
        return logits_agree and modules_agree and not any(self.loading.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison for JSON; numbers that are not finite are null."""
        import transformers

        versions = {
            "megapoly": megapoly.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        fields = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(self).items()
        }
        return {"passed": self.passed, **fields, "versions": versions}

    def summary(self) -> str:
        """Describe the comparison in one line."""
        unreached = ""
        if self.experts_not_reached:
            unreached = f"; no row reached {self.experts_not_reached} experts"
        return (
            f"parity on {self.num_tokens} tokens, positions up to {self.last_position:,}, fp32: "
            f"logits differ by at most {self.max_difference:.1e} (largest {self.max_logit:.1f}, "
            f"mean difference {self.mean_difference:.1e}), KL {self.kl:.1e}, same arg-max "
            f"{self.argmax_agreement:.2%}, loss {self.export_loss:.4f} and "
            f"{self.checkpoint_loss:.4f}{unreached}"
        )

    def raise_if_different(self, report: str) -> None:
        """Raise :class:`ParityError` unless it has passed.

        Args:
            report: name of the file with all figures, for the message.
        """
        if self.passed:
            return
        found = [f"{kind}: {', '.join(names[:4])}" for kind, names in self.loading.items() if names]
        if self.first_difference is not None:
            found.insert(0, f"the first module that differs is `{self.first_difference}`")
        if not found:
            found = ["no module differs by itself: rounding errors add up, see --tolerance"]
        far_agrees = self.far_difference is None or self.far_difference <= self.tolerance
        if self.near_difference <= self.tolerance and not far_agrees:
            found.append(
                f"the first positions agree, and those up to {self.last_position:,} differ"
            )
        raise ParityError(
            "Checkpoint and Hugging Face folder must compute the same logits, within "
            f"{self.tolerance:.1e} of the largest at each position (of 1, where that is smaller); "
            f"they differ by {self.max_relative_difference:.1e}. {self.summary()}; "
            f"{'; '.join(found)}. {report} lists every module."
        )


def measure_parity(
    expected: ModuleOutputs,
    found: ModuleOutputs,
    tokens: Tensor,
    loading: dict[str, list[str]],
    *,
    weights: str,
    tolerance: float,
    last_position: int,
) -> Parity:
    """Compare the outputs of two models on the same text.

    Args:
        expected: outputs of the checkpoint's model, on ``tokens`` and then perhaps on a text at far
            positions.
        found: outputs of the other model.
        tokens: [b, s], positions from 0.
        loading: see :class:`Parity`.
        weights: see :class:`Parity`.
        tolerance: see :class:`Parity`.
        last_position: see :class:`Parity`.

    Returns:
        The comparison; its ``first_difference`` is None.
    """
    counts, num_texts = _counted(expected, found), len(tokens)
    relative = _relative_to_largest_logit(expected.logits, found.logits)
    logits, others = expected.logits[counts], found.logits[counts]
    log_probs, other_log_probs = (x.double().log_softmax(-1) for x in (logits, others))
    differences = (logits - others).abs()
    modules = module_differences(expected, found, counts)
    far = None
    if len(relative) > num_texts:
        far = _largest(relative[num_texts:][counts[num_texts:]])
    return Parity(
        weights=weights,
        num_tokens=int(counts.sum()),
        excluded_positions=int((~counts).sum()),
        max_difference=differences.max().item(),
        max_relative_difference=_largest(relative[counts]),
        mean_difference=differences.mean().item(),
        max_logit=logits.abs().max().item(),
        kl=(log_probs.exp() * (log_probs - other_log_probs)).sum(-1).mean().item(),
        argmax_agreement=(logits.argmax(-1) == others.argmax(-1)).float().mean().item(),
        checkpoint_loss=_loss(expected.logits[:num_texts], tokens),
        export_loss=_loss(found.logits[:num_texts], tokens),
        tolerance=tolerance,
        experts_not_reached=experts_not_reached(expected),
        last_position=last_position,
        near_difference=_largest(relative[:num_texts][counts[:num_texts]]),
        far_difference=far,
        first_difference=None,
        module_differences={k: v if math.isfinite(v) else None for k, v in modules.items()},
        loading=loading,
    )


def differing_module(expected: ModuleOutputs, alone: ModuleOutputs) -> str | None:
    """Return the first module that differs although its inputs do not; None if there is none.

    Args:
        expected: outputs of the checkpoint's model.
        alone: outputs of the other model, whose modules are given ``expected`` in place of the
            outputs of those before them.
    """
    modules = module_differences(expected, alone, _counted(expected, alone))
    return next((name for name, off in modules.items() if not off <= ALONE_TOLERANCE), None)


def _counted(expected: ModuleOutputs, found: ModuleOutputs) -> Tensor:
    """Return the positions [b, s] to compare: all if :func:`comparable_positions` leaves none."""
    counts = comparable_positions(expected, found)
    if counts is None:
        return torch.ones(expected.logits.shape[:2], dtype=torch.bool)
    return counts


def _relative_to_largest_logit(logits: Tensor, others: Tensor) -> Tensor:
    """Return [b, s], the largest difference, divided by the largest logit if it is above 1."""
    return (logits - others).abs().amax(-1) / logits.abs().amax(-1).clamp_min(1.0)


def _largest(values: Tensor) -> float:
    """Return the maximum, NaN if one is NaN; 0 if there are no values."""
    return values.max().item() if values.numel() else 0.0


def module_differences(
    expected: ModuleOutputs, found: ModuleOutputs, counts: Tensor
) -> dict[str, float]:
    """Return |a - b| / |a| of each module's output, in the order of computation.

    The whole input embedding comes first. After a layer's experts comes their output on rows that
    reach all of them, as ``model.layers.0.mlp.experts``.
    """
    embedding = _relative_difference(expected.embedding, found.embedding)
    differences = {"model.embed_tokens.weight": embedding}
    for name, output in expected.outputs.items():
        differences[name] = _relative_difference(output, found.outputs.get(name), counts)
        if name in expected.probe_outputs:
            a, probs = expected.probe_outputs[name]
            b, others = found.probe_outputs[name]
            tied = _tied(probs, others)
            differences[f"{name}.experts"] = _relative_difference(a, b, ~tied)
    return differences


def _relative_difference(a: Tensor, b: Tensor | None, counts: Tensor | None = None) -> float:
    if b is None or a.shape != b.shape:
        return math.inf
    if counts is not None:
        a, b = a[counts], b[counts]
    return ((a - b).norm() / a.norm().clamp_min(1e-30)).item()


def experts_not_reached(outputs: ModuleOutputs) -> int:
    """Count the experts of all layers that neither the text nor their probe row reached."""
    number = 0
    for name, probs in outputs.probs.items():
        of_rows = outputs.probe_outputs[name][1] if name in outputs.probe_outputs else probs
        reached = (probs > 0).flatten(0, 1).any(0) | (of_rows > 0).flatten(0, 1).any(0)
        number += int((~reached).sum())
    return number


def comparable_positions(expected: ModuleOutputs, found: ModuleOutputs) -> Tensor | None:
    """Return the positions [b, s] that no choice between equally likely experts affects.

    If a token's last chosen and first other expert have the same probability up to rounding, it may
    go to either. It, and every position that attends to it, may then differ without being wrong.
    None if that leaves no position, or there are no experts.
    """
    counts = None
    for name, probs in expected.probs.items():
        tied = _tied(probs, found.probs[name]).cumsum(-1) > 0
        counts = ~tied if counts is None else counts & ~tied
    return counts if counts is None or counts.any() else None


def _tied(probs: Tensor, others: Tensor) -> Tensor:
    """Return the positions [b, s] where chosen experts differ and are equally likely."""
    differs = (probs > 0) != (others > 0)  # [b, s, experts]
    # Of the two experts of a tie, each side has the probability of one.
    gap = (torch.where(differs, probs, 0).sum(-1) - torch.where(differs, others, 0).sum(-1)).abs()
    return differs.any(-1) & (gap < TIE)


def _loss(logits: Tensor, tokens: Tensor) -> float:
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    ).item()
