"""Search for layouts that fit, and for changes that make a plan fit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megapoly.config import Config
from megapoly.config.resolve import (
    cp_comm_type,
    expert_tensor_parallel_size,
    uses_sequence_parallel,
)
from megapoly.config.schema import DataConfig, ParallelConfig
from megapoly.errors import ConfigError
from megapoly.platform.gpus import GPU
from megapoly.preflight.layouts import Layout, divisors
from megapoly.preflight.planning.plan import Plan

_MICRO_BATCH_SIZES = (1, 2, 4, 8)
_CHUNKS = (1, 2, 4)

Allows = Callable[[Config], bool]
Resolve = Callable[[Config], Config]


@dataclass(frozen=True)
class FittingLayout:
    """A layout that fits.

    Args:
        layout: the layout.
        options: options that set it, by dotted names, in addition to the given ones.
        plan: its plan.
    """

    layout: Layout
    options: dict[str, Any]
    plan: Plan


def search(
    config: Config, given: Config, world_size: int, gpu: GPU, allows: Allows
) -> list[FittingLayout]:
    """Return every layout that fits, those with the lowest bound on the time of a step first.

    The search covers all sizes of data, tensor (within a node), pipeline and expert parallelism,
    and the experts' tensor parallelism of 1 or the tensor-parallel size; context parallelism only
    if nothing fits without it. Each is combined with micro-batches of 1, 2, 4 and 8 samples,
    pipelines of 2 and 4 interleaved chunks, and the least recomputation that fits: none, that of
    attention's core and the FFN, or of whole layers. The distributed optimizer is enabled, with
    overlap.

    Args:
        config: resolved; only its layout is changed.
        given: the same before it was resolved, to which the options are added.
        world_size: number of processes.
        gpu: GPU of every process.
        allows: returns whether the rules allow a configuration.
    """
    lean = dataclasses.replace(config, data=DataConfig())  # copied thousands of times
    layouts = list(_layouts(config, world_size, gpu))
    short = [layout for layout in layouts if layout.context_parallel_size == 1]
    long = [layout for layout in layouts if layout.context_parallel_size > 1]
    found = _that_fit(lean, given, short, world_size, gpu, allows)
    found = found or _that_fit(lean, given, long, world_size, gpu, allows)
    # Among equal bounds the simplest layout is first.
    return sorted(found, key=lambda item: (round(item.plan.step.total, 4), len(item.layout.forms)))


def allowed_layout(given: Config, world_size: int, gpu: GPU, allows: Allows) -> Config | None:
    """Return a configuration with a layout that the rules allow; None if no layout helps.

    Args:
        given: not resolved; its own layout is refused.
        world_size: number of processes.
        gpu: GPU of every process.
        allows: returns whether the rules allow a configuration.
    """
    for layout in _layouts(given, world_size, gpu):
        for micro_batch_size in _MICRO_BATCH_SIZES:
            candidate = layout.applied_to(given)
            candidate.training.micro_batch_size = micro_batch_size
            _set_recomputation(candidate.parallel, {})
            if allows(candidate):
                return candidate
    return None


def _that_fit(
    config: Config,
    given: Config,
    layouts: list[Layout],
    world_size: int,
    gpu: GPU,
    allows: Allows,
) -> list[FittingLayout]:
    found = []
    for layout in layouts:
        for micro_batch_size in _MICRO_BATCH_SIZES:
            candidate = layout.applied_to(config)
            candidate.training.micro_batch_size = micro_batch_size
            _set_recomputation(candidate.parallel, {})
            if not allows(candidate):
                continue
            plan = _first_that_fits(candidate, world_size, gpu)
            if plan is not None:
                found.append(FittingLayout(layout, _options(given, plan.config), plan))
    return found


def remedies(plan: Plan, given: Config, resolve: Resolve) -> list[tuple[dict[str, Any], Plan]]:
    """Return single changes that make a plan fit, and the plans with them.

    Args:
        plan: a plan that does not fit.
        given: its configuration before it was resolved, so that nulls follow a change.
        resolve: checks and resolves a configuration; raises ConfigError if it cannot run.
    """
    found = []
    for change in _changes(plan.config):
        candidate = copy.deepcopy(given)
        for key, value in change.items():
            section, _, name = key.partition(".")
            setattr(getattr(candidate, section), name, value)
        try:
            changed = Plan(resolve(candidate), plan.world_size, plan.gpu)
        except ConfigError:
            continue
        if changed.fits:
            found.append((change, changed))
    return sorted(found, key=lambda item: item[1].step.total)


def _changes(config: Config) -> Iterator[dict[str, Any]]:
    """Yield single changes that may make a resolved configuration fit."""
    if not config.parallel.use_distributed_optimizer:
        yield {"parallel.use_distributed_optimizer": True}
    if config.training.micro_batch_size > 1:
        yield {"training.micro_batch_size": config.training.micro_batch_size // 2}
    for values in _recomputations(config)[1:]:
        yield {f"parallel.{name}": value for name, value in values.items()}
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "expert_model_parallel_size",
        "context_parallel_size",
    ):
        yield {f"parallel.{name}": 2 * getattr(config.parallel, name)}


def _layouts(config: Config, world_size: int, gpu: GPU) -> Iterator[Layout]:
    model = config.model
    experts = model.num_moe_experts or 1
    for tensor in divisors(min(gpu.gpus_per_node, world_size)):
        for context in divisors(world_size // tensor):
            for stages in divisors(world_size // tensor // context):
                if model.num_layers % stages:
                    continue
                dense = Layout(
                    tensor_model_parallel_size=tensor,
                    context_parallel_size=context,
                    pipeline_model_parallel_size=stages,
                    expert_tensor_parallel_size=tensor,
                    data_parallel_size=world_size // tensor // context // stages,
                    cp_comm_type="p2p" if model.transformer_engine else "all_gather",
                    distributed_optimizer=True,
                )
                for chunks in _CHUNKS if stages > 1 else (1,):
                    for expert in divisors(experts):
                        for expert_tensor in {1, tensor} if model.num_moe_experts else {tensor}:
                            yield dataclasses.replace(
                                dense,
                                virtual_pipeline_model_parallel_size=chunks,
                                expert_model_parallel_size=expert,
                                expert_tensor_parallel_size=expert_tensor,
                            )


def _recomputations(config: Config) -> list[dict[str, Any]]:
    """Return options of recomputation, from none to whole layers."""
    ffn = "moe" if config.model.num_moe_experts else "mlp"
    return [
        {},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", ffn]},
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ]


def _set_recomputation(parallel: ParallelConfig, values: dict[str, Any]) -> None:
    default = ParallelConfig()
    for name in (
        "recompute_granularity",
        "recompute_method",
        "recompute_num_layers",
        "recompute_modules",
    ):
        setattr(parallel, name, values.get(name, getattr(default, name)))


def _first_that_fits(config: Config, world_size: int, gpu: GPU) -> Plan | None:
    """Return the plan with the least recomputation that fits."""
    for values in _recomputations(config):
        candidate = copy.deepcopy(config)
        _set_recomputation(candidate.parallel, values)
        plan = Plan(candidate, world_size, gpu)
        if plan.fits:
            return plan
    return None


def _options(given: Config, found: Config) -> dict[str, Any]:
    """Return the options that change a configuration to a layout, by dotted names.

    Args:
        given: not resolved.
        found: resolved.
    """
    # The values of null in the layout that was found.
    null = copy.deepcopy(found.parallel)
    null.expert_tensor_parallel_size = null.sequence_parallel = null.cp_comm_type = None
    follow = {
        "expert_tensor_parallel_size": expert_tensor_parallel_size(null),
        "sequence_parallel": uses_sequence_parallel(null),
        "cp_comm_type": cp_comm_type(dataclasses.replace(found, parallel=null)),
    }
    options: dict[str, Any] = {}
    for name, value in vars(found.parallel).items():
        if name in follow and value == follow[name]:
            value = None
        # A given value may equal the one that follows from the rest.
        if getattr(given.parallel, name) not in (value, getattr(found.parallel, name)):
            options[f"parallel.{name}"] = value
    if given.training.micro_batch_size != found.training.micro_batch_size:
        options["training.micro_batch_size"] = found.training.micro_batch_size
    return options
