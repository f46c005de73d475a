"""Open a folder's tokenizer in transformers, and the ids that it adds to a text."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from megapoly.data.special_tokens import CONFIG_NAME, read_object
from megapoly.data.tokenizer import ignore_truncation_and_padding

_PROBE = "a"


def open_in_transformers(folder: Path, *, run_code: bool) -> Any:
    """Open the tokenizer of a folder as ``AutoTokenizer`` does; nothing is downloaded.

    Args:
        folder: with a ``tokenizer.json`` or the files of its own class.
        run_code: execute code in the folder (``trust_remote_code``). Without it, a tokenizer that
            needs code is read from its ``tokenizer.json``.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    arguments: dict[str, Any] = {"local_files_only": True}
    has_file = (folder / "tokenizer.json").is_file()
    if has_file and "tokenizer_file" in read_object(folder / CONFIG_NAME):
        # transformers 4.57 would read the file that this names, wherever it is.
        arguments["tokenizer_file"] = str(folder / "tokenizer.json")
    tokenizer = None
    # A class that is unknown, needs code or needs a library that is missing.
    with contextlib.ExitStack() as stack:
        if not run_code and has_file:
            stack.enter_context(contextlib.suppress(ImportError, KeyError, OSError, ValueError))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=run_code, **arguments)
    if tokenizer is None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **arguments)
    library = getattr(tokenizer, "backend_tokenizer", None)
    if library is not None:
        ignore_truncation_and_padding(library, folder / "tokenizer.json")
    return tokenizer


@dataclasses.dataclass(frozen=True)
class AddedIds:
    """Ids that a tokenizer adds to a text.

    Args:
        prefix: before it, such as ``<s>``.
        suffix: after it.
    """

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    @classmethod
    def between(cls, text: list[int], full: list[int]) -> AddedIds:
        """Compare the ids of one text without and with what is added."""
        for start in range(len(full) - len(text) + 1):
            if full[start : start + len(text)] == text:
                return cls(tuple(full[:start]), tuple(full[start + len(text) :]))
        return cls()


def added_by_transformers(folder: Path) -> AddedIds:
    """Return the ids that the tokenizer of a folder adds in transformers, by its class or files."""
    tokenizer = open_in_transformers(folder, run_code=False)
    text, full = (
        tokenizer(_PROBE, add_special_tokens=added)["input_ids"] for added in (False, True)
    )
    return AddedIds.between(text, full)
