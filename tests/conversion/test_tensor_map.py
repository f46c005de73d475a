"""Every number of a checkpoint has one place in an export."""

import dataclasses
from itertools import groupby

import pytest
import torch

from megapoly.config import Config
from megapoly.config.resolve import resolve
from megapoly.conversion.tensor_map import tensor_mappings
from megapoly.platform.machine import CPU

DENSE = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 4, "num_query_groups": 2}
DENSE |= {"ffn_hidden_size": 12, "vocab_size": 4100}
MOE = DENSE | {"num_moe_experts": 3, "moe_ffn_hidden_size": 6}
MODELS = {
    "dense": DENSE | {"qk_norm": "head"},
    "tied, gated": DENSE
    | {"activation": "gated_polynorm", "untie_embeddings_and_output_weights": False},
    "slope": DENSE | {"activation": "polyprelu", "activation_order": 2, "kv_channels": 6},
    "experts": MOE | {"qk_norm": "full", "moe_shared_expert_intermediate_size": 6},
    "own coefficients": MOE | {"activation_coefficients": "per_expert", "activation_order": 4},
    "swiglu": MOE | {"activation": "swiglu"},
}


def model_of(fields):
    config = Config()
    config.training.train_iters = 1
    config.model = dataclasses.replace(config.model, **fields)
    return resolve(config, tokenizer_vocab_size=4096, machine=CPU).model


def blocks_of(model):
    for _, group in groupby(tensor_mappings(model), key=lambda each: (each.key, each.index)):
        yield list(group)


@pytest.mark.parametrize("name", MODELS)
def test_parts_of_a_block_are_all_of_it_and_go_back(name):
    model = model_of(MODELS[name])
    for parts in blocks_of(model):
        size = torch.Size(parts[0].block).numel()
        block = torch.arange(size, dtype=torch.float).view(parts[0].block)
        tensors = [mapping.read(block) for mapping in parts]
        numbers = torch.cat([tensor.flatten() for tensor in tensors])
        assert torch.equal(numbers.sort().values, torch.arange(size, dtype=torch.float))
        for mapping, tensor in zip(parts, tensors, strict=True):
            assert tuple(tensor.shape) == mapping.shape
        again = torch.full_like(block, -1)
        for mapping, tensor in zip(parts, tensors, strict=True):
            mapping.write(tensor, again)
        assert torch.equal(again, block)


@pytest.mark.parametrize("name", MODELS)
def test_names_are_those_of_transformers(name):
    """The model that an export opens as has these tensors, in these shapes."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    from megapoly.conversion.architecture import hf_config
    from megapoly.conversion.remote_code.configuration_megapoly import MegapolyConfig
    from megapoly.conversion.remote_code.modeling_megapoly import MegapolyForCausalLM

    model = model_of(MODELS[name])
    if name == "swiglu":
        model.qk_norm = "full"
    fields = hf_config(model, seq_length=16, dtype="float32", bos=None, eos=0, pad=None)
    assert fields["model_type"] == ("olmoe" if name == "swiglu" else "megapoly")
    for field in ("model_type", "auto_map", "torch_dtype"):
        fields.pop(field, None)
    with torch.device("meta"):
        if name == "swiglu":  # in memory its experts are one tensor in transformers 5
            shapes = {each.name: each.shape for each in tensor_mappings(model)}
            loaded = OlmoeForCausalLM(OlmoeConfig(**fields))
            assert sum(torch.Size(s).numel() for s in shapes.values()) == loaded.num_parameters()
            return
        loaded = MegapolyForCausalLM(MegapolyConfig(**fields))
    expected = {n: tuple(p.shape) for n, p in loaded.named_parameters()}
    assert {each.name: each.shape for each in tensor_mappings(model)} == expected


def test_names_are_unique():
    for fields in MODELS.values():
        names = [mapping.name for mapping in tensor_mappings(model_of(fields))]
        assert len(names) == len(set(names))
