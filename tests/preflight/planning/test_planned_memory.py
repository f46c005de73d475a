"""Activations that are planned are the tensors that autograd keeps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from small_models import EXPERTS, small_model

from megapoly.config.parsing import load_yaml
from megapoly.config.resolve import resolve
from megapoly.model.builder import build_chunks
from megapoly.platform.device import select_platform
from megapoly.platform.machine import Machine
from megapoly.preflight.planning import memory
from megapoly.preflight.planning.memory import chunks_in_flight, memory_of_rank
from megapoly.training.distributed import process_groups

BF16 = {"training.bf16": True}
# torch's RMSNorm keeps other tensors on CPU than on a GPU.
NORMS = ("input_layernorm", "pre_mlp_layernorm", "final_layernorm")
NORMS_OF_PLAN = ("attention norm", "FFN norm")
HEAD_NORMS_OF_PLAN = ("statistics of QK-norms", "queries in the order of heads")
HEAD_NORMS = ("q_layernorm", "k_layernorm")
GRANULARITY = "parallel.recompute_granularity"
MODELS = {
    "polynorm": {},
    "polynorm in bf16": BF16,
    "swiglu": BF16 | {"model.activation": "swiglu", "model.num_query_groups": 2},
    "gelu": BF16 | {"model.activation": "gelu"},
    "relu": BF16 | {"model.activation": "relu"},
    "squared_relu": {"model.activation": "squared_relu"},
    "polyrelu of order 2": BF16 | {"model.activation": "polyrelu", "model.activation_order": 2},
    "gated_polynorm": BF16 | {"model.activation": "gated_polynorm"},
    "norm of heads": BF16 | {"model.qk_norm": "head", "model.num_query_groups": 2},
    "norm of projections": BF16 | {"model.qk_norm": "full"},
    "experts": BF16 | EXPERTS,
    "swiglu experts, shared expert": BF16
    | EXPERTS
    | {"model.activation": "swiglu", "model.moe_shared_expert_intermediate_size": 24},
    "recomputed core and FFN": BF16
    | {GRANULARITY: "selective", "parallel.recompute_modules": ["core_attn", "mlp"]},
    "recomputed experts": BF16
    | EXPERTS
    | {GRANULARITY: "selective", "parallel.recompute_modules": ["moe"]},
}


def kept_bytes(config):
    """Of a micro-batch, by a token, without the layers' norms: of one more layer, of the rest."""
    sizes = []
    for num_layers in (1, 2):
        model = dataclasses.replace(config.model, num_layers=num_layers)
        sizes.append(kept_by_model(dataclasses.replace(config, model=model)))
    tokens = config.training.micro_batch_size * config.training.seq_length
    one, two = sizes
    return (two - one) / tokens, (2 * one - two) / tokens


def kept_by_model(config):
    """Bytes of every storage that autograd keeps in the forward pass, parameters aside."""
    norms = NORMS + (HEAD_NORMS if config.model.qk_norm == "head" else ())
    platform, inside, kept = select_platform("cpu"), [], {}
    with process_groups(config, platform, alone=True):
        get_moe_layer_wise_logging_tracker().clear()  # as long as the last model's layers
        (model,) = build_chunks(config, platform)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *args, name=name: inside.append(name))
            module.register_forward_hook(lambda *args: inside.pop() and None)

        def pack(tensor):
            storage = tensor.untyped_storage()
            is_norm = bool(inside) and inside[-1].endswith(norms)
            if storage.data_ptr() not in parameters and not is_norm:
                # The tensor stays referenced, so that no other takes its address.
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        shape = config.training.micro_batch_size, config.training.seq_length
        tokens = torch.randint(config.model.vocab_size, shape)
        positions = torch.arange(shape[1]).expand(*shape)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens, positions, attention_mask=None, labels=tokens)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_a_layer_keeps_what_is_planned(options):
    config = small_model(options)
    layer, rest = kept_bytes(config)
    planned, _ = memory.kept_by_layer(config)
    others = NORMS_OF_PLAN + (HEAD_NORMS_OF_PLAN if config.model.qk_norm == "head" else ())
    norms = [
        saved.size for saved in memory.layer_activations(config) if saved.name.endswith(others)
    ]
    # Router: a few numbers that do not depend on the number of tokens.
    assert layer == pytest.approx(planned - sum(norms), rel=1e-3)
    head = [s.size for s in memory.head_activations(config) if "final norm" not in s.name]
    token_ids = 8
    assert rest == pytest.approx(sum(head) + token_ids, rel=1e-3)


T, P, C = (
    f"parallel.{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "context")
)
COMM, MODULES = "parallel.cp_comm_type", "parallel.recompute_modules"


# Wide enough that what is not planned, token ids and the angles of rotation, is little.
def test_states_of_the_papers_dense_model():
    recipe = Path(__file__).parents[3] / "examples" / "configs" / "dense_1b_paper.yaml"
    config = resolve(load_yaml(recipe), tokenizer_vocab_size=0, machine=Machine(cuda=True))
    parameters, hidden, tokens = 1_345_423_456, 2048, 2 * 4096
    found = memory_of_rank(config, 32, stage=0)
    assert found.weights == 2 * parameters
    assert found.gradients == 4 * parameters
    assert found.optimizer == 12 * -(-parameters // 32)  # fp32 weights and two moments, a share
    # A layer: 10 tensors of the hidden size (2 of norms, 2 inputs of FC1 and QKV, 3 of QKV, queries
    # and keys once more, output), 2 of the FFN's; softmax sums, PolyNorm's roots, statistics.
    layer = 2 * (10 * hidden + 2 * 8256) + 4 * 16 + 4 * 3 + 2 * 4
    rotation = 4 * 128 * 2 / 2
    head = 2 * (2 * hidden) + 4 * 32_000 + 4 + 9
    frequencies = 128 * 4 / 2  # of the rotation
    assert found.activations == tokens * (24 * (layer + rotation) + head + frequencies)
    config.parallel.use_distributed_optimizer = False
    assert memory_of_rank(config, 32, stage=0).optimizer == 12 * parameters


def test_micro_batches_under_way_in_a_pipeline():
    pipeline = {
        "parallel.pipeline_model_parallel_size": 4,
        "model.num_layers": 8,
        "training.global_batch_size": 16,
    }
    config = small_model(pipeline)  # 8 micro-batches
    assert [chunks_in_flight(config, 4, stage) for stage in range(4)] == [4, 3, 2, 1]
    config = small_model(pipeline | {"training.global_batch_size": 4})
    assert [chunks_in_flight(config, 4, stage) for stage in range(4)] == [2, 2, 2, 1]
    # Interleaved: warm-up of 2 (4 - stage - 1) + (2 - 1) 4 chunks, then one more.
    config = small_model(pipeline | {"parallel.virtual_pipeline_model_parallel_size": 2})
    assert [chunks_in_flight(config, 4, stage) for stage in range(4)] == [11, 9, 7, 5]
