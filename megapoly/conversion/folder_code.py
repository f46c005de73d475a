"""Code in a Hugging Face folder: which files ``trust_remote_code`` runs, and who wrote them.

Nothing here runs code. A command runs it only with ``--trust-remote-code``; without it, this
package's classes open exports, and classes of transformers open what they know.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megapoly.config.command_line import TRUST_CODE
from megapoly.conversion.architecture import CODE_FILES, MODEL_TYPE
from megapoly.conversion.safetensors_reader import read_json
from megapoly.data.special_tokens import CONFIG_NAME, read_object
from megapoly.errors import CheckpointError

_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
PACKAGED_CODE = Path(__file__).parent / "remote_code"
# Replaces `generate` of every model in the folder.
_GENERATE = "custom_generate/generate.py"


def code_of_others(folder: Path) -> list[str]:
    """Return the files that ``trust_remote_code`` would run and that this version did not write.

    These are the modules that ``auto_map`` names in ``config.json`` and ``tokenizer_config.json``,
    the modules beside them, which they can import, and ``custom_generate/generate.py``. A file of
    an export counts only if its bytes are not those of this package.

    Args:
        folder: with a ``config.json``.

    Returns:
        Names in the folder, or ``FILE of REPOSITORY`` for code that is elsewhere.

    Raises:
        CheckpointError: ``config.json`` is missing or damaged.
        DataError: ``tokenizer_config.json`` is damaged.
    """
    found = {_GENERATE} if (folder / _GENERATE).is_file() else set()
    for content in (read_json(folder / "config.json"), read_object(folder / CONFIG_NAME)):
        for reference in _references(content.get("auto_map")):
            repository, _, place = reference.rpartition("--")
            name = place.rpartition(".")[0] + ".py"
            if repository:
                found.add(f"{name} of {repository}")
            else:
                found |= {name, *(path.name for path in folder.glob("*.py"))}
    return sorted(name for name in found if not _is_ours(folder, name))


def check_code(folder: Path) -> None:
    """Refuse a model that needs code in its folder, before transformers asks on the terminal.

    Raises:
        CheckpointError: neither this package nor transformers has a class for it, or its
            ``config.json`` names kernels of the hub, which transformers would download and run.
    """
    config = read_json(folder / "config.json")
    if kernels := list(_kernels(config)):
        raise CheckpointError(
            f"`{folder}/config.json` names kernels of the hub, which transformers may download and "
            f"run, and such code is not run: {', '.join(kernels)}. Remove the entry to compute "
            f"with torch, or add `{TRUST_CODE}`."
        )
    if not code_of_others(folder) or _has_class(config):
        return
    raise CheckpointError(
        f"`{folder}` has a model (`model_type` {config.get('model_type')}) that only code of its "
        f"own opens, and such code is not run: {_listed(folder)}. Read it, then add "
        f"`{TRUST_CODE}` to run it with your rights."
    )


def note_on_code(folder: Path) -> str | None:
    """Return a sentence about code that is not run; None if this version wrote all of it.

    Raises:
        CheckpointError: as :func:`check_code`.
    """
    check_code(folder)
    if not code_of_others(folder):
        return None
    config = read_json(folder / "config.json")
    classes = "this package's" if config.get("model_type") == MODEL_TYPE else "transformers' own"
    return f"code in {folder} is not run ({_listed(folder)}): {classes} classes open the model"


def check_code_is_ours(folder: Path) -> None:
    """Check that all code in a folder has the bytes that this version writes.

    Raises:
        CheckpointError: other code is there.
    """
    if code_of_others(folder):
        raise CheckpointError(
            f"`{folder}` must have no code but what `megapoly export` writes; {_listed(folder)} "
            "was put there or changed, and is not run. Export again."
        )


def _listed(folder: Path) -> str:
    return ", ".join(code_of_others(folder))


def _references(auto_map: Any) -> Iterator[str]:
    """Yield the references to classes, ``MODULE.CLASS`` or ``REPOSITORY--MODULE.CLASS``."""
    if isinstance(auto_map, str):
        yield auto_map
    elif isinstance(auto_map, dict | list):
        for value in auto_map.values() if isinstance(auto_map, dict) else auto_map:
            yield from _references(value)


def _kernels(value: Any) -> Iterator[str]:
    """Yield the entries of a configuration that transformers loads with the package ``kernels``.

    A name with a slash is a repository. Flash attention is one, if its own package is missing.
    """
    for name, entry in value.items() if isinstance(value, dict) else ():
        names = entry.values() if isinstance(entry, dict) else [entry]
        if name.removeprefix("_") in _IMPLEMENTATIONS:
            for each in names:
                if isinstance(each, str) and ("/" in each or "flash" in each):
                    yield f"`{name}` {each}"
        else:
            yield from _kernels(entry)


def _is_ours(folder: Path, name: str) -> bool:
    if name not in CODE_FILES:
        return False
    path = folder / name
    return path.is_file() and path.read_bytes() == (PACKAGED_CODE / name).read_bytes()


def _has_class(config: dict[str, Any]) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    return kind == MODEL_TYPE or isinstance(kind, str) and kind in CONFIG_MAPPING
