"""Map every tensor of a Hugging Face folder to its part of a checkpoint tensor.

One table serves both directions. A :class:`TensorMapping` names a *view* into the engine's tensor
of one layer (and expert); export reads that view and import writes it. The engine stores

    embedding.word_embeddings.weight                     [padded vocab, h]
    decoder.layers.self_attention.linear_qkv.weight      [L, groups (q + 2) d, h]
    decoder.layers.mlp.linear_fc1.weight                 [L, (2) ffn, h]   gate, then up
    decoder.layers.mlp.experts.experts.linear_fc1.weight [L, E, (2) ffn, h]
    ..activation_func.coefficients                       [L, (E,) r + 1]   ascending powers

where row block g of ``linear_qkv`` holds the q = heads / groups queries of group g, then its key
and its value (transformer/attention.py). Both sides use rotate-half for rotary positions, so rows
within a head keep their order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megapoly.activations import registry
from megapoly.config import ModelConfig, ffn_width

_LAYERS = "decoder.layers."


def _identity(tensor: Tensor) -> Tensor:
    return tensor


@dataclasses.dataclass(frozen=True)
class TensorMapping:
    """One tensor of a Hugging Face folder and its place in a checkpoint.

    Args:
        name: name in the folder.
        key: name of the checkpoint's tensor.
        index: layer, or layer and expert, of that tensor; empty if it has no such axes.
        block: shape of the checkpoint's tensor at this index.
        view: returns a view of part of the block; reshaped, it is the folder's tensor.
        shape: shape of the folder's tensor.
        descending: the folder has the numbers in reverse order.
        padded: rows of the block beyond ``shape`` are zero padding and not in the folder.
    """

    name: str
    key: str
    index: tuple[int, ...]
    block: tuple[int, ...]
    shape: tuple[int, ...]
    view: Callable[[Tensor], Tensor] = _identity
    descending: bool = False
    padded: bool = False

    def read(self, block: Tensor) -> Tensor:
        """Return the folder's tensor from the checkpoint's block."""
        part = self.view(block).reshape(self.shape)
        return part.flip(0) if self.descending else part.contiguous()

    def write(self, tensor: Tensor, block: Tensor) -> None:
        """Copy the folder's tensor to its place in the checkpoint's block."""
        part = self.view(block)
        part.copy_((tensor.flip(0) if self.descending else tensor).reshape(part.shape))

    @property
    def num_elements(self) -> int:
        """Number of elements of the tensor."""
        return torch.Size(self.shape).numel()


def tensor_mappings(model: ModelConfig) -> list[TensorMapping]:
    """Return the mapping of every tensor of a model, in the order of computation.

    Args:
        model: resolved.
    """
    assert model.vocab_size is not None, "resolved"
    vocabulary = (model.vocab_size, model.hidden_size)
    vectors = (model.hidden_size,)

    def rows(block: Tensor) -> Tensor:
        return block[: model.vocab_size]

    def padded(name: str, key: str) -> TensorMapping:
        return TensorMapping(name, key, (), vocabulary, vocabulary, rows, padded=True)

    found = [padded("model.embed_tokens.weight", "embedding.word_embeddings.weight")]
    for layer in range(model.num_layers):
        found += _attention_mappings(model, layer)
        found += (
            _expert_mappings(model, layer)
            if model.num_moe_experts
            else _dense_mappings(model, layer)
        )
    found.append(
        TensorMapping("model.norm.weight", "decoder.final_layernorm.weight", (), vectors, vectors)
    )
    if model.untie_embeddings_and_output_weights:
        found.append(padded("lm_head.weight", "output_layer.weight"))
    return found


def _attention_mappings(model: ModelConfig, layer: int) -> Iterator[TensorMapping]:
    heads, groups, width = model.num_attention_heads, model.num_query_groups, model.kv_channels
    assert groups is not None and width is not None, "resolved"
    hidden_size, queries = model.hidden_size, heads // groups
    to, key, index = f"model.layers.{layer}.", f"{_LAYERS}self_attention.", (layer,)
    # The engine's fused layer holds this norm in its linear module.
    yield _vector(
        f"{to}input_layernorm.weight", f"{key}linear_qkv.layer_norm_weight", index, hidden_size
    )
    parts = {
        "q": slice(0, queries),
        "k": slice(queries, queries + 1),
        "v": slice(queries + 1, None),
    }
    for name, part in parts.items():
        rows = (heads if name == "q" else groups) * width
        yield TensorMapping(
            f"{to}self_attn.{name}_proj.weight",
            f"{key}linear_qkv.weight",
            index,
            block=((heads + 2 * groups) * width, hidden_size),
            shape=(rows, hidden_size),
            view=_of_each_group(groups, queries + 2, width, part),
        )
    output = (hidden_size, heads * width)
    yield TensorMapping(
        f"{to}self_attn.o_proj.weight", f"{key}linear_proj.weight", index, output, output
    )
    if model.qk_norm != "none":
        full = model.qk_norm == "full"
        sizes = {"q": heads * width, "k": groups * width} if full else {"q": width, "k": width}
        for name, size in sizes.items():
            norm = f"{key}{name}_layernorm.weight"
            yield _vector(f"{to}self_attn.{name}_norm.weight", norm, index, size)


def _dense_mappings(model: ModelConfig, layer: int) -> Iterator[TensorMapping]:
    to, key, index = f"model.layers.{layer}.", f"{_LAYERS}mlp.", (layer,)
    norm = f"{key}linear_fc1.layer_norm_weight"
    yield _vector(f"{to}post_attention_layernorm.weight", norm, index, model.hidden_size)
    yield from _matrices(model, f"{to}mlp.", key, index, model.ffn_hidden_size)
    yield from _coefficients(model, f"{to}mlp.act_fn.", f"{key}activation_func.", index)


def _expert_mappings(model: ModelConfig, layer: int) -> Iterator[TensorMapping]:
    assert model.num_moe_experts and model.moe_ffn_hidden_size, "resolved"
    hidden_size, num_experts = model.hidden_size, model.num_moe_experts
    to, key, index = f"model.layers.{layer}.", f"{_LAYERS}mlp.", (layer,)
    norm = f"{_LAYERS}pre_mlp_layernorm.weight"
    yield _vector(f"{to}post_attention_layernorm.weight", norm, index, hidden_size)
    router = (num_experts, hidden_size)
    yield TensorMapping(f"{to}mlp.gate.weight", f"{key}router.weight", index, router, router)
    experts, per_expert = f"{key}experts.experts.", model.activation_coefficients == "per_expert"
    for i in range(num_experts):
        place, own = f"{to}mlp.experts.{i}.", (layer, i)
        yield from _matrices(model, place, experts, own, model.moe_ffn_hidden_size)
        if per_expert:
            yield from _coefficients(model, f"{place}act_fn.", f"{experts}activation_func.", own)
    if not per_expert:
        yield from _coefficients(model, f"{to}mlp.act_fn.", f"{experts}activation_func.", index)
    if model.moe_shared_expert_intermediate_size:
        width, shared = model.moe_shared_expert_intermediate_size, f"{key}shared_experts."
        yield from _matrices(model, f"{to}mlp.shared_expert.", shared, index, width)
        activation = f"{shared}activation_func."
        yield from _coefficients(model, f"{to}mlp.shared_expert.act_fn.", activation, index)


def _matrices(
    model: ModelConfig, to: str, key: str, index: tuple[int, ...], size: int
) -> Iterator[TensorMapping]:
    """Map FC1 and FC2 of one FFN; ``size`` is its width in the configuration."""
    width, hidden_size = ffn_width(model, size), model.hidden_size
    gated = registry.get(model.activation).gated
    rows = {"up": slice(0, width)}
    if gated:
        rows = {"gate": slice(0, width), "up": slice(width, 2 * width)}
    for name, part in rows.items():
        yield TensorMapping(
            f"{to}{name}_proj.weight",
            f"{key}linear_fc1.weight",
            index,
            block=(len(rows) * width, hidden_size),
            shape=(width, hidden_size),
            view=_rows(part),
        )
    down = (hidden_size, width)
    yield TensorMapping(f"{to}down_proj.weight", f"{key}linear_fc2.weight", index, down, down)


def _coefficients(
    model: ModelConfig, to: str, key: str, index: tuple[int, ...]
) -> Iterator[TensorMapping]:
    """Map [a_0, .., a_r] to the PolyCom release's weight [a_r, .., a_1] and bias [a_0]."""
    activation, order = registry.get(model.activation), model.activation_order
    if activation.coefficients is None:
        return
    for name in activation.coefficients(order):
        if name == "slope":
            yield _vector(f"{to}slope", f"{key}slope", index, 1)
            continue
        place, block = f"{key}{name}", (order + 1,)
        powers, constant = _rows(slice(1, None)), _rows(slice(0, 1))
        yield TensorMapping(f"{to}weight", place, index, block, (order,), powers, descending=True)
        yield TensorMapping(f"{to}bias", place, index, block, (1,), constant)


def _vector(name: str, key: str, index: tuple[int, ...], size: int) -> TensorMapping:
    return TensorMapping(name, key, index, (size,), (size,))


def _rows(part: slice) -> Callable[[Tensor], Tensor]:
    return lambda block: block[part]


def _of_each_group(groups: int, heads: int, width: int, part: slice) -> Callable[[Tensor], Tensor]:
    """Return a view of some heads of every block of ``heads`` heads."""
    return lambda block: block.view(groups, heads, width, -1)[:, part]
