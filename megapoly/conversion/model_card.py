"""Model card (README.md) of an export: architecture, training, and result of the comparison."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import yaml

import megapoly
from megapoly.activations import registry
from megapoly.config import Config, to_yaml
from megapoly.config.data_sources import validation_sets
from megapoly.config.schema import BlendSource, ValidationSet
from megapoly.conversion.checkpoint_reader import CheckpointReader
from megapoly.conversion.parity import Parity
from megapoly.conversion.tensor_map import tensor_mappings

_SOURCE = "https://arxiv.org/abs/2411.03884"


def model_card(
    reader: CheckpointReader,
    config: dict[str, Any],
    parity: Parity | None,
    known: dict[str, Any],
) -> str:
    """Return the text of the card.

    Args:
        reader: reader of the checkpoint.
        config: content of ``config.json``.
        parity: the comparison; None if it was skipped.
        known: ``license``, ``language`` and ``datasets`` by the names of the Hugging Face Hub, as
            far as they are known.
    """
    model, run = reader.config.model, reader.run
    has_coefficients = registry.get(model.activation).has_coefficients
    remote = config["model_type"] == "megapoly"
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **_language(reader),
        **known,
        "tags": ["megapoly", *(["polycom"] if has_coefficients else []), model.activation],
    }
    experts = f", {model.num_moe_experts} experts, top-{model.moe_router_topk}"
    rows = {
        "architecture": f"`{config['model_type']}`, {model.num_layers} layers, width "
        f"{model.hidden_size}, {model.num_attention_heads} heads"
        + (experts if model.num_moe_experts else ""),
        "activation": f"`{model.activation}`",
        "parameters": f"{_num_parameters(reader):,}",
        "weights": config["dtype"],
        **_training(run),
        "conversion": "not compared with the checkpoint" if parity is None else parity.summary(),
        "written by": f"megapoly {megapoly.__version__}",
    }
    trust = ", trust_remote_code=True" if remote else ""
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {model.activation} language model",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained(FOLDER{trust})",
        f"tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust})",
        'ids = tokenizer("Call me", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))",
        "```",
        "",
        *(_POLYCOM if remote else ()),
        *_training_data(run.get("data")),
        "## Training configuration",
        "",
        "```yaml",
        to_yaml(_without_local_paths(reader.config)).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


_POLYCOM = (
    f"The FFN's activation is a learnable polynomial ([PolyCom]({_SOURCE})). Its coefficients are",
    "`act_fn.weight`, highest power first, and `act_fn.bias`. The code of the model is in this",
    "folder (`modeling_megapoly.py`); it needs torch and transformers.",
    "",
)


def _language(reader: CheckpointReader) -> dict[str, list[str]]:
    """Return the language of a model that has seen the built-in text alone."""
    run, settings = reader.run, reader.config
    alone = settings.data.blend is None and settings.checkpoint.load is None
    return {"language": ["en"]} if alone and not run.get("weights_only") else {}


def _training(run: dict[str, Any]) -> dict[str, str]:
    if run.get("weights_only"):
        return {"made from": f"`{run.get('imported_from')}`"}
    return {
        "trained": f"{run['iteration']:,} steps, {run['consumed_tokens']:,} tokens",
        "data fingerprint": f"`{run['data_fingerprint']}`",
    }


def _training_data(description: dict[str, Any] | None) -> list[str]:
    if description is None:  # an imported model
        return []
    sources = [
        {name: value for name, value in source.items() if name != "path"}
        for source in description["sources"]
    ]
    content = json.dumps(description | {"sources": sources}, indent=2)
    return ["## Training data", "", "```json", content, "```", ""]


def _without_local_paths(config: Config) -> Config:
    """Return the configuration without folders of the machine that the model was trained on."""
    config = copy.deepcopy(config)
    config.run_dir = Path(config.run_dir).name
    config.data.cache_dir = None
    if config.data.tokenizer is not None:
        config.data.tokenizer = Path(config.data.tokenizer).name
    for source in config.data.blend or []:
        assert isinstance(source, BlendSource), "resolved"
        source.path, source.name = Path(source.path).name, Path(str(source.name)).name
    for name, each in validation_sets(config.data).items():
        assert config.data.validation is not None
        files = [Path(path).name for path in each.path]
        config.data.validation[name] = ValidationSet(files, each.weight)
    if config.checkpoint.load is not None:
        config.checkpoint.load = Path(config.checkpoint.load).name
    if config.training.eval_tasks_data is not None:
        config.training.eval_tasks_data = Path(config.training.eval_tasks_data).name
    return config


def _num_parameters(reader: CheckpointReader) -> int:
    return sum(each.num_elements for each in tensor_mappings(reader.config.model))
