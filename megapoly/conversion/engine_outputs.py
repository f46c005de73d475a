"""Outputs of a checkpoint's own model, computed by the engine.

The engine says where each weight is in the checkpoint, so the result does not depend on
:mod:`megapoly.conversion.tensor_map`. One layer at a time is in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapoly.config import Config
from megapoly.config.resolve import without_gpu_kernels
from megapoly.config.schema import ParallelConfig
from megapoly.conversion.checkpoint_reader import CheckpointReader, read_description
from megapoly.conversion.module_outputs import ModuleOutputs, expert_probe_rows, row_projections


def engine_module_outputs(
    checkpoint: Path, tokens: Tensor, positions: Tensor, dtype: torch.dtype
) -> ModuleOutputs:
    """Run the checkpoint's own model in fp32 on this process's CPU.

    Args:
        checkpoint: an ``iter_*`` folder.
        tokens: [b, s].
        positions: [b, s] position of each token for the rotary embedding; every token attends to
            those before it in its row.
        dtype: weights are rounded to it first.
    """
    outputs = ModuleOutputs()
    with engine_model(checkpoint, dtype) as model, ExitStack() as hooks:
        for remove in _engine_hooks(model, outputs):
            hooks.callback(remove)
        hooks.callback(_set_positions(model, positions))
        with torch.no_grad():
            logits = model(tokens, positions, attention_mask=None)
        outputs.record("lm_head", logits[..., : model.real_vocab_size])
        embedding = model.embedding.word_embeddings.weight[: model.real_vocab_size]
        outputs.embedding = row_projections(embedding)
    return outputs


@contextmanager
def engine_model(checkpoint: Path, dtype: torch.dtype) -> Iterator[Any]:
    """Build the engine's model of a checkpoint on CPU; layers are in memory only while they run."""
    from megapoly.platform.device import select_platform

    platform = select_platform("cpu")
    from megapoly.model.builder import gpt_model
    from megapoly.model.transformer_config import transformer_config
    from megapoly.training.distributed import process_groups

    config = _single_process_config(read_description(checkpoint)[0])
    with process_groups(config, platform, alone=True):
        with torch.device("meta"):
            model = gpt_model(config, transformer_config(config, on_cpu=True))
        model.real_vocab_size = config.model.vocab_size
        model.has_qk_norm = config.model.qk_norm != "none"
        load = _Loader(model, CheckpointReader(checkpoint), dtype)
        for i, layer in enumerate(model.decoder.layers):
            prefix = f"decoder.layers.{i}."
            layer.register_forward_pre_hook(lambda module, _, prefix=prefix: load(module, prefix))
            layer.register_forward_hook(lambda module, *_: _forget(module))
        for prefix in ("embedding.", "decoder.final_layernorm.", "output_layer."):
            load(model.get_submodule(prefix[:-1]), prefix)
        yield model.eval()


def _single_process_config(config: Config) -> Config:
    """Return the configuration of the same model in fp32, without parallelism or GPU libraries."""
    config = copy.deepcopy(config)
    config.parallel = ParallelConfig(expert_tensor_parallel_size=1, sequence_parallel=False)
    without_gpu_kernels(config)
    config.model.activation_backend = "reference"
    config.training.bf16 = False
    return config


class _Loader:
    """Loader of one module from the places in the checkpoint that the engine names.

    Args:
        model: model that the modules belong to.
        reader: reader of the checkpoint.
        dtype: weights are rounded to it.
    """

    def __init__(self, model: Any, reader: CheckpointReader, dtype: torch.dtype):
        self.model, self.reader, self.dtype = model, reader, dtype

    @torch.no_grad()
    def __call__(self, module: torch.nn.Module, prefix: str) -> None:
        from megapoly.model.shards import shards_of, tensor_entries

        module.to_empty(device="cpu")
        for name, entry in tensor_entries(self.model).items():
            if name.startswith(prefix):
                for shard in shards_of(entry):
                    self._fill(shard)

    def _fill(self, shard: Any) -> None:
        """Read one shard; vocabulary padding that the checkpoint does not have is zero."""
        stored = torch.zeros(shard.data.shape, dtype=self.reader.dtype(shard.key))
        self.reader.read_into(stored, shard.key, shard.global_offset)
        shard.data.copy_(stored.to(self.dtype))


def _set_positions(model: Any, positions: Tensor) -> Callable[[], None]:
    """Rotate by given positions; the engine itself counts from 0 and ignores position ids."""
    distinct, index = positions.unique(return_inverse=True)

    def hook(rotary: Any, _: Any, __: Any) -> Tensor:
        angles = torch.cat([rotary.get_emb(1, offset=int(position)) for position in distinct])
        return angles[:, 0][index].transpose(0, 1)  # [s, b, 1, head width]

    return model.rotary_pos_emb.register_forward_hook(hook).remove


def _forget(module: torch.nn.Module) -> None:
    module.to("meta")


def _engine_hooks(model: Any, outputs: ModuleOutputs) -> Iterator[Callable[[], None]]:
    """Hook the engine's modules, whose outputs are [s, b, ..]; yield how to remove each hook."""

    def record(module: torch.nn.Module, name: str) -> Callable[[], None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            outputs.record(name, _of_tokens(output))

        return module.register_forward_hook(hook).remove

    yield record(model.embedding, "model.embed_tokens")
    for i, layer in enumerate(model.decoder.layers):
        place = f"model.layers.{i}"
        yield record(layer.input_layernorm, f"{place}.input_layernorm")
        part = "norm" if model.has_qk_norm else "proj"
        yield _record_projections(layer.self_attention, f"{place}.self_attn", part, outputs)
        yield record(layer.self_attention, f"{place}.self_attn")
        yield record(layer.pre_mlp_layernorm, f"{place}.post_attention_layernorm")
        yield record(layer.mlp, f"{place}.mlp")
        if hasattr(layer.mlp, "router"):
            yield _record_routing(layer.mlp, f"{place}.mlp", outputs)
        yield record(layer, place)
    yield record(model.decoder.final_layernorm, "model.norm")


def _of_tokens(output: Any) -> Tensor:
    """Transpose [s, b, ..], which may come with a bias, to [b, s, ..]."""
    return (output[0] if isinstance(output, tuple) else output).transpose(0, 1)


def _record_projections(
    attention: Any, place: str, part: str, outputs: ModuleOutputs
) -> Callable[[], None]:
    """Record queries, keys and values; queries and keys after their norms if they have any."""
    project = attention.get_query_key_value_tensors

    def projected(*args: Any, **kwargs: Any) -> Any:
        result = project(*args, **kwargs)
        for name, tensor in zip(("q", "k", "v"), result, strict=False):
            which = "proj" if name == "v" else part
            outputs.record(f"{place}.{name}_{which}", tensor.transpose(0, 1))
        return result

    attention.get_query_key_value_tensors = projected

    def remove() -> None:
        del attention.get_query_key_value_tensors

    return remove


def _record_routing(mlp: Any, place: str, outputs: ModuleOutputs) -> Callable[[], None]:
    """Record the router's choices on the text and on the rows that reach every expert."""
    routed: dict[str, Tensor] = {}

    def record_probs(_: Any, inputs: Any, output: Any) -> None:
        seq_length, batch = inputs[0].shape[:2]
        probs, chosen = (t.view(seq_length, batch, -1).transpose(0, 1) for t in output)
        routed["probs"] = torch.where(chosen, probs, 0.0).float()

    def probe(_: Any, __: Any, ___: Any) -> None:
        outputs.probs[place] = routed["probs"]
        outputs.probe_rows[place] = expert_probe_rows(mlp.router.weight)
        output = _of_tokens(mlp.forward(outputs.probe_rows[place].transpose(0, 1)))
        outputs.probe_outputs[place] = output.detach().clone(), routed["probs"]

    hooks = (mlp.router.register_forward_hook(record_probs), mlp.register_forward_hook(probe))

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return remove
