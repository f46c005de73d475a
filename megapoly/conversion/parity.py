"""Is a converted model the same model? Logits on real text, and the first module that differs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

import megapoly
from megapoly.conversion.module_outputs import ModuleOutputs
from megapoly.errors import MegapolyError

# Largest difference of a logit, where logits are of order one; of larger ones, relative to the
# largest at the same position.
TOLERANCE = 1e-5
# A module is said to differ when its output is this far off, relative to its norm: well above
# rounding in fp32, well below what any wrong weight does.
MODULE_TOLERANCE = 1e-4
# Experts whose probabilities are closer than this may be chosen either way by rounding.
TIE = 1e-5


class ParityError(MegapolyError):
    """A converted model does not compute what its source computes."""


@dataclasses.dataclass(frozen=True)
class Parity:
    """The comparison of a checkpoint's model with one in Hugging Face's form, computed in fp32.

    Args:
        weights: dtype that both models' weights were rounded to.
        num_tokens: positions compared.
        excluded_positions: left out, because rounding alone decides between two experts there, or
            before in the same text.
        max_difference: largest difference of a logit.
        max_relative_difference: the same, divided by the largest logit of the position where that
            is above 1.
        mean_difference: mean difference of a logit.
        max_logit: largest logit of the checkpoint's model.
        kl: mean Kullback-Leibler divergence of the next token's distribution, nats.
        argmax_agreement: share of positions with the same most likely next token.
        checkpoint_loss: of the checkpoint's model on the text, nats.
        export_loss: of the other model.
        tolerance: allowed for ``max_relative_difference``.
        experts_not_reached: experts that no row came to, and that are therefore not compared.
        first_difference: first module in order of computation whose output differs; None: none.
        module_differences: of each module relative to its output's norm; None where it is missing
            or not finite.
        loading: keys that ``from_pretrained`` missed, did not expect, or found in another shape;
            texts that transformers' tokenizer reads otherwise.
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
    first_difference: str | None
    module_differences: dict[str, float | None]
    loading: dict[str, list[str]]

    @property
    def passed(self) -> bool:
        """Whether the two are the same model."""
        # Not `>`: that is false for what is not a number.
        logits_agree = self.max_relative_difference <= self.tolerance
        return logits_agree and self.first_difference is None and not any(self.loading.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what is not finite is null."""
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
        """One line."""
        unreached = ""
        if self.experts_not_reached:
            unreached = f"; {self.experts_not_reached} experts were reached by no row"
        return (
            f"parity on {self.num_tokens} tokens, fp32: logits differ by at most "
            f"{self.max_difference:.1e} (largest {self.max_logit:.1f}, mean difference "
            f"{self.mean_difference:.1e}), KL {self.kl:.1e}, same arg-max "
            f"{self.argmax_agreement:.2%}, loss {self.export_loss:.4f} and "
            f"{self.checkpoint_loss:.4f}{unreached}"
        )

    def raise_if_different(self, report: str) -> None:
        """Raise :class:`ParityError` unless it has passed.

        Args:
            report: name of the file with all figures.
        """
        if self.passed:
            return
        found = [f"{kind}: {', '.join(names[:4])}" for kind, names in self.loading.items() if names]
        if self.first_difference is not None:
            found.insert(0, f"the first module that differs is `{self.first_difference}`")
        if not found:
            found = ["no single module is far off: rounding adds up, see --tolerance"]
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
) -> Parity:
    """Compare two recordings on the same text.

    Args:
        expected: of the checkpoint's model.
        found: of the other one.
        tokens: [b, s].
        loading: see :class:`Parity`.
        weights: see :class:`Parity`.
        tolerance: see :class:`Parity`.
    """
    counts = comparable_positions(expected, found)
    if counts is None:
        counts = torch.ones_like(tokens, dtype=torch.bool)
    logits, others = expected.logits[counts], found.logits[counts]
    log_probs, other_log_probs = (x.double().log_softmax(-1) for x in (logits, others))
    apart = (logits - others).abs()
    relative = apart.amax(-1) / logits.abs().amax(-1).clamp_min(1.0)
    modules = module_differences(expected, found, counts)
    first = next((name for name, off in modules.items() if not off <= MODULE_TOLERANCE), None)
    return Parity(
        weights=weights,
        num_tokens=int(counts.sum()),
        excluded_positions=int((~counts).sum()),
        max_difference=apart.max().item(),
        max_relative_difference=relative.max().item(),
        mean_difference=apart.mean().item(),
        max_logit=logits.abs().max().item(),
        kl=(log_probs.exp() * (log_probs - other_log_probs)).sum(-1).mean().item(),
        argmax_agreement=(logits.argmax(-1) == others.argmax(-1)).float().mean().item(),
        checkpoint_loss=_loss(expected.logits, tokens),
        export_loss=_loss(found.logits, tokens),
        tolerance=tolerance,
        experts_not_reached=experts_not_reached(expected),
        first_difference=first,
        module_differences={k: v if math.isfinite(v) else None for k, v in modules.items()},
        loading=loading,
    )


def module_differences(
    expected: ModuleOutputs, found: ModuleOutputs, counts: Tensor
) -> dict[str, float]:
    """|a - b| / |a| of each module's output, in the order of computation.

    The whole input embedding comes first, and behind a layer's experts what they compute on rows
    that reach every one of them, as ``model.layers.0.mlp.experts``.
    """
    differences = {"model.embed_tokens.weight": _apart(expected.embedding, found.embedding)}
    for name, output in expected.outputs.items():
        differences[name] = _apart(output, found.outputs.get(name), counts)
        if name in expected.every_expert:
            a, probs = expected.every_expert[name]
            b, others = found.every_expert[name]
            tied = _tied(probs, others)
            differences[f"{name}.experts"] = _apart(a, b, ~tied)
    return differences


def _apart(a: Tensor, b: Tensor | None, counts: Tensor | None = None) -> float:
    if b is None or a.shape != b.shape:
        return math.inf
    if counts is not None:
        a, b = a[counts], b[counts]
    return ((a - b).norm() / a.norm().clamp_min(1e-30)).item()


def experts_not_reached(recording: ModuleOutputs) -> int:
    """Experts of all layers that neither the text nor a row of theirs came to."""
    number = 0
    for name, probs in recording.probs.items():
        of_rows = recording.every_expert[name][1] if name in recording.every_expert else probs
        reached = (probs > 0).flatten(0, 1).any(0) | (of_rows > 0).flatten(0, 1).any(0)
        number += int((~reached).sum())
    return number


def comparable_positions(expected: ModuleOutputs, found: ModuleOutputs) -> Tensor | None:
    """[b, s]: positions before, or of texts without, a choice between equally likely experts.

    A token whose last chosen and first other expert have the same probability, but for rounding,
    may go to either. It, and what attends to it, is another computation, and no wrong one.
    """
    counts = None
    for name, probs in expected.probs.items():
        tied = _tied(probs, found.probs[name]).cumsum(-1) > 0
        counts = ~tied if counts is None else counts & ~tied
    return counts if counts is None or counts.any() else None


def _tied(probs: Tensor, others: Tensor) -> Tensor:
    """[b, s]: experts differ, and are equally likely."""
    apart = (probs > 0) != (others > 0)  # [b, s, experts]
    # Of the two experts of a tie, each side has the probability of one.
    gap = (torch.where(apart, probs, 0).sum(-1) - torch.where(apart, others, 0).sum(-1)).abs()
    return apart.any(-1) & (gap < TIE)


def _loss(logits: Tensor, tokens: Tensor) -> float:
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    ).item()
