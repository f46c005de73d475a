"""Check parity of a checkpoint and a Hugging Face folder: run both models and compare."""

from __future__ import annotations

import ctypes
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from torch import Tensor

from megapoly.conversion.architecture import (
    hf_config,
    is_polycom_release,
    max_positions,
    model_config,
)
from megapoly.conversion.engine_outputs import engine_module_outputs
from megapoly.conversion.folder_code import check_code, check_code_is_ours
from megapoly.conversion.module_outputs import ModuleOutputs
from megapoly.conversion.parity import Parity, differing_module, measure_parity
from megapoly.conversion.safetensors_reader import read_json, weight_files
from megapoly.conversion.transformers_classes import (
    class_without_remote_code,
    config_and_model_class,
)
from megapoly.conversion.transformers_outputs import transformers_module_outputs
from megapoly.conversion.transformers_tokenizer import open_in_transformers
from megapoly.data.builtin import builtin_documents
from megapoly.data.tokenizer import Tokenizer, load_tokenizer

NUM_TOKENS, TEXT_TOKENS = 256, 128
# Share of the free memory that a model may take; layers of a larger one stay on disk.
MEMORY_SHARE = 0.4
_M_MMAP_THRESHOLD, _LARGE_BYTES = -3, 1 << 20
_CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
_LAYERS_ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


def check_export_parity(
    checkpoint: Path, folder: Path, dtype: torch.dtype, tolerance: float, console: Console
) -> Parity:
    """Compare an export with its checkpoint; the export is loaded as users load it.

    That runs the code in the folder, which must have the bytes that this package writes.

    Args:
        checkpoint: an ``iter_*`` folder.
        folder: the export.
        dtype: dtype of the export's weights.
        tolerance: see :class:`megapoly.conversion.parity.Parity`.
        console: where to show progress.

    Raises:
        CheckpointError: the folder has other code.
    """
    check_code_is_ours(folder)
    tokenizer = load_tokenizer(folder)
    other_ids = {"other_ids": texts_tokenized_differently(folder, tokenizer)}
    return _compare(
        checkpoint, folder, tokenizer, other_ids, dtype, tolerance, console, run_code=True
    )


def check_import_parity(
    checkpoint: Path, folder: Path, dtype: torch.dtype, tolerance: float, console: Console
) -> Parity:
    """Compare an imported checkpoint with its source, whose own code is not run.

    Args:
        checkpoint: an ``iter_*`` folder with its tokenizer.
        folder: the source.
        dtype: dtype of the source's weights.
        tolerance: see :class:`megapoly.conversion.parity.Parity`.
        console: where to show progress.
    """
    tokenizer = load_tokenizer(checkpoint / "tokenizer")
    return _compare(checkpoint, folder, tokenizer, {}, dtype, tolerance, console, run_code=False)


def _compare(
    checkpoint: Path,
    folder: Path,
    tokenizer: Tokenizer,
    tokenizer_differences: dict[str, list[str]],
    dtype: torch.dtype,
    tolerance: float,
    console: Console,
    *,
    run_code: bool,
) -> Parity:
    _return_freed_memory()
    longest = max_positions(read_json(folder / "config.json"))
    tokens = sample_tokens(tokenizer, longest)
    far = far_positions(tokens.shape[1], longest)
    positions = torch.cat([torch.arange(tokens.shape[1]).expand_as(tokens), far])
    with console.status("comparing: running the checkpoint's model"):
        texts = torch.cat([tokens, tokens[:1]])
        expected = engine_module_outputs(checkpoint, texts, positions, dtype)
    with (
        console.status("comparing: running the model in transformers"),
        tempfile.TemporaryDirectory(prefix="megapoly-parity-") as offload,
    ):
        model, loading = load_folder(folder, Path(offload), run_code=run_code)
        result = measure_parity(
            expected,
            _outputs_near_and_far(model, tokens, far, expected),
            tokens,
            loading | tokenizer_differences,
            weights=str(dtype).removeprefix("torch."),
            tolerance=tolerance,
            last_position=int(positions.max()),
        )
        if result.passed:
            return result
        alone = _outputs_near_and_far(model, tokens, far, expected, alone=True)
    return dataclasses.replace(result, first_difference=differing_module(expected, alone))


def _outputs_near_and_far(
    model: Any, tokens: Tensor, far: Tensor, expected: ModuleOutputs, *, alone: bool = False
) -> ModuleOutputs:
    """Run a model of transformers at the first positions, then at far ones.

    In one batch, a scaling that depends on the largest position would be the same for both.

    Args:
        model: see :func:`transformers_module_outputs`.
        tokens: [b, s].
        far: [1, s] positions for the first text.
        expected: outputs of the checkpoint's model on all of them.
        alone: give each module the outputs of the checkpoint's model.
    """

    def run(texts: Tensor, which: slice, positions: Tensor | None) -> ModuleOutputs:
        replacements = expected.texts(which) if alone else None
        return transformers_module_outputs(
            model, texts, expected.probe_rows, positions=positions, replacements=replacements
        )

    num_texts = len(tokens)
    outputs = run(tokens, slice(num_texts), None)
    outputs.append(run(tokens[:1], slice(num_texts, None), far))
    return outputs


def far_positions(length: int, longest: int) -> Tensor:
    """Return positions [1, length] of a text with a gap: half at the start, half far from it.

    The text ends at twice the longest sequence. Some scalings of rotary positions set in only
    beyond it (``dynamic``), others before; the embedding of models here is the same everywhere.

    Args:
        length: number of tokens, at most ``longest``.
        longest: longest sequence that the model takes.
    """
    half = length // 2
    return torch.cat([torch.arange(half), torch.arange(half - length, 0) + 2 * longest])[None]


def sample_tokens(tokenizer: Tokenizer, max_length: int) -> Tensor:
    """Return 256 ids [b, s] of the built-in books' validation part, s at most ``max_length``."""
    length = min(TEXT_TOKENS, max_length)
    num_rows = NUM_TOKENS // length
    texts = [d.text for d in builtin_documents() if d.split == "validation"]
    from_each = -(-num_rows // len(texts))
    rows = []
    for text in texts:
        ids = tokenizer.encode(text[: 16 * length * from_each])
        rows += [ids[i * length : (i + 1) * length] for i in range(from_each)]
    full = [row for row in rows if len(row) == length]
    return torch.tensor(full[:: max(1, len(full) // num_rows)][:num_rows])


def texts_tokenized_differently(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Return the start of each text that transformers encodes differently from training.

    Special tokens at the start of a text do not count; the tokenizer's files decide about them.
    """
    others = open_in_transformers(folder, run_code=True)
    found = []
    for document in builtin_documents()[::40]:
        text = f" {document.text[:500]}  \n\n\n{document.text[500:520]}\n"
        ids = others(text, add_special_tokens=False, verbose=False)["input_ids"]
        if ids != tokenizer.encode(text):
            found.append(text[:40])
    return found


def load_folder(folder: Path, offload: Path, *, run_code: bool) -> tuple[Any, dict[str, list[str]]]:
    """Load the model of a folder in fp32; the layers of a large model stay on disk.

    Args:
        folder: folder of the model.
        offload: folder to keep layers in, as long as the model is used.
        run_code: use the code in the folder, as users do; otherwise this package's classes.

    Returns:
        The model, and the keys that did not fit, by kind.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # Pickled weights beside the safetensors are not opened.
    arguments: dict[str, Any] = {"trust_remote_code": run_code, "use_safetensors": True}
    config = read_json(folder / "config.json")
    if not is_embedded(config.get("pad_token_id"), config):
        arguments["pad_token_id"] = None  # transformers makes no embedding with it
    if is_polycom_release(config):
        arguments["config"], opener = release_model(folder)
    elif run_code:
        opener = AutoModelForCausalLM
    else:
        check_code(folder)
        opener = class_without_remote_code(config)
    if fp32_bytes(folder) > free_memory_bytes() * MEMORY_SHARE:
        arguments |= {"device_map": _LAYERS_ON_DISK, "offload_folder": offload}
    model, info = opener.from_pretrained(
        folder,
        local_files_only=True,
        dtype=torch.float32,
        output_loading_info=True,
        **arguments,
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return model.eval(), {kind: sorted(map(str, info.get(kind) or [])) for kind in kinds}


def is_embedded(token_id: Any, config: Mapping[str, Any]) -> bool:
    """Return whether the embedding has a row for an id; true for None. -1 is its last row."""
    size = config.get("vocab_size")
    return token_id is None or not isinstance(size, int) or -size <= token_id < size


def _return_freed_memory() -> None:
    """Make malloc return large blocks to the system when they are freed.

    By default glibc keeps blocks of up to 32 MB once one was freed. Small, long-lived objects then
    occupy the space of an expert's matrices, and the next layer's matrices go elsewhere. Peak
    memory for the 6.9B mixture was 7 GB without this setting and 3 GB with it (glibc 2.36).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc only
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def release_model(folder: Path) -> tuple[Any, Any]:
    """Return configuration and class for a PolyCom release, whose own code is not published.

    Its tensors are named as in this project's exports, so the classes of exports open it.
    """
    path = folder / "config.json"
    config = read_json(path)
    fields = hf_config(
        model_config(config, source=str(path)),
        seq_length=max_positions(config),
        dtype="float32",
        bos=None,
        eos=0,
        pad=None,
    )
    return config_and_model_class(fields)


def free_memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how much memory this process can still take on the machine and in its container.

    Args:
        cgroup: folder of the container's limits, of either version of control groups.
    """
    free = [psutil.virtual_memory().available]
    for limit, used in _CGROUP_FILES:
        try:
            free.append(int((cgroup / limit).read_text()) - int((cgroup / used).read_text()))
        except (OSError, ValueError):  # the other version, or no limit ("max")
            continue
    return max(0, min(free))


def fp32_bytes(folder: Path) -> int:
    """Return the size of a folder's weights in fp32."""
    from safetensors import safe_open

    total = 0
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            shapes = (file.get_slice(name).get_shape() for name in file.keys())  # noqa: SIM118
            total += 4 * sum(torch.Size(shape).numel() for shape in shapes)
    return total
