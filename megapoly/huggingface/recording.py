"""What every module of a model computes on some text, by the module's name in Hugging Face's form.

The checkpoint's own model is the engine's, and the engine says which of its weights lies where in
the checkpoint: nothing of :mod:`megapoly.huggingface.tensor_map` has a part in it. One layer at a
time is in memory.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapoly.config import Config
from megapoly.config.schema import ParallelConfig
from megapoly.huggingface.checkpoint_reader import CheckpointReader, read_description


@dataclasses.dataclass
class Recording:
    """Outputs in the order in which they were computed.

    Args:
        outputs: [b, s, ..] fp32 by module, such as ``model.layers.0.self_attn``; the last is
            ``lm_head``, the logits.
        probs: [b, s, experts] the router's probability of every expert, by the module of the
            experts; zero where an expert was not chosen.
    """

    outputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    probs: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def keep(self, name: str, output: Tensor) -> None:
        """Remember an output [b, s, ..]; heads are put together."""
        self.outputs[name] = output.detach().float().flatten(2).clone()

    @property
    def logits(self) -> Tensor:
        """[b, s, vocab]."""
        return self.outputs["lm_head"]


# --- the engine's model -------------------------------------------------------------------------


def record_checkpoint(checkpoint: Path, tokens: Tensor, dtype: torch.dtype) -> Recording:
    """Run the checkpoint's own model in fp32 on this process's CPU.

    Args:
        checkpoint: an ``iter_*`` folder.
        tokens: [b, s].
        dtype: that the weights are rounded to first.
    """
    recording = Recording()
    with engine_model(checkpoint, dtype) as model, ExitStack() as hooks:
        for remove in _engine_hooks(model, recording):
            hooks.callback(remove)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        with torch.no_grad():
            logits = model(tokens, positions, attention_mask=None)
        recording.keep("lm_head", logits[..., : model.real_vocab_size])
    return recording


@contextmanager
def engine_model(checkpoint: Path, dtype: torch.dtype) -> Iterator[Any]:
    """The engine's model of a checkpoint on CPU, its layers in memory only while they run."""
    from megapoly.platform import select_platform

    platform = select_platform("cpu")
    from megapoly.model.builder import gpt_model
    from megapoly.model.transformer_config import transformer_config
    from megapoly.training.distributed import process_groups

    config = _of_one_process(read_description(checkpoint)[0])
    with process_groups(config, platform):
        with torch.device("meta"):
            model = gpt_model(config, transformer_config(config, on_cpu=True))
        model.real_vocab_size = config.model.vocab_size
        load = _Loader(model, CheckpointReader(checkpoint), dtype)
        for i, layer in enumerate(model.decoder.layers):
            prefix = f"decoder.layers.{i}."
            layer.register_forward_pre_hook(lambda module, _, prefix=prefix: load(module, prefix))
            layer.register_forward_hook(lambda module, *_: _forget(module))
        for prefix in ("embedding.", "decoder.final_layernorm.", "output_layer."):
            load(model.get_submodule(prefix[:-1]), prefix)
        yield model.eval()


def _of_one_process(config: Config) -> Config:
    """The same model without any parallelism or GPU libraries, in fp32."""
    config = copy.deepcopy(config)
    config.parallel = ParallelConfig(expert_tensor_parallel_size=1, sequence_parallel=False)
    config.model.transformer_engine = False
    config.model.activation_backend = "reference"
    config.training.bf16, config.training.device = False, "cpu"
    return config


class _Loader:
    """Fills a module from the checkpoint, where the engine says that its weights are.

    Args:
        model: whose part the module is.
        reader: of the checkpoint.
        dtype: that weights are rounded to.
    """

    def __init__(self, model: Any, reader: CheckpointReader, dtype: torch.dtype):
        self.model, self.reader, self.dtype = model, reader, dtype

    @torch.no_grad()
    def __call__(self, module: torch.nn.Module, prefix: str) -> None:
        from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

        from megapoly.model.builder import checkpoint_metadata

        _allocate(module)
        entries = self.model.sharded_state_dict(metadata=checkpoint_metadata())
        for name, entry in entries.items():
            if not name.startswith(prefix):
                continue
            if isinstance(entry, ShardedTensorFactory):  # cuts a gated FC1 into its two halves
                for part in entry.build():
                    self._fill(part)
            elif isinstance(entry, ShardedTensor):
                self._fill(entry)

    def _fill(self, part: Any) -> None:
        """Read one part; padding of the vocabulary that the checkpoint lacks is zero."""
        stored = torch.zeros(part.data.shape, dtype=self.reader.dtype(part.key))
        self.reader.read_into(stored, part.key, part.global_offset)
        part.data.copy_(stored.to(self.dtype))


def _allocate(module: torch.nn.Module) -> None:
    """Give a module on the meta device memory, all of its parameters in one piece.

    A piece of this size goes back to the system as a whole. As one for each of 128 matrices of a
    layer, malloc kept half of the memory of every layer (64 experts of [1536, 2048], glibc 2.36).
    """
    sizes = {p: p.numel() for p in module.parameters()}
    memory = torch.empty(sum(sizes.values()))
    places = dict(zip(sizes, memory.split(list(sizes.values())), strict=True))
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            value = torch.nn.Parameter(places[parameter].view(parameter.shape), requires_grad=False)
            child.register_parameter(name, value)
        for name, buffer in child.named_buffers(recurse=False):
            child.register_buffer(name, torch.zeros_like(buffer, device="cpu"), persistent=False)


def _forget(module: torch.nn.Module) -> None:
    module.to("meta")


def _engine_hooks(model: Any, recording: Recording) -> Iterator[Callable[[], None]]:
    """Hooks on the engine's modules; theirs are [s, b, ..]."""

    def keep(module: torch.nn.Module, name: str) -> Callable[[], None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            recording.keep(name, first.transpose(0, 1))

        return module.register_forward_hook(hook).remove

    yield keep(model.embedding, "model.embed_tokens")
    for i, layer in enumerate(model.decoder.layers):
        place = f"model.layers.{i}"
        yield keep(layer.input_layernorm, f"{place}.input_layernorm")
        yield _keep_projections(layer.self_attention, f"{place}.self_attn", recording)
        yield keep(layer.self_attention, f"{place}.self_attn")
        yield keep(layer.pre_mlp_layernorm, f"{place}.post_attention_layernorm")
        if hasattr(layer.mlp, "router"):
            yield _keep_routing(layer.mlp.router, f"{place}.mlp", recording)
        yield keep(layer.mlp, f"{place}.mlp")
        yield keep(layer, place)
    yield keep(model.decoder.final_layernorm, "model.norm")


def _keep_projections(attention: Any, place: str, recording: Recording) -> Callable[[], None]:
    """Queries, keys and values, behind their norms if they have some."""
    project = attention.get_query_key_value_tensors
    part = "proj" if isinstance(attention.q_layernorm, type(None) | torch.nn.Identity) else "norm"

    def projected(*args: Any, **kwargs: Any) -> Any:
        result = project(*args, **kwargs)
        for name, tensor in zip(("q", "k", "v"), result, strict=False):
            which = "proj" if name == "v" else part
            recording.keep(f"{place}.{name}_{which}", tensor.transpose(0, 1))
        return result

    attention.get_query_key_value_tensors = projected

    def remove() -> None:
        del attention.get_query_key_value_tensors

    return remove


def _keep_routing(router: Any, place: str, recording: Recording) -> Callable[[], None]:
    def hook(_: Any, inputs: Any, output: Any) -> None:
        seq_length, batch = inputs[0].shape[:2]
        probs, chosen = (t.view(seq_length, batch, -1).transpose(0, 1) for t in output)
        recording.probs[place] = torch.where(chosen, probs, 0.0).float()

    return router.register_forward_hook(hook).remove


# --- the exported model -------------------------------------------------------------------------


def record_export(model: Any, tokens: Tensor) -> Recording:
    """Run an exported model.

    Args:
        model: of ``AutoModelForCausalLM``: Llama, OLMoE or this project's.
        tokens: [b, s].
    """
    recording = Recording()
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if _is_compared(name):
                hooks.callback(_keep_output(module, name, recording))
            elif name.endswith(".mlp.gate"):
                hooks.callback(_keep_export_routing(module, name, model.config, recording, tokens))
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits
    recording.keep("lm_head", logits)
    return recording


_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")


def _is_compared(name: str) -> bool:
    words = name.split(".")
    if name in ("model.embed_tokens", "model.norm"):
        return True
    if words[:2] != ["model", "layers"]:
        return False
    return len(words) == 3 or words[3:] in [
        *([part] for part in _PARTS),
        *(["self_attn", part] for part in _PROJECTIONS),
    ]


def _keep_output(module: Any, name: str, recording: Recording) -> Callable[[], None]:
    def hook(_: Any, __: Any, output: Any) -> None:
        recording.keep(name, output[0] if isinstance(output, tuple) else output)

    return module.register_forward_hook(hook).remove


def _keep_export_routing(
    gate: Any, name: str, config: Any, recording: Recording, tokens: Tensor
) -> Callable[[], None]:
    """The router's choice, from its weight: what the module returns differs between releases."""

    def hook(module: Any, inputs: Any, _: Any) -> None:
        hidden_states = inputs[0].reshape(-1, config.hidden_size).float()
        logits = torch.nn.functional.linear(hidden_states, module.weight.float())
        probs = logits.softmax(-1)
        kept, chosen = probs.topk(config.num_experts_per_tok, dim=-1)
        routed = torch.zeros_like(probs).scatter(-1, chosen, kept)
        recording.probs[name.removesuffix(".gate")] = routed.view(*tokens.shape, -1)

    return gate.register_forward_hook(hook).remove
