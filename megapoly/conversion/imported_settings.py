"""What an imported model says about texts beside its weights: kept in the checkpoint for an export.

Training does not use these settings, and they are the model's, not the tokenizer's: another model
with the same tokenizer may stop elsewhere. An import writes them as ``imported_settings.json`` into
the checkpoint's tokenizer folder, which all runs that go on from it name in ``data.tokenizer``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megapoly.config.yaml_text import LARGEST_FILE_BYTES, read_yaml
from megapoly.conversion.safetensors_reader import read_json
from megapoly.errors import CheckpointError

FILE_NAME = "imported_settings.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Fields of a model card that stay true of a model that is made from it.
_CARD = ("license", "license_name", "license_link", "language", "datasets")
# Settings of generation that name tokens by their ids.
_LISTS_OF_IDS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "force_words_ids",
    "sequence_bias",
    "suppress_tokens",
)
# transformers writes 1e30 into tokenizer_config.json for "no limit is known".
_NO_LIMIT = 10**9


@dataclasses.dataclass(frozen=True)
class ImportedSettings:
    """Settings of a Hugging Face folder.

    Args:
        token_ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` of ``config.json``, if
            they are there; null is a value.
        generation: content of ``generation_config.json``; without one, what ``config.json`` says
            about generation.
        max_position_embeddings: of ``config.json``.
        model_max_length: of ``tokenizer_config.json``; None if it sets no limit.
        card: licence, languages and data of the model card.
    """

    token_ids: dict[str, Any]
    generation: dict[str, Any]
    max_position_embeddings: int
    model_max_length: int | None
    card: dict[str, Any]

    def write(self, tokenizer_folder: Path) -> None:
        """Write the settings to a checkpoint's tokenizer folder."""
        content = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        (tokenizer_folder / FILE_NAME).write_text(content + "\n", encoding="utf-8")

    def without_token_ids(self) -> ImportedSettings:
        """Return the settings that hold with every tokenizer."""
        generation = {
            name: value
            for name, value in self.generation.items()
            if "token_id" not in name and name not in _LISTS_OF_IDS
        }
        return dataclasses.replace(self, token_ids={}, generation=generation)

    def tokenizer_length(self, max_positions: int) -> int:
        """Return ``model_max_length`` for a model that was perhaps trained on longer texts."""
        if self.model_max_length is None or max_positions != self.max_position_embeddings:
            return max_positions
        return self.model_max_length


def load_settings(tokenizer_folder: Path) -> ImportedSettings | None:
    """Return the settings in a checkpoint's tokenizer folder; None if it was not imported.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = tokenizer_folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        return ImportedSettings(**read_json(path))
    except TypeError as error:
        raise CheckpointError(f"{path} is not a file that `megapoly import` wrote: {error}") from (
            error
        )


def settings_of_folder(
    folder: Path, config: Mapping[str, Any], *, vocab_size: int, max_positions: int
) -> tuple[ImportedSettings, list[str]]:
    """Return the settings of a Hugging Face folder, and notes on what of them is left out.

    Args:
        folder: the model.
        config: content of its ``config.json``.
        vocab_size: number of token ids of the model.
        max_positions: longest sequence that it takes.

    Raises:
        CheckpointError: a file is damaged, or a token id is not a number.
    """
    notes: list[str] = []
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else _generation_fields(config)
    ids = {name: config[name] for name in _IDS if name in config}
    for name, fields in (("config.json", ids), (path.name, generation)):
        notes += _leave_out_impossible_ids(fields, vocab_size, name)
    card, problem = _card_fields(folder / "README.md")
    settings = ImportedSettings(
        token_ids=ids,
        generation=generation,
        max_position_embeddings=max_positions,
        model_max_length=_tokenizer_limit(folder / "tokenizer_config.json"),
        card=card,
    )
    return settings, notes + problem


def _generation_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a ``config.json`` says about generation, as old releases of transformers did."""
    from transformers import GenerationConfig, PretrainedConfig

    names = set(GenerationConfig().to_dict()) - set(PretrainedConfig().to_dict()) - set(_IDS)
    names -= {"use_cache", "cache_implementation"}  # of every model's config.json
    return {name: config[name] for name in sorted(names) if config.get(name) is not None}


def _leave_out_impossible_ids(fields: dict[str, Any], vocab_size: int, file: str) -> list[str]:
    """Remove ids that the model does not have, such as a ``pad_token_id`` of -1."""
    notes = []
    for name in _IDS:
        given = fields.get(name)
        ids = given if isinstance(given, list) else [given]
        if not all(type(each) is int for each in ids if given is not None):
            raise CheckpointError(
                f"`{name}` in {file} must be a token id, a list of them or null; it is {given!r}."
            )
        possible = [each for each in ids if each is None or 0 <= each < vocab_size]
        if possible != ids:
            notes.append(
                f"`{name}` {given} in {file} is left out: ids are at least 0 and less than "
                f"{vocab_size}"
            )
            fields[name] = possible or None if isinstance(given, list) else None
    return notes


def _tokenizer_limit(path: Path) -> int | None:
    limit = read_json(path).get("model_max_length") if path.is_file() else None
    return int(limit) if limit is not None and limit < _NO_LIMIT else None


def _card_fields(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the fields at the head of a model card, and a note if they cannot be read."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    _, _, rest = text.partition("---\n")
    if not text.startswith("---\n") or "\n---" not in rest:
        return {}, []
    head = rest.partition("\n---")[0]
    try:
        fields = read_yaml(head) if len(head) <= LARGEST_FILE_BYTES else None
    except yaml.YAMLError:
        fields = None
    if not isinstance(fields, dict):
        return {}, [f"{path.name} has a head that is not YAML; license and language are not known"]
    card = {name: fields[name] for name in _CARD if fields.get(name)}
    # Through JSON, since YAML has dates and other types.
    return json.loads(json.dumps(card, default=str)), []
