"""Is an exported model the checkpoint's? Logits on real text, and the first module that differs."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from torch import Tensor

import megapoly
from megapoly.data.builtin import builtin_documents
from megapoly.data.tokenizer import load_tokenizer
from megapoly.errors import MegapolyError
from megapoly.huggingface.architecture import hf_config, is_polycom_release, model_config
from megapoly.huggingface.recording import Recording, record_checkpoint, record_export
from megapoly.huggingface.safetensors_reader import read_json

# Largest difference of a logit, where logits are of order one; of larger ones, relative to them.
TOLERANCE = 1e-5
# A module is said to differ when its output is this far off, relative to its norm: well above
# rounding in fp32, well below what any wrong weight does.
MODULE_TOLERANCE = 1e-4
# Experts whose probabilities are closer than this may be chosen either way by rounding.
TIE = 1e-5
NUM_TEXTS, TEXT_TOKENS = 2, 128
# Of the memory that is free, what the exported model may take as a whole.
MEMORY_SHARE = 0.4
_LAYERS_ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


class ParityError(MegapolyError):
    """An exported model does not compute what the checkpoint's model computes."""


@dataclasses.dataclass(frozen=True)
class Parity:
    """The comparison of an exported model with its checkpoint's, both computed in fp32.

    Args:
        weights: dtype that both models' weights were rounded to.
        num_tokens: positions compared.
        excluded_positions: left out, because rounding alone decides between two experts there, or
            before in the same text.
        max_difference: largest difference of a logit.
        mean_difference: mean difference of a logit.
        max_logit: largest logit of the checkpoint's model.
        kl: mean Kullback-Leibler divergence of the next token's distribution, nats.
        argmax_agreement: share of positions with the same most likely next token.
        checkpoint_loss: of the checkpoint's model on the text, nats.
        export_loss: of the exported model.
        tolerance: allowed for ``max_difference``, times the largest logit where that is above 1.
        first_difference: first module in order of computation whose output differs; None: none.
        module_differences: of each module relative to its output's norm; only if not passed.
        loading: keys that ``from_pretrained`` missed, did not expect, or found in another shape.
    """

    weights: str
    num_tokens: int
    excluded_positions: int
    max_difference: float
    mean_difference: float
    max_logit: float
    kl: float
    argmax_agreement: float
    checkpoint_loss: float
    export_loss: float
    tolerance: float
    first_difference: str | None
    module_differences: dict[str, float]
    loading: dict[str, list[str]]

    @property
    def passed(self) -> bool:
        """Whether the two are the same model."""
        allowed = self.tolerance * max(1.0, self.max_logit)
        # Not `>`: that is false for what is not a number.
        return self.max_difference <= allowed and not any(self.loading.values())

    def to_dict(self) -> dict[str, Any]:
        """For ``parity.json``."""
        import transformers

        versions = {
            "megapoly": megapoly.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        return {"passed": self.passed, **dataclasses.asdict(self), "versions": versions}

    def summary(self) -> str:
        """One line."""
        return (
            f"parity on {self.num_tokens} tokens, fp32: logits differ by at most "
            f"{self.max_difference:.1e} (largest {self.max_logit:.1f}, mean difference "
            f"{self.mean_difference:.1e}), KL {self.kl:.1e}, same arg-max "
            f"{self.argmax_agreement:.2%}, loss {self.export_loss:.4f} and "
            f"{self.checkpoint_loss:.4f}"
        )

    def raise_if_different(self) -> None:
        """Raise :class:`ParityError` unless it has passed."""
        if self.passed:
            return
        keys = "; ".join(f"{kind} {names[:4]}" for kind, names in self.loading.items() if names)
        where = f"the first module that differs is `{self.first_difference}`"
        if self.first_difference is None:
            where = "no single module is far off; more rounding than usual, see --tolerance"
        if keys:
            where += f"; from_pretrained found {keys}"
        allowed = self.tolerance * max(1.0, self.max_logit)
        raise ParityError(
            f"The exported model must compute the checkpoint's logits within {allowed:.1e}; "
            f"{self.summary()}; {where}. parity.json lists every module."
        )


def compare(
    checkpoint: Path,
    folder: Path,
    dtype: torch.dtype,
    tolerance: float,
    console: Console,
    *,
    tokenizer: Path | None = None,
) -> Parity:
    """Compare an exported folder with its checkpoint.

    Args:
        checkpoint: an ``iter_*`` folder.
        folder: the export.
        dtype: of the export's weights.
        tolerance: see :class:`Parity`.
        console: for what is going on.
        tokenizer: folder of the tokenizer; None: the export's.
    """
    tokens = real_text(tokenizer or folder, max_positions(folder))
    with console.status("comparing: the checkpoint's model"):
        expected = record_checkpoint(checkpoint, tokens, dtype)
    with console.status("comparing: the exported model"):
        model, loading, offload = load_export(folder)
        with offload:
            found = record_export(model, tokens)
    return difference(expected, found, tokens, loading, weights=str(dtype)[6:], tolerance=tolerance)


def real_text(tokenizer_folder: Path, max_length: int) -> Tensor:
    """[b, s] ids of the built-in books' validation part, s at most ``max_length``."""
    tokenizer = load_tokenizer(tokenizer_folder)
    length = min(TEXT_TOKENS, max_length)
    texts = [d.text for d in builtin_documents() if d.split == "validation"]
    ids = (tokenizer.encode(text[: 16 * length]) for text in texts)
    long_enough = [found[:length] for found in ids if len(found) >= length]
    return torch.tensor(long_enough[:: max(1, len(long_enough) // NUM_TEXTS)][:NUM_TEXTS])


def max_positions(folder: Path) -> int:
    """Length of the sequences that an exported model was trained on."""
    return int(read_json(folder / "config.json")["max_position_embeddings"])


def load_export(
    folder: Path,
) -> tuple[Any, dict[str, list[str]], tempfile.TemporaryDirectory[str]]:
    """The exported model in fp32, as users open it; where it is large, layers left on disk.

    Returns:
        The model; keys that did not fit, by kind; a folder that must last as long as the model.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    offload = tempfile.TemporaryDirectory(prefix="megapoly-parity-")
    arguments: dict[str, Any] = {}
    opener: Any = AutoModelForCausalLM
    available = psutil.virtual_memory().available * MEMORY_SHARE
    if fp32_bytes(folder) > available:
        arguments = {"device_map": _LAYERS_ON_DISK, "offload_folder": offload.name}
    if is_polycom_release(read_json(folder / "config.json")):
        arguments["config"], opener = release_model(folder)
    model, info = opener.from_pretrained(
        folder,
        trust_remote_code=True,
        local_files_only=True,
        dtype=torch.float32,
        output_loading_info=True,
        **arguments,
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return model.eval(), {kind: sorted(map(str, info.get(kind) or [])) for kind in kinds}, offload


def release_model(folder: Path) -> tuple[Any, Any]:
    """Configuration and class for a PolyCom release, whose own code is not published.

    The tensors' names are those of this project's exports, so these open it as it is.
    """
    from megapoly.huggingface.remote_code.configuration_megapoly import MegapolyConfig
    from megapoly.huggingface.remote_code.modeling_megapoly import MegapolyForCausalLM

    path = folder / "config.json"
    model = model_config(read_json(path), source=str(path))
    fields = hf_config(
        model, seq_length=max_positions(folder), dtype="float32", bos=None, eos=0, pad=None
    )
    for name in ("model_type", "auto_map", "torch_dtype"):
        fields.pop(name)
    return MegapolyConfig(**fields), MegapolyForCausalLM


def fp32_bytes(folder: Path) -> int:
    """Bytes of a folder's weights in fp32."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes = (file.get_slice(name).get_shape() for name in file.keys())  # noqa: SIM118
            total += 4 * sum(torch.Size(shape).numel() for shape in shapes)
    return total


def difference(
    expected: Recording,
    found: Recording,
    tokens: Tensor,
    loading: dict[str, list[str]],
    *,
    weights: str,
    tolerance: float,
) -> Parity:
    """Compare two recordings on the same text.

    Args:
        expected: of the checkpoint's model.
        found: of the exported one.
        tokens: [b, s].
        loading: see :class:`Parity`.
        weights: see :class:`Parity`.
        tolerance: see :class:`Parity`.
    """
    counts = not_decided_by_rounding(expected, found)
    if counts is None:
        counts = torch.ones_like(tokens, dtype=torch.bool)
    logits, others = expected.logits[counts], found.logits[counts]
    log_probs, other_log_probs = (x.double().log_softmax(-1) for x in (logits, others))
    apart = (logits - others).abs()
    parity = Parity(
        weights=weights,
        num_tokens=int(counts.sum()),
        excluded_positions=int((~counts).sum()),
        max_difference=apart.max().item(),
        mean_difference=apart.mean().item(),
        max_logit=logits.abs().max().item(),
        kl=(log_probs.exp() * (log_probs - other_log_probs)).sum(-1).mean().item(),
        argmax_agreement=(logits.argmax(-1) == others.argmax(-1)).float().mean().item(),
        checkpoint_loss=_loss(expected.logits, tokens),
        export_loss=_loss(found.logits, tokens),
        tolerance=tolerance,
        first_difference=None,
        module_differences={},
        loading=loading,
    )
    if parity.passed:
        return parity
    modules = module_differences(expected, found, counts)
    first = next((name for name, off in modules.items() if not off <= MODULE_TOLERANCE), None)
    return dataclasses.replace(parity, first_difference=first, module_differences=modules)


def module_differences(expected: Recording, found: Recording, counts: Tensor) -> dict[str, float]:
    """|a - b| / |a| of each module's output, in the order of computation."""
    differences = {}
    for name, output in expected.outputs.items():
        other = found.outputs.get(name)
        if other is None or other.shape != output.shape:
            differences[name] = float("inf")
            continue
        a, b = output[counts], other[counts]
        differences[name] = ((a - b).norm() / a.norm().clamp_min(1e-30)).item()
    return differences


def not_decided_by_rounding(expected: Recording, found: Recording) -> Tensor | None:
    """[b, s]: positions before, or of texts without, a choice between equally likely experts.

    A token whose last chosen and first other expert have the same probability, but for rounding,
    may go to either. It, and what attends to it, is another computation, and no wrong one.
    """
    counts = None
    for name, probs in expected.probs.items():
        other = found.probs[name]
        apart = (probs > 0) != (other > 0)  # [b, s, experts]
        # Of the two experts of a tie, each recording has the probability of one.
        gap = (torch.where(apart, probs, 0).sum(-1) - torch.where(apart, other, 0).sum(-1)).abs()
        tied = (apart.any(-1) & (gap < TIE)).cumsum(-1) > 0
        counts = ~tied if counts is None else counts & ~tied
    return counts if counts is None or counts.any() else None


def _loss(logits: Tensor, tokens: Tensor) -> float:
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    ).item()
