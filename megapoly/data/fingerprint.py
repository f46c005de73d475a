"""Description of the training data in a checkpoint, and how two descriptions differ.

A description holds everything that the sequence of samples depends on, and names and paths for the
reader. Names and paths may change. Validation data is not part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megapoly.data.blend import Blend
    from megapoly.data.samples import SamplePool

Description = dict[str, Any]


def describe(blend: Blend, *, tokenizer: str, seq_length: int, seed: int) -> Description:
    """Describe training data.

    Args:
        blend: the sources.
        tokenizer: fingerprint of the tokenizer.
        seq_length: tokens in a sample.
        seed: seed of the sample order.

    Returns:
        Plain values that can be written as JSON.
    """
    sources = [
        {
            "name": source.name,
            "path": source.path,
            "share": float(source.share),
            "tokens": source.num_tokens,
            "fingerprint": source.fingerprint,
        }
        for source in blend.sources
    ]
    return {"sources": sources, "tokenizer": tokenizer, "seq_length": seq_length, "seed": seed}


def fingerprint(description: Description) -> str:
    """Return 16 hexadecimal digits that change when the sequence of samples changes."""
    sources = [(source["fingerprint"], source["share"]) for source in description["sources"]]
    parts = [sources, *(description[key] for key in ("seq_length", "seed", "tokenizer"))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def fingerprint_of_sets(sets: Mapping[str, SamplePool]) -> str:
    """Return 16 hexadecimal digits that change with the files of validation sets."""
    parts = {name: [file.fingerprint for file in pool.token_files] for name, pool in sets.items()}
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def differences(saved: Description, current: Description) -> list[str]:
    """Return what makes the samples of two descriptions differ, one sentence each; [] if nothing.

    Args:
        saved: description in a checkpoint.
        current: description of this run.
    """
    named = {"seq_length": "`training.seq_length`", "seed": "`data.seed`"}
    found = list(_source_differences(saved["sources"], current["sources"]))
    found += [
        f"{option} is {current[key]} here and {saved[key]} in the checkpoint"
        for key, option in named.items()
        if current[key] != saved[key]
    ]
    if current["tokenizer"] != saved["tokenizer"]:
        found.append(
            f"the tokenizer is another one (SHA-256 {current['tokenizer'][:12]}.. here, "
            f"{saved['tokenizer'][:12]}.. in the checkpoint)"
        )
    return found


def _source_differences(saved: list[Any], current: list[Any]) -> Iterator[str]:
    """Match sources by content first, then the remaining ones by name."""
    pairs, left = [], list(saved)
    for source in current:
        match = next((s for s in left if s["fingerprint"] == source["fingerprint"]), None)
        if match is not None:
            left.remove(match)
            pairs.append((match, source))
    unpaired = [source for source in current if all(source is not mine for _, mine in pairs)]
    for source in unpaired:
        match = next((s for s in left if s["name"] == source["name"]), None)
        if match is None:
            yield f"source `{source['name']}` ({source['path']}) was added"
        else:
            left.remove(match)
            yield (
                f"the files of source `{source['name']}` changed ({match['tokens']:,} tokens in "
                f"the checkpoint at {match['path']}, {source['tokens']:,} here at {source['path']})"
            )
    for source in left:
        yield f"source `{source['name']}` ({source['path']}) was removed"
    for theirs, mine in pairs:
        if theirs["share"] != mine["share"]:
            yield (
                f"the share of source `{mine['name']}` is {mine['share']:.6g} here and "
                f"{theirs['share']:.6g} in the checkpoint"
            )
    if len(pairs) == len(saved) == len(current) and [theirs for theirs, _ in pairs] != saved:
        names = [", ".join(f"`{s['name']}`" for s in sources) for sources in (current, saved)]
        yield f"the sources are in another order ({names[0]} here, {names[1]} in the checkpoint)"
