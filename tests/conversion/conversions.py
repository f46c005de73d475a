"""Functions that tests of conversions run in a process of their own, which the engine needs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from megapoly.conversion import parity_check
from megapoly.conversion.engine_outputs import engine_model
from megapoly.conversion.export_model import ExportOptions, export_model
from megapoly.conversion.import_model import ImportOptions, import_model
from megapoly.conversion.parity import TOLERANCE
from megapoly.conversion.transformers_model import load_transformers_model
from megapoly.data.tokenizer import BUILTIN_TOKENIZER, load_tokenizer

QUIET = Console(quiet=True)
NUM_NEW_TOKENS = 12
SIZES = {
    "vocab_size": 4099,  # no multiple of anything
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def saved(model, folder, dtype=torch.float32):
    """A folder of a model with random norms, and the built-in tokenizer."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(dtype).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(BUILTIN_TOKENIZER), eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    return folder


def llama(folder, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return saved(LlamaForCausalLM(LlamaConfig(**(SIZES | changes))), folder, dtype)


def quiet():
    import warnings

    warnings.filterwarnings("ignore")


def export_and_compare(pairs):
    """Return for each checkpoint and output the parity, and how both models continue a text."""
    quiet()
    results = []
    for checkpoint, output in pairs:
        result = export_model(ExportOptions(checkpoint, output), QUIET)
        prompt = parity_check.sample_tokens(load_tokenizer(output), 8)[:1]
        results.append(
            (
                result.to_dict(),
                greedy_of_engine(checkpoint, prompt),
                greedy_of_export(output, prompt),
            )
        )
    return results


def export_of_rank(checkpoint, folder):
    """Export in the environment of a job script, whose variables name other processes."""
    quiet()
    options = ExportOptions(checkpoint, folder / os.environ["RANK"])
    return export_model(options, QUIET).passed


def greedy_of_engine(checkpoint, tokens):
    with engine_model(checkpoint, torch.float32) as model, torch.no_grad():
        for _ in range(NUM_NEW_TOKENS):
            positions = torch.arange(tokens.shape[1])[None]
            logits = model(tokens, positions, attention_mask=None)[..., : model.real_vocab_size]
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0].tolist()


def greedy_of_export(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    )
    return continue_greedily(model, tokens)


def continue_greedily(model, tokens):
    ids = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=NUM_NEW_TOKENS,
        do_sample=False,
        eos_token_id=[],
        pad_token_id=0,
    )
    return ids[0].tolist()


def compare_broken(checkpoint, folder, breaks, work):
    """Return by the name of a break the comparison."""
    quiet()
    results = {}
    for name, change in breaks.items():
        broken = work / name
        shutil.copytree(folder, broken)
        (weights,) = broken.glob("*.safetensors")
        tensors, config = load_file(weights), json.loads((broken / "config.json").read_text())
        change(tensors, config)
        save_file({k: t.contiguous() for k, t in tensors.items()}, weights, {"format": "pt"})
        (broken / "config.json").write_text(json.dumps(config))
        result = parity_check.check_export_parity(
            checkpoint, broken, torch.float32, TOLERANCE, QUIET
        )
        results[name] = result.to_dict()
    return results


def export_broken(checkpoint, output):
    """Export with a mapping that has queries and keys swapped."""
    quiet()
    from megapoly.conversion import tensor_map

    right = tensor_map._attention_mappings

    def swapped(model, layer):
        mappings = list(right(model, layer))
        q, k = (next(x for x in mappings if f".{n}_proj" in x.name) for n in "qk")
        for mapping in mappings:
            if mapping is q or mapping is k:
                other = k if mapping is q else q
                mapping = type(mapping)(**(vars(mapping) | {"view": other.view}))
            yield mapping

    tensor_map._attention_mappings = swapped
    export_model(ExportOptions(checkpoint, output), QUIET)


def import_and_back(folder, checkpoint, back, options=()):
    """Import a folder and export the result; returns the report of the import."""
    quiet()
    report = import_model(ImportOptions(Path(folder), checkpoint, **dict(options)), QUIET)
    export_model(ExportOptions(checkpoint, back, skip_parity=True), QUIET)
    return report.to_dict()


def import_only(folder, checkpoint, options=()):
    quiet()
    return import_model(ImportOptions(Path(folder), checkpoint, **dict(options)), QUIET).to_dict()


def parity_with_layers_on_disk(checkpoint, folder):
    """Return the parity as for a model that does not fit in memory."""
    quiet()
    parity_check.MEMORY_SHARE = 0.0
    return parity_check.check_export_parity(
        checkpoint, folder, torch.float32, TOLERANCE, QUIET
    ).to_dict()


def open_in_memory(checkpoint, folder, tokens):
    """Return logits of a checkpoint that is converted in memory, and of its export."""
    quiet()
    ids = torch.tensor([tokens])
    with torch.no_grad():
        return [
            load_transformers_model(path, dtype=torch.float32)[0](ids).logits.numpy()
            for path in (checkpoint, folder)
        ]
