"""Sources of a blend, validation sets and token files that the options of ``data`` name."""

from __future__ import annotations

import glob
from fractions import Fraction
from pathlib import Path

from megapoly.config.schema import BlendSource, DataConfig, ValidationSet
from megapoly.platform.files import is_file, is_folder

UNITS = ("weight", "tokens", "epochs")
MEAN = "mean"  # name of the mean over all validation sets
# The order has blocks of at least 1 / share samples, and every process keeps two of them: 25 MB at
# this share.
SMALLEST_SHARE = Fraction(1, 1 << 20)


def blend_sources(data: DataConfig) -> list[BlendSource] | None:
    """Return the sources of ``data.blend``, each with its name; a prefix alone is one epoch."""
    if data.blend is None:
        return None
    sources = (BlendSource(s, epochs=1.0) if isinstance(s, str) else s for s in data.blend)
    return [
        BlendSource(
            s.path, s.weight, s.tokens, s.epochs, Path(s.path).name if s.name is None else s.name
        )
        for s in sources
    ]


def unit_of(source: BlendSource) -> list[str]:
    """Return which of ``weight``, ``tokens`` and ``epochs`` a source has."""
    return [unit for unit in UNITS if getattr(source, unit) is not None]


def shares(sources: list[BlendSource], num_tokens: list[int]) -> list[Fraction]:
    """Return the exact share of each source in the training samples; the sum is 1.

    Args:
        sources: of a checked blend, with one unit.
        num_tokens: tokens in the files of each source, the factor of ``epochs``.
    """
    (unit,) = unit_of(sources[0])
    # By its decimal digits: 0.1 is a tenth.
    amounts = [Fraction(str(getattr(source, unit))) for source in sources]
    if unit == "epochs":
        amounts = [amount * n for amount, n in zip(amounts, num_tokens, strict=True)]
    return [amount / sum(amounts) for amount in amounts]


def tiny_share(name: str | None, share: float) -> str:
    """Return the message about a share that is too small."""
    return (
        f"`data.blend` `{name}` has a share of {share:.1e}; the smallest is "
        f"{float(SMALLEST_SHARE):.1e}, one sample in {int(1 / SMALLEST_SHARE):,}: give it "
        "more, or leave it out"
    )


def validation_sets(data: DataConfig) -> dict[str, ValidationSet]:
    """Return the sets of ``data.validation``, each path as a list."""
    sets = {}
    for name, entry in (data.validation or {}).items():
        entry = entry if isinstance(entry, ValidationSet) else ValidationSet(entry)
        paths = [entry.path] if isinstance(entry.path, str) else entry.path
        sets[name] = ValidationSet(paths, entry.weight)
    return sets


def token_file_prefixes(path: str) -> list[str]:
    """Return the prefixes that a path names: itself, or all that match the pattern, sorted.

    Returns:
        Empty if the path is a pattern and no ``.idx`` file matches it.
    """
    if is_file(f"{path}.idx") or not glob.has_magic(path):
        return [path]
    return [match.removesuffix(".idx") for match in sorted(glob.glob(f"{path}.idx"))]


def tokenizer_file(tokenizer: str) -> Path:
    """Return the file that ``data.tokenizer`` names, itself or by its folder."""
    path = Path(tokenizer)
    if not is_folder(path):
        return path
    file, gpt2_file = path / "tokenizer.json", path / "vocab.json"
    return gpt2_file if is_file(gpt2_file) and not is_file(file) else file
