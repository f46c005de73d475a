"""Token ids and generation settings of an export."""

from __future__ import annotations

import dataclasses
from typing import Any

from megapoly.conversion.imported_settings import ImportedSettings
from megapoly.conversion.tokenizer_files import SpecialTokenIds


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """What an export's ``config.json`` and ``generation_config.json`` say about texts.

    Args:
        bos: id before a text; None if there is none.
        eos: id or ids that end a text.
        pad: id of padding; None if no id is padding alone, since transformers does not train the
            embedding of this id.
        generation: content of ``generation_config.json``.
        notes: messages about ids that were added.
    """

    bos: int | None
    eos: int | list[int]
    pad: int | None
    generation: dict[str, Any]
    notes: list[str]


def text_settings(special: SpecialTokenIds, imported: ImportedSettings | None) -> TextSettings:
    """Return the settings of an export.

    A model that was imported keeps those of its source; the id that ends a document in training is
    added to those that end a text. Every other model generates greedily up to the end of a
    document.

    Args:
        special: ids of the tokenizer.
        imported: settings of the source; None if the model was not imported.
    """
    ids = {} if imported is None else imported.token_ids
    generation = {} if imported is None else dict(imported.generation)
    eos = _with(ids.get("eos_token_id"), special.eos)
    settings = TextSettings(
        bos=ids.get("bos_token_id", special.bos),
        eos=eos,
        pad=ids.get("pad_token_id", None if special.pad == special.eos else special.pad),
        generation=generation,
        notes=[],
    )
    for name, stops in (("config.json", ids), ("generation_config.json", generation)):
        given = stops.get("eos_token_id")
        if given is not None and _with(given, special.eos) != given:
            settings.notes.append(
                f"`eos_token_id` in {name} is {_with(given, special.eos)}: the source's ({given}), "
                f"and the id that ends a document in training ({special.eos})"
            )
    for name, value in (
        ("bos_token_id", settings.bos),
        ("eos_token_id", eos),
        ("pad_token_id", special.pad if settings.pad is None else settings.pad),
    ):
        if generation.get(name) is None:
            generation[name] = value
    generation["eos_token_id"] = _with(generation["eos_token_id"], special.eos)
    return settings


def _with(given: int | list[int] | None, eos: int) -> int | list[int]:
    """Return ids that end a text, with the end of a document among them."""
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if eos in ids:
        assert given is not None
        return given
    return [*ids, eos] if ids else eos
