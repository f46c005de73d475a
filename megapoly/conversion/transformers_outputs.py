"""Outputs of a model's modules in transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from megapoly.conversion.module_outputs import ModuleOutputs, row_projections


def transformers_module_outputs(
    model: Any,
    tokens: Tensor,
    rows: Mapping[str, Tensor],
    *,
    positions: Tensor | None = None,
    replacements: ModuleOutputs | None = None,
) -> ModuleOutputs:
    """Run a model of transformers and record its modules' outputs.

    Args:
        model: Llama, OLMoE or this project's model, as ``AutoModelForCausalLM`` opens it.
        tokens: [b, s].
        rows: rows that reach every expert, by the module of the experts.
        positions: [b, s] position ids; None: the model counts from 0.
        replacements: outputs to go on with in place of each module's own, so that an error in one
            module does not reach the next; None: the model's own.
    """
    outputs = ModuleOutputs()
    arguments: dict[str, Tensor] = {}
    if positions is not None:
        # Without a mask, transformers takes a gap between positions for the end of a text.
        mask = torch.ones_like(tokens)
        arguments = {"position_ids": positions, "attention_mask": mask}
    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            if _is_compared(name):
                hooks.callback(_record_output(module, name, outputs, replacements))
            elif name.endswith(".mlp.gate"):
                place = name.removesuffix(".gate")
                mlp = model.get_submodule(place)
                hooks.callback(
                    _record_routing(module, mlp, place, model.config, rows[place], outputs)
                )
        logits = model(input_ids=tokens, use_cache=False, **arguments).logits
        outputs.record("lm_head", logits)
        outputs.embedding = row_projections(model.get_input_embeddings().weight)
    return outputs


_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")


def _is_compared(name: str) -> bool:
    path = name.split(".")
    if name in ("model.embed_tokens", "model.norm"):
        return True
    if path[:2] != ["model", "layers"]:
        return False
    return len(path) == 3 or path[3:] in [
        *([part] for part in _PARTS),
        *(["self_attn", part] for part in _PROJECTIONS),
    ]


def _record_output(
    module: Any, name: str, outputs: ModuleOutputs, replacements: ModuleOutputs | None
) -> Callable[[], None]:
    def hook(_: Any, __: Any, output: Any) -> Any:
        own = output[0] if isinstance(output, tuple) else output
        outputs.record(name, own)
        other = None if replacements is None else replacements.outputs.get(name)
        if other is None or other.numel() != own.numel():
            return output
        other = other.reshape(own.shape).to(own.dtype).contiguous()
        return (other, *output[1:]) if isinstance(output, tuple) else other

    return module.register_forward_hook(hook).remove


def _record_routing(
    gate: Any, mlp: Any, place: str, config: Any, rows: Tensor, outputs: ModuleOutputs
) -> Callable[[], None]:
    """Record the router's choices on the text and on the rows that reach every expert."""
    routed: dict[str, Tensor] = {}

    def record_probs(_: Any, __: Any, output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output  # [tokens, experts]
        probs = logits.float().softmax(-1)
        kept, chosen = probs.topk(config.num_experts_per_tok, dim=-1)
        if config.norm_topk_prob:
            kept = kept / kept.sum(-1, keepdim=True)
        routed["probs"] = torch.zeros_like(probs).scatter(-1, chosen, kept)

    def probe(_: Any, inputs: Any, __: Any) -> None:
        outputs.probs[place] = routed["probs"].view(*inputs[0].shape[:2], -1)
        output = mlp.forward(rows)
        first = output[0] if isinstance(output, tuple) else output
        outputs.probe_outputs[place] = first.detach().float().clone(), routed["probs"][None]

    hooks = (gate.register_forward_hook(record_probs), mlp.register_forward_hook(probe))

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return remove
