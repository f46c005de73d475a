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
from megapoly.data.stored_pairs import StoredPairs
from megapoly.data.token_file_checks import check_token_files
from megapoly.data.token_files import TokenFile
from megapoly.data.tokenizer import Tokenizer
from megapoly.errors import DataError
from megapoly.platform.stores import is_url

BUILTIN_VALIDATION_SET = "books"
T = TypeVar("T")


class BuildCoordinator(Protocol):
    """Calls a function that builds files, on one process before the others, which find them."""

    def __call__(self, what: str, build: Callable[[], T], find: Callable[[], T] | None = None) -> T:
        """Return the result of the function on this process.

        Args:
            what: what the function does; completes the sentence "waits for rank 0 to".
            build: builds files that do not exist, and opens them.
            find: opens files that another process of this host has built; None: ``build`` does.
        """


def build_directly(what: str, build: Callable[[], T], find: Callable[[], T] | None = None) -> T:
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
    opener = _Opener(config, tokenizer, first)
    sources, validation = opener.named_files()
    groups = _groups_of_sources(sources) + _groups_of_sets(validation)
    # Check all files before the first index is built, which may take minutes.
    files, warnings = opener.check(groups)
    exact = _exact_shares(
        sources, [sum(f.num_tokens for f in found) for found in files[: len(sources)]]
    )
    pools = opener.pools(groups, files)
    blend = Blend(
        [
            TrainingSource(str(source.name), source.path, share, pool)
            for source, share, pool in zip(sources, exact, pools, strict=False)
        ]
    )
    sets = dict(zip(validation, pools[len(sources) :], strict=True))
    description = describe(
        blend,
        tokenizer=tokenizer.fingerprint,
        seq_length=config.training.seq_length,
        seed=config.data.seed,
    )
    return Corpus(blend, sets, tokenizer, description, warnings)


def load_validation(
    config: Config, *, tokenizer: Tokenizer, first: BuildCoordinator = build_directly
) -> tuple[dict[str, SamplePool], list[str]]:
    """Check and open only the validation sets; arguments and errors as in :func:`load_corpus`.

    Returns:
        Samples by the name of their set, and messages for the user about the files.
    """
    opener = _Opener(config, tokenizer, first)
    _, validation = opener.named_files()
    groups = _groups_of_sets(validation)
    files, warnings = opener.check(groups)
    return dict(zip(validation, opener.pools(groups, files), strict=True)), warnings


@dataclass(frozen=True)
class _FileGroup:
    """Token files that are read together: of a source or of a validation set."""

    name: str
    paths: list[str]
    split: Split


def _groups_of_sources(sources: list[BlendSource]) -> list[_FileGroup]:
    return [_FileGroup(f"`{source.name}`", [source.path], Split.train) for source in sources]


def _groups_of_sets(sets: dict[str, ValidationSet]) -> list[_FileGroup]:
    return [
        _FileGroup(f"validation set `{name}`", list(validation.path), Split.valid)
        for name, validation in sets.items()
    ]


class _Opener:
    """Checks and opens token files; arguments as in :func:`load_corpus`."""

    def __init__(self, config: Config, tokenizer: Tokenizer, first: BuildCoordinator):
        self._config, self._tokenizer, self._first = config, tokenizer, first
        self._cache_dir = Path(config.data.cache_dir or Path(config.run_dir) / "cache")
        self._vocab_size = config.model.vocab_size or tokenizer.vocab_size

    def named_files(self) -> tuple[list[BlendSource], dict[str, ValidationSet]]:
        """Return sources and validation sets; the built-in text if the configuration names none."""
        data = self._config.data
        sources, validation = blend_sources(data), validation_sets(data)
        if sources is None:
            build = partial(prepare_builtin_text, self._cache_dir, self._tokenizer)
            builtin = self._first("tokenize the built-in text", build)
            name = BUILTIN_VALIDATION_SET
            sources = [BlendSource(str(builtin["train"]), epochs=1.0, name=name)]
            if data.validation is None:
                validation = {name: ValidationSet([str(builtin["validation"])])}
        if not sources:
            raise DataError("`data.blend` must name at least one source; it is an empty list.")
        return sources, validation

    def check(self, groups: list[_FileGroup]) -> tuple[list[list[TokenFile]], list[str]]:
        """Return the files of each group, and warnings, each once: a file may be in several."""
        copies = self._copies([path for group in groups for path in group.paths if is_url(path)])
        checked = [self._check(group, copies) for group in groups]
        warnings = dict.fromkeys(warning for _, warnings in checked for warning in warnings)
        return [files for files, _ in checked], list(warnings)

    def _copies(self, urls: list[str]) -> dict[str, list[str]]:
        """Copy the token files in stores, each pair for itself; return prefixes by URL."""
        if not urls:
            return {}
        pairs = StoredPairs(urls, self._cache_dir)
        found = self._first("find the token files in stores", pairs.find, pairs.found)
        copies = {
            pair: self._first(
                f"copy {pair}", partial(pairs.fetch, pair), partial(pairs.local_prefix, pair)
            )
            for pair in dict.fromkeys(pair for each in found.values() for pair in each)
        }
        return {url: [copies[pair] for pair in each] for url, each in found.items()}

    def _check(
        self, group: _FileGroup, copies: dict[str, list[str]]
    ) -> tuple[list[TokenFile], list[str]]:
        prefixes = [
            prefix
            for path in group.paths
            for prefix in copies.get(path) or token_file_prefixes(path)
        ]
        if not prefixes:
            raise DataError(
                f"{group.name} must name at least one token file; {group.paths} match none."
            )
        check = partial(
            check_token_files,
            prefixes,
            min_tokens=self._config.training.seq_length + 1 if group.split == Split.train else 2,
            tokenizer=self._tokenizer.fingerprint,
            vocab_size=self._vocab_size,
            cache_dir=self._cache_dir,
        )
        return self._first(f"check the token files of {group.name}", check)

    def pools(self, groups: list[_FileGroup], files: list[list[TokenFile]]) -> list[SamplePool]:
        """Return the samples of each group; build their indices if they do not exist."""
        return [self._pool(*each) for each in zip(groups, files, strict=True)]

    def _pool(self, group: _FileGroup, files: list[TokenFile]) -> SamplePool:
        build = partial(
            open_pool,
            files,
            group.split,
            seq_length=self._config.training.seq_length,
            seed=self._config.data.seed,
            tokenizer=self._tokenizer,
            vocab_size=self._vocab_size,
            eod_mask_loss=self._config.data.eod_mask_loss,
            cache_dir=self._cache_dir,
        )
        return self._first(f"build the sample indices of {group.name}", build)


def _exact_shares(sources: list[BlendSource], num_tokens: list[int]) -> list[Fraction]:
    exact = shares(sources, num_tokens)
    for source, share in zip(sources, exact, strict=True):
        if share < SMALLEST_SHARE:
            raise DataError(tiny_share(source.name, float(share)))
    return exact
