"""The activation in the engine's own modules of experts, against float64, cut over ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
from layouts import small_config
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megapoly.activations import ACTIVATIONS, get
from megapoly.model.ffn_activation import ActivationSettings, FFNActivation
from megapoly.model.grouped_linear import ColumnParallelGroupedLinear, RowParallelGroupedLinear
from megapoly.platform.device import select_platform
from megapoly.testing import run_on_ranks
from megapoly.training.distributed import process_groups

HIDDEN, WIDTH, EXPERTS, ROWS = 8, 12, 4, 3
LAYOUTS = {
    "1": (1, 1, 1, 1),
    "tp2-ep2-etp1": (2, 2, 2, 1),
    "tp2-etp2": (2, 2, 1, 2),
    "tp2-ep2-etp2": (4, 2, 2, 2),
}
MODULES = {
    "sequential": (SequentialMLP, ColumnParallelLinear, RowParallelLinear, "per_expert"),
    "grouped": (TEGroupedMLP, ColumnParallelGroupedLinear, RowParallelGroupedLinear, "shared"),
}


def values(expert: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(expert)
    shapes = {"fc1": (WIDTH, HIDDEN), "fc2": (HIDDEN, WIDTH), "x": (ROWS, HIDDEN), "a": (4,)}
    made = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    return made | {"probs": torch.rand(ROWS, generator=generator)}


def config_of(layout: tuple[int, int, int, int]):
    _, tp, ep, etp = layout
    sizes = {"tensor_model": tp, "expert_model": ep, "expert_tensor": etp}
    options = {f"parallel.{n}_parallel_size": size for n, size in sizes.items()}
    options |= {"model.num_moe_experts": EXPERTS, "model.moe_ffn_hidden_size": WIDTH}
    return small_config(options)


def engine_config(layout: tuple[int, int, int, int]) -> TransformerConfig:
    _, tp, ep, etp = layout
    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        ffn_hidden_size=40,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=WIDTH,
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        add_bias_linear=False,
        use_te_activation_func=True,
        bias_activation_fusion=False,
        use_cpu_initialization=True,
        moe_router_load_balancing_type="none",
    )


def build(kind: str, engine: TransformerConfig, coefficients: str, name: str = "polynorm"):
    module, fc1, fc2, _ = MODULES[kind]
    settings = ActivationSettings(name, coefficients=coefficients, backend="reference")
    activation = ModuleSpec(FFNActivation, params={"settings": settings})
    groups = ProcessGroupCollection.use_mpu_process_groups()
    count = EXPERTS // groups.ep.size()
    submodules = MLPSubmodules(linear_fc1=fc1, linear_fc2=fc2, activation_func=activation)
    return module(count, engine, submodules, groups), groups


def activate(layout):
    """Outputs (parts of sums over a row's ranks), gradients and places in a checkpoint, by kind."""
    results = {}
    with process_groups(config_of(layout), select_platform("cpu")):
        for kind, (_, _, _, coefficients) in MODULES.items():
            module, groups = build(kind, engine_config(layout), coefficients)
            count = module.num_local_experts
            local = [values(groups.ep.rank() * count + i) for i in range(count)]
            columns = WIDTH // groups.expt_tp.size()
            mine = slice(groups.expt_tp.rank() * columns, (groups.expt_tp.rank() + 1) * columns)
            with torch.no_grad():
                for i, value in enumerate(local):
                    if kind == "sequential":
                        expert = module.local_experts[i]
                        fc1, fc2 = expert.linear_fc1.weight, expert.linear_fc2.weight
                        expert.activation_func.coefficients.copy_(value["a"])
                    else:
                        maps = (module.linear_fc1, module.linear_fc2)
                        fc1, fc2 = (getattr(each, f"weight{i}") for each in maps)
                        module.activation_func.coefficients.copy_(values(0)["a"])
                    fc1.copy_(value["fc1"][mine])
                    fc2.copy_(value["fc2"][:, mine])
            x = torch.cat([value["x"] for value in local]).requires_grad_()
            probs = torch.cat([value["probs"] for value in local]).requires_grad_()
            output, _ = module(x, torch.tensor([ROWS] * count), probs)
            output.backward(torch.ones_like(output))
            parameters = dict(module.named_parameters())
            gradients = [p.grad for n, p in parameters.items() if n.endswith("coefficients")]
            entries = module.sharded_state_dict(metadata=None).values() if count else []
            places = [
                (e.global_offset, e.global_shape, e.replica_id)
                for e in entries
                if "coefficients" in e.key
            ]
            rank = (groups.ep.rank(), groups.expt_tp.rank(), groups.tp.rank())
            results[kind] = (rank, output.detach(), x.grad, probs.grad, gradients, places)
    return results


@pytest.fixture(scope="module", params=LAYOUTS)
def at_layout(request):
    return request.param, run_on_ranks(activate, LAYOUTS[request.param][0], LAYOUTS[request.param])


def exact(expert: int, coefficients_of: int):
    """Output and gradients of one expert in float64; the sum of the output is differentiated."""
    value = {n: v.double().requires_grad_() for n, v in values(expert).items()}
    a = values(coefficients_of)["a"].double().requires_grad_()
    h = value["x"] @ value["fc1"].T
    powers = [v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() for v in (h, h**2, h**3)]
    inner = a[0] + sum(a[k + 1] * power for k, power in enumerate(powers))
    output = (inner * value["probs"][:, None]) @ value["fc2"].T
    output.sum().backward()
    return output.detach(), value["x"].grad, value["probs"].grad, a.grad


@pytest.mark.parametrize("kind", MODULES)
def test_equals_one_process_in_float64(at_layout, kind):
    name, ranks = at_layout
    _, _, ep, etp = LAYOUTS[name]
    count = EXPERTS // ep
    by_expert = [exact(e, e if kind == "sequential" else 0) for e in range(EXPERTS)]
    parts: dict[int, dict[int, tuple]] = {}
    for results in ranks:
        (ep_rank, etp_rank, _), *computed = results[kind]
        parts.setdefault(ep_rank, {})[etp_rank] = tuple(computed)
    total = torch.zeros(4, dtype=torch.float64)
    for ep_rank, etp_rank in itertools.product(range(ep), range(etp)):
        local = by_expert[ep_rank * count : (ep_rank + 1) * count]
        row = parts[ep_rank].values()
        for i in range(3):  # each rank of a row has a part of the sum over its columns
            whole = sum(part[i].double() for part in row)
            expected = torch.cat([each[i] for each in local])
            torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
        gradients = parts[ep_rank][etp_rank][3]
        if kind == "sequential":  # complete on every rank of the row
            for gradient, each in zip(gradients, local, strict=True):
                torch.testing.assert_close(gradient.double(), each[3], rtol=1e-5, atol=1e-5)
        else:
            total += gradients[0].double()
    if kind == "grouped":  # each rank has its share of the sum over all experts
        expected = torch.stack([each[3] for each in by_expert]).sum(0)
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)


def test_every_expert_is_saved_once(at_layout):
    _, ranks = at_layout
    saved = [
        offset
        for results in ranks
        for offset, shape, replica in results["sequential"][-1]
        if shape == (EXPERTS, 4) and replica == (0, 0, 0)
    ]
    assert sorted(saved) == [(e, 0) for e in range(EXPERTS)]


def slots():
    """What each slot is taken for, and what is refused."""
    layout = LAYOUTS["1"]
    found = {}
    with process_groups(config_of(layout), select_platform("cpu")):
        engine = engine_config(layout)
        for name in ACTIVATIONS:
            for kind, coefficients in itertools.product(MODULES, ("shared", "per_expert")):
                try:
                    module, _ = build(kind, engine, coefficients, name)
                except ValueError as error:
                    found[name, kind, coefficients] = str(error)
                    continue
                first = module.local_experts[0] if kind == "sequential" else module
                found[name, kind, coefficients] = first.activation_func.slot
        spec = ModuleSpec(FFNActivation, params={"settings": ActivationSettings("polynorm")})
        submodules = MLPSubmodules(
            linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear, activation_func=spec
        )
        found["dense"] = MLP(engine, submodules, ffn_hidden_size=40).activation_func.slot
    return found


def test_what_a_module_cannot_have_is_refused_by_name():
    (found,) = run_on_ranks(slots, 1)
    assert found.pop("dense") == "ffn"
    for (name, kind, coefficients), result in found.items():
        if not get(name).has_coefficients or coefficients == MODULES[kind][3]:
            assert result == ("one expert" if kind == "sequential" else "experts")
            continue
        engine, ours = MODULES[kind][0].__name__, f"{kind.capitalize()}Experts"
        for word in (engine, ours, name, f"coefficients={coefficients!r}", MODULES[kind][3]):
            assert word in result
