"""The data of a run: training samples, named validation sets, tokenizer, fingerprint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from megatron.core.datasets.utils import Split

from megapoly.config.data_sources import (
    SMALLEST_SHARE,
    blend_sources,
    shares,
    tiny_share,
    token_file_prefixes,
    validation_sets,
)
from megapoly.config.schema import BlendSource, Config, ValidationSet
from megapoly.data.blend import Blend, TrainingSource
from megapoly.data.builtin import prepare_builtin_text
from megapoly.data.fingerprint import Description, describe, fingerprint
from megapoly.data.samples import SamplePool, open_pool
from megapoly.data.token_file_checks import check_token_files
from megapoly.data.token_files import TokenFile
from megapoly.data.tokenizer import Tokenizer
from megapoly.errors import DataError

BUILTIN_VALIDATION_SET = "books"
T = TypeVar("T")


class BuildCoordinator(Protocol):
    """Calls a function that builds files on one process first, and then on those that find them."""

    def __call__(self, what: str, build: Callable[[], T]) -> T:
        """Return the result of the function on this process.

        Args:
            what: description of the function that completes "waits for rank 0 to".
            build: builds files that do not exist, and opens them.
        """


def build_directly(what: str, build: Callable[[], T]) -> T:
    """Call the function: the coordinator of a single process."""
    return build()


@dataclass(frozen=True)
class Corpus:
    """The data of a run.

    Args:
        train: blend of training samples.
        validation: samples of each validation set.
        tokenizer: turns text into ids.
        description: describes the training samples, see :mod:`megapoly.data.fingerprint`.
        warnings: messages for the user about the files.
    """

    train: Blend
    validation: dict[str, SamplePool]
    tokenizer: Tokenizer
    description: Description
    warnings: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """Changes with the training samples: with files, shares, tokenizer, length or seed."""
        return fingerprint(self.description)


def load_corpus(
    config: Config, *, tokenizer: Tokenizer, first: BuildCoordinator = build_directly
) -> Corpus:
    """Check and open the data that ``config.data`` names; tokenize the built-in text if needed.

    Args:
        config: configuration of the run.
        tokenizer: from :func:`megapoly.data.tokenizer.load_tokenizer`.
        first: runs each step that writes files (token files of the built-in text, sample indices)
            on one process for each disk before the others.

    Raises:
        DataError: a file is missing, damaged, too short or differs from its manifest, a token id is
            outside the vocabulary, or a list of files is empty.
    """
    cache_dir = _cache_dir(config)
    sources, validation = _named_files(config, cache_dir, tokenizer, first)
    files = _named(sources, Split.train) + _named(validation, Split.valid)
    # Check all files before the first index is built, which may take minutes.
    checked = [_checked(entry, config, cache_dir, tokenizer, first) for entry in files]
    num_tokens = [sum(f.num_tokens for f in found) for found, _ in checked[: len(sources)]]
    exact = _exact_shares(sources, num_tokens)
    pools = [
        _pool(entry, found, config, cache_dir, tokenizer, first)
        for entry, (found, _) in zip(files, checked, strict=True)
    ]
    blend = Blend(
        [
            TrainingSource(str(source.name), source.path, share, pool)
            for source, share, pool in zip(sources, exact, pools[: len(sources)], strict=True)
        ]
    )
    sets = dict(zip(validation, pools[len(sources) :], strict=True))
    description = describe(
        blend,
        tokenizer=tokenizer.fingerprint,
        seq_length=config.training.seq_length,
        seed=config.data.seed,
    )
    return Corpus(blend, sets, tokenizer, description, _warnings(checked))


def load_validation(
    config: Config, *, tokenizer: Tokenizer, first: BuildCoordinator = build_directly
) -> tuple[dict[str, SamplePool], list[str]]:
    """Check and open only the validation sets; arguments and errors as in :func:`load_corpus`.

    Returns:
        Samples by the name of their set, and messages for the user about the files.
    """
    cache_dir = _cache_dir(config)
    _, validation = _named_files(config, cache_dir, tokenizer, first)
    files = _named(validation, Split.valid)
    checked = [_checked(entry, config, cache_dir, tokenizer, first) for entry in files]
    pools = [
        _pool(entry, found, config, cache_dir, tokenizer, first)
        for entry, (found, _) in zip(files, checked, strict=True)
    ]
    return dict(zip(validation, pools, strict=True)), _warnings(checked)


def _cache_dir(config: Config) -> Path:
    return Path(config.data.cache_dir or Path(config.run_dir) / "cache")


def _warnings(checked: list[tuple[list[TokenFile], list[str]]]) -> list[str]:
    """Return the warnings about the files, each once: a file may be in several sets."""
    return list(dict.fromkeys(warning for _, warnings in checked for warning in warnings))


def _named_files(
    config: Config, cache_dir: Path, tokenizer: Tokenizer, first: BuildCoordinator
) -> tuple[list[BlendSource], dict[str, ValidationSet]]:
    """Return sources and validation sets; the built-in text if the configuration names none."""
    sources, validation = blend_sources(config.data), validation_sets(config.data)
    if sources is None:
        builtin = first(
            "tokenize the built-in text", lambda: prepare_builtin_text(cache_dir, tokenizer)
        )
        name = BUILTIN_VALIDATION_SET
        sources = [BlendSource(str(builtin["train"]), epochs=1.0, name=name)]
        if config.data.validation is None:
            validation = {name: ValidationSet([str(builtin["validation"])])}
    if not sources:
        raise DataError("`data.blend` must name at least one source; it is an empty list.")
    return sources, validation


@dataclass(frozen=True)
class _FileGroup:
    """Token files that are read together: those of a source or of a validation set."""

    name: str
    paths: list[str]
    split: Split


def _named(entries: list[BlendSource] | dict[str, ValidationSet], split: Split) -> list[_FileGroup]:
    if isinstance(entries, dict):
        return [
            _FileGroup(f"validation set `{k}`", list(s.path), split) for k, s in entries.items()
        ]
    return [_FileGroup(f"`{source.name}`", [source.path], split) for source in entries]


def _vocab_size(config: Config, tokenizer: Tokenizer) -> int:
    return config.model.vocab_size or tokenizer.vocab_size


def _checked(
    files: _FileGroup,
    config: Config,
    cache_dir: Path,
    tokenizer: Tokenizer,
    first: BuildCoordinator,
) -> tuple[list[TokenFile], list[str]]:
    prefixes = [prefix for path in files.paths for prefix in token_file_prefixes(path)]
    if not prefixes:
        raise DataError(
            f"{files.name} must name at least one token file; {files.paths} match none."
        )
    check = partial(
        check_token_files,
        prefixes,
        min_tokens=config.training.seq_length + 1 if files.split == Split.train else 2,
        tokenizer=tokenizer.fingerprint,
        vocab_size=_vocab_size(config, tokenizer),
        cache_dir=cache_dir,
    )
    return first(f"check the token files of {files.name}", check)


def _pool(
    files: _FileGroup,
    token_files: list[TokenFile],
    config: Config,
    cache_dir: Path,
    tokenizer: Tokenizer,
    first: BuildCoordinator,
) -> SamplePool:
    build = partial(
        open_pool,
        token_files,
        files.split,
        seq_length=config.training.seq_length,
        seed=config.data.seed,
        tokenizer=tokenizer,
        vocab_size=_vocab_size(config, tokenizer),
        eod_mask_loss=config.data.eod_mask_loss,
        cache_dir=cache_dir,
    )
    return first(f"build the sample indices of {files.name}", build)


def _exact_shares(sources: list[BlendSource], num_tokens: list[int]) -> list[Fraction]:
    exact = shares(sources, num_tokens)
    for source, share in zip(sources, exact, strict=True):
        if share < SMALLEST_SHARE:
            raise DataError(tiny_share(source.name, float(share)))
    return exact
