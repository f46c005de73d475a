"""README.md of an exported model: what it is, how it was trained, how well it was converted."""

from __future__ import annotations

import json
from typing import Any

import yaml

import megapoly
from megapoly.config import to_yaml
from megapoly.huggingface.checkpoint_reader import CheckpointReader
from megapoly.huggingface.parity import Parity

_SOURCE = "https://arxiv.org/abs/2411.03884"


def model_card(reader: CheckpointReader, config: dict[str, Any], parity: Parity | None) -> str:
    """The card's text.

    Args:
        reader: of the checkpoint.
        config: content of ``config.json``.
        parity: the comparison; None: skipped.
    """
    model, run = reader.config.model, reader.run
    remote = config["model_type"] == "megapoly"
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["megapoly", "polycom", model.activation],
    }
    experts = f", {model.num_moe_experts} experts, top-{model.moe_router_topk}"
    rows = {
        "architecture": f"`{config['model_type']}`, {model.num_layers} layers, width "
        f"{model.hidden_size}, {model.num_attention_heads} heads"
        + (experts if model.num_moe_experts else ""),
        "activation": f"`{model.activation}`",
        "parameters": f"{_num_parameters(reader):,}",
        "weights": config["dtype"],
        "trained": f"{run.get('iteration', 0):,} steps, {run.get('consumed_tokens', 0):,} tokens",
        "data fingerprint": f"`{run.get('data_fingerprint')}`",
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
        to_yaml(reader.config).rstrip(),
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


def _training_data(description: dict[str, Any] | None) -> list[str]:
    if description is None:  # an imported model
        return []
    return ["## Training data", "", "```json", json.dumps(description, indent=2), "```", ""]


def _num_parameters(reader: CheckpointReader) -> int:
    from megapoly.huggingface.tensor_map import links

    return sum(link.num_elements for link in links(reader.config.model))
