"""Rules on the blend, the validation sets and the tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from megapoly.config.data_sources import (
    MEAN,
    SMALLEST_SHARE,
    UNITS,
    blend_sources,
    shares,
    tiny_share,
    token_file_prefixes,
    tokenizer_file,
    unit_of,
    validation_sets,
)
from megapoly.config.options import short
from megapoly.config.rules.facts import Facts, Rule
from megapoly.config.rules.values import ENTRY_RANGES
from megapoly.config.schema import BlendSource
from megapoly.platform.files import is_file, why_missing
from megapoly.platform.stores import is_url, why_not_opened

_SHOWN = 4
_ENDINGS = (".bin", ".idx")


def blend_has_sources(facts: Facts) -> Iterator[str]:
    """A blend has sources; null, not an empty list, requests the built-in text."""
    if facts.config.data.blend == []:
        yield "`data.blend` ([]) names no source; name one, or leave it null for the built-in books"


def sources_have_one_amount(facts: Facts) -> Iterator[str]:
    """One of weight, tokens and epochs sets how much of a source is read."""
    for source in blend_sources(facts.config.data) or []:
        units = unit_of(source)
        if len(units) != 1:
            found = " and ".join(units) or "none"
            yield (
                f"`data.blend` `{source.name}` must have exactly one of {', '.join(UNITS)}, not "
                f"{found}; `epochs: 1` reads it in proportion to its size"
            )


def sources_have_the_same_unit(facts: Facts) -> Iterator[str]:
    """Weights, tokens and epochs of different sources cannot be compared."""
    by_unit: dict[str, list[str]] = {}
    for source in blend_sources(facts.config.data) or []:
        units = unit_of(source)
        if len(units) == 1:
            by_unit.setdefault(units[0], []).append(f"`{source.name}`")
    if len(by_unit) > 1:
        found = ", ".join(f"{unit} ({' '.join(names)})" for unit, names in by_unit.items())
        yield (
            f"`data.blend` must use one of {', '.join(UNITS)} for all sources, not {found}; a "
            "prefix alone has `epochs: 1`; use one unit for all"
        )


def amounts_are_in_range(facts: Facts) -> Iterator[str]:
    """Every source of the blend is read, and its amount can be counted."""
    for source in blend_sources(facts.config.data) or []:
        for unit in unit_of(source):
            amount, range_ = getattr(source, unit), ENTRY_RANGES[unit]
            if amount not in range_:
                yield (
                    f"`data.blend` `{source.name}` has {unit} {amount}; it must be {range_}; "
                    "leave the source out if it is not to be read"
                )


def shares_are_not_tiny(facts: Facts) -> Iterator[str]:
    """Every source is in every block of the order; shares by epochs are checked with the files."""
    sources = blend_sources(facts.config.data) or []
    units = {tuple(unit_of(source)) for source in sources}
    if units not in ({("weight",)}, {("tokens",)}) or _not_positive(sources):
        return
    for source, share in zip(sources, shares(sources, []), strict=True):
        if share < SMALLEST_SHARE:
            yield tiny_share(source.name, float(share))


def _not_positive(sources: Iterable[BlendSource]) -> bool:
    return any(getattr(source, unit) <= 0 for source in sources for unit in unit_of(source))


def source_names_differ(facts: Facts) -> Iterator[str]:
    """Messages name sources, so names differ."""
    counts = Counter(source.name for source in blend_sources(facts.config.data) or [])
    for name, count in counts.items():
        if count > 1:
            yield (
                f"`data.blend` has {count} sources of the name `{name}` (which is the last part of "
                "`path` unless set); give each its own `name`"
            )


def validation_has_sets(facts: Facts) -> Iterator[str]:
    """A mapping has sets; null, not an empty mapping, requests none."""
    if facts.config.data.validation == {}:
        yield "`data.validation` ({}) names no set; name one, or leave it null"


def validation_names_are_free(facts: Facts) -> Iterator[str]:
    """No set has the name of the mean over all sets, ``val/mean``."""
    if MEAN in (facts.config.data.validation or {}):
        yield (
            f"`data.validation` names a set `{MEAN}`, which is the name of the mean over all sets; "
            "choose another"
        )


def validation_weights_are_complete(facts: Facts) -> Iterator[str]:
    """The mean is weighted by given weights, or by numbers of tokens."""
    weights = {name: s.weight for name, s in validation_sets(facts.config.data).items()}
    without = [f"`{name}`" for name, weight in weights.items() if weight is None]
    if 0 < len(without) < len(weights):
        yield (
            "`data.validation` must give all sets a weight or none (which weighs by tokens); "
            f"{', '.join(without)} {'has' if len(without) == 1 else 'have'} none"
        )
    for name, weight in weights.items():
        if weight is not None and weight not in ENTRY_RANGES["weight"]:
            range_ = ENTRY_RANGES["weight"]
            yield f"`data.validation` `{name}` has weight {weight}; it must be {range_}"


def token_files_exist(facts: Facts) -> Iterator[str]:
    """Every prefix has its ``.bin`` and ``.idx``, every pattern matches a file.

    Those in stores are looked for when the data is opened.
    """
    data = facts.config.data
    blend = {source.name or "": [source.path] for source in blend_sources(data) or []}
    validation = {name: list(each.path) for name, each in validation_sets(data).items()}
    for option, entries in (("data.blend", blend), ("data.validation", validation)):
        for name, paths in entries.items():
            yield from _empty_entries(f"`{option}` `{name}`", paths)
        missing = {name: _missing_token_files(paths) for name, paths in entries.items()}
        files = [file for each in missing.values() for file in each]
        if files:
            names = [f"`{short(name)}`" for name, each in missing.items() if each]
            yield (
                f"`{option}` {_first(names)} needs files that do not exist: {_first(files)}; give "
                "prefixes of .bin/.idx pairs that do"
            )


def _empty_entries(entry: str, paths: Sequence[str]) -> Iterator[str]:
    if not paths:
        yield f"{entry} ([]) is empty; give the prefix of a .bin/.idx pair"
    for path in paths:
        if is_url(path):
            if problem := why_not_opened(path):
                yield f"{entry} ({short(path)}): {problem}; install it, or copy the files to a disk"
        elif not token_file_prefixes(path):
            yield f"{entry}: no file matches the pattern {path}.idx; give one that matches some"


def _missing_token_files(paths: Sequence[str]) -> list[str]:
    """Return the files that are missing, each with the reason if that is another."""
    on_disk = [path for path in paths if not is_url(path)]
    prefixes = [prefix for path in on_disk for prefix in token_file_prefixes(path)]
    files = [f"{prefix}{ending}" for prefix in prefixes for ending in _ENDINGS]
    reasons = {file: why_missing(file) for file in files if not is_file(file)}
    unusual = {file: f" {why}" for file, why in reasons.items() if why.startswith("cannot")}
    return [f"{short(file)}{unusual.get(file, '')}" for file in reasons]


def _first(names: Sequence[str]) -> str:
    """Return the first few names of a list, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def tokenizer_exists(facts: Facts) -> Iterator[str]:
    """The tokenizer is a file, or a folder that holds one."""
    tokenizer = facts.config.data.tokenizer
    if tokenizer is None:
        return
    file = tokenizer_file(tokenizer)
    if not is_file(file):
        why = why_missing(file) or "is not a file"
        yield (
            f"`data.tokenizer` ({short(tokenizer)}) needs a file, but {short(file)} {why}; give a "
            "tokenizer.json or its folder, or null for the built-in one"
        )


def evaluation_has_data(facts: Facts) -> Iterator[str]:
    """Validation on your own training text needs your own validation text."""
    data, interval = facts.config.data, facts.config.training.eval_interval
    if interval > 0 and data.blend is not None and data.validation is None:
        yield (
            f"`training.eval_interval` ({interval}) needs `data.validation` (null) with "
            "`data.blend`; name a validation set, or set the interval to 0"
        )


RULES: tuple[Rule, ...] = (
    blend_has_sources,
    sources_have_one_amount,
    sources_have_the_same_unit,
    amounts_are_in_range,
    shares_are_not_tiny,
    source_names_differ,
    validation_has_sets,
    validation_names_are_free,
    validation_weights_are_complete,
    token_files_exist,
    tokenizer_exists,
    evaluation_has_data,
)
