"""Build every distinct rank of a job in this process, and prove that the ranks add up.

It uses the rules, specs, builder, gradient buffers and optimizer of training; there are no data
and no other processes (:mod:`megapoly.preflight.planning.fake_job`). Import this after
:func:`megapoly.platform.device.select_platform`, as everything that imports the engine.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megapoly.config import Config
from megapoly.config.resolve import num_microbatches, without_fp8
from megapoly.config.schema import ParallelConfig
from megapoly.model.builder import unwrap
from megapoly.model.parameters import ParameterCount, count_parameters
from megapoly.platform.device import select_platform
from megapoly.platform.machine import Machine
from megapoly.preflight.planning.activations import kept_by_schedule, measure_activations
from megapoly.preflight.planning.built_rank import BuiltRank, ShardPlace, build_rank
from megapoly.preflight.planning.coordinates import Coordinates, coordinates_of_ranks
from megapoly.preflight.planning.fake_job import fake_rank
from megapoly.preflight.planning.planned_config import planned_config


@dataclass(frozen=True)
class RankClass:
    """Ranks that hold models of the same sizes, and these sizes.

    Args:
        coordinates: of the first of these ranks.
        first_rank: the first of these ranks.
        num_ranks: number of these ranks.
        dense_parameters: parameters that each holds, without routed experts.
        expert_parameters: parameters of routed experts that each holds.
        weight_bytes: parameters, with the padding of their buffers.
        gradient_bytes: gradient buffers, with their padding.
        optimizer_bytes: moments and fp32 copies of the parameters, of the rank with most. Shards of
            the distributed optimizer differ by the padding that they hold.
        smallest_optimizer_bytes: the same, of the rank with least.
        activation_bytes: the maximum that forward passes keep for their backward passes at one
            time, with the configuration's recomputation and pipeline schedule; None: not built.
        activation_bytes_of_pass: what the forward pass of one micro-batch keeps, by model chunk.
        passing_bytes: the maximum in addition while a pass of one micro-batch runs: temporary
            tensors, recomputed activations, gradients on their way to the buffers.
    """

    coordinates: Coordinates
    first_rank: int
    num_ranks: int
    dense_parameters: int
    expert_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    smallest_optimizer_bytes: int
    activation_bytes: int | None
    activation_bytes_of_pass: tuple[int, ...] | None
    passing_bytes: int | None

    @property
    def parameters(self) -> int:
        """Parameters that each of the ranks holds."""
        return self.dense_parameters + self.expert_parameters

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients and optimizer, of the rank with most."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of everything that was built, of the rank with most."""
        return self.state_bytes + (self.activation_bytes or 0) + (self.passing_bytes or 0)


@dataclass(frozen=True)
class DryRun:
    """The result of a dry run.

    Args:
        config: resolved for the job.
        world_size: number of ranks.
        classes: distinct ranks.
        class_of_rank: index in ``classes`` of each rank.
        optimizer_bytes_of_rank: bytes of optimizer state of each rank.
        total_parameters: parameters of the model, padding of the vocabulary included.
        active_parameters: parameters that one token uses.
        counted_parameters: parameters of all ranks together, each counted once.
        num_built: number of ranks that were built.
        problems: what does not add up; empty if everything does.
        activations_missing: why activations were not built; None: they were.
        seconds: time of the dry run.
    """

    config: Config
    world_size: int
    classes: tuple[RankClass, ...]
    class_of_rank: tuple[int, ...]
    optimizer_bytes_of_rank: tuple[int, ...]
    total_parameters: int
    active_parameters: int
    counted_parameters: int
    num_built: int
    problems: tuple[str, ...]
    activations_missing: str | None
    seconds: float


def _transformer_engine_is_unusable(config: Config, machine: Machine) -> list[str]:
    """Return a message if its layers are requested and cannot be built here."""
    if not config.model.transformer_engine or machine.transformer_engine:
        return []
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as error:  # without a GPU, a library is missing
        return [
            "`model.transformer_engine` (True) needs Transformer Engine, to build its layers, and "
            f"it cannot be imported here: {str(error).splitlines()[0]}; leave it null, which "
            "builds the same weights with the local layers"
        ]
    return []


@dataclass(frozen=True)
class _Built:
    """A rank that was built, and its bytes of activations: kept, of a pass, passing."""

    rank: BuiltRank
    activations: tuple[int, tuple[int, ...], int] | None


# What a rank's model depends on: its pipeline stage, and its shards of matrices and experts.
_Place = tuple[int, int, int, int]


def dry_run(
    config: Config, world_size: int, machine: Machine, *, every_rank: bool = False
) -> DryRun:
    """Build a job's ranks on the meta device and compare them with the whole model.

    Ranks that differ only in their data-parallel or context-parallel place hold the same model; one
    of them is built. The optimizer's state does depend on that place; its size on every rank
    follows from the layout of the buffers.

    Args:
        config: resolved or not; not changed.
        world_size: ranks of the job.
        machine: what every rank is meant to run on.
        every_rank: build each rank, to prove that the distinct ones represent all.

    Raises:
        ConfigError: all broken rules except those on files, which need not exist here.
        UnavailableError: this process is part of a job.
    """
    start = time.perf_counter()
    select_platform("cpu")
    unusable = _transformer_engine_is_unusable(config, machine)
    if config.training.fp8 is not None and config.model.transformer_engine is None:
        # Check the rules of FP8 as for a machine that supports it; weights are as in bf16.
        has_it = dataclasses.replace(machine, transformer_engine=True)
        planned_config(config, world_size, has_it, problems=unusable)
        config = copy.deepcopy(config)
        without_fp8(config.training)
    machine = dataclasses.replace(machine, transformer_engine=bool(config.model.transformer_engine))
    config = planned_config(config, world_size, machine, problems=unusable)
    count, sizes = _whole_model(config)
    coordinates = coordinates_of_ranks(config, world_size)
    first_ranks = _first_ranks(coordinates)
    missing = _activations_missing(config)
    measured: dict[tuple[int, ...], tuple[int, tuple[int, ...], int] | None] = {}
    built: dict[int, _Built] = {}
    for rank in range(world_size) if every_rank else first_ranks.values():
        stage = coordinates[rank].pp
        built[rank] = _build(
            config, rank, world_size, stage, measured, with_activations=not missing
        )
    problems = _parts_that_do_not_add_up([built[r].rank for r in first_ranks.values()], sizes)
    for rank, each in built.items():
        problems += _wrong_model(rank, each, built[first_ranks[_place(coordinates[rank])]])
        problems += _wrong_optimizer(rank, each.rank, coordinates[rank], config)
    classes, class_of_rank, optimizer_bytes = _classes(config, coordinates, first_ranks, built)
    counted = sum(sum(built[r].rank.saved.values()) for r in first_ranks.values())
    return DryRun(
        config=config,
        world_size=world_size,
        classes=classes,
        class_of_rank=class_of_rank,
        optimizer_bytes_of_rank=optimizer_bytes,
        total_parameters=count.total,
        active_parameters=count.active,
        counted_parameters=counted,
        num_built=len(built),
        problems=tuple(problems),
        activations_missing=missing,
        seconds=time.perf_counter() - start,
    )


def _whole_model(config: Config) -> tuple[ParameterCount, dict[str, int]]:
    """Return the parameters of the model on one rank, and the size of each weight."""
    whole = copy.deepcopy(config)
    # Padded as the job pads it.
    whole.model.make_vocab_size_divisible_by = math.lcm(
        config.model.make_vocab_size_divisible_by, config.parallel.tensor_model_parallel_size
    )
    whole.parallel = ParallelConfig(expert_tensor_parallel_size=1, sequence_parallel=False)
    with fake_rank(whole, rank=0, world_size=1) as platform:
        built, chunks = build_rank(whole, platform)
        return count_parameters(unwrap(chunks[0])), built.global_sizes


def _place(coordinates: Coordinates) -> _Place:
    return coordinates.pp, coordinates.tp, coordinates.ep, coordinates.etp


def _first_ranks(coordinates: Sequence[Coordinates]) -> dict[_Place, int]:
    """Return, for every distinct part of the model, the first rank that holds it."""
    first: dict[_Place, int] = {}
    for rank, each in enumerate(coordinates):
        first.setdefault(_place(each), rank)
    return first


def _activations_missing(config: Config) -> str | None:
    model = config.model
    if model.transformer_engine:
        return "Transformer Engine's layers run on a GPU only"
    if model.num_moe_experts and model.moe_token_dispatcher_type == "allgather":
        return "the all-gather dispatcher's shapes depend on data; take alltoall to see them"
    return None


def _build(
    config: Config,
    rank: int,
    world_size: int,
    stage: int,
    measured: dict[tuple[int, ...], tuple[int, tuple[int, ...], int] | None],
    *,
    with_activations: bool,
) -> _Built:
    """Build a rank; measure activations once for all ranks of a stage with the same sizes."""
    with fake_rank(config, rank, world_size) as platform:
        built, chunks = build_rank(config, platform)
        key = (stage, *_model_sizes(built))
        if key not in measured:
            measured[key] = None
            if with_activations:
                found = measure_activations(config, chunks)
                steps = num_microbatches(config, world_size)
                kept = kept_by_schedule(config, found.kept, steps)
                measured[key] = (kept, found.kept, found.passing)
        return _Built(built, measured[key])


def _model_sizes(built: BuiltRank) -> tuple[int, ...]:
    return (
        built.dense_parameters,
        built.expert_parameters,
        built.weight_bytes,
        built.gradient_bytes,
    )


def _parts_that_do_not_add_up(ranks: Sequence[BuiltRank], sizes: Mapping[str, int]) -> list[str]:
    """Return problems unless every parameter is held, and saved by exactly one rank."""
    held: Counter[str] = Counter()
    savers: Counter[ShardPlace] = Counter()
    for rank in ranks:
        savers.update(rank.saved.keys())
        for place, size in rank.saved.items():
            held[place.key] += size
    problems = [
        f"`{place.key}` at {place.offset} is saved by {count} ranks; one must save it"
        for place, count in savers.items()
        if count > 1
    ]
    return problems + [
        f"`{key}` has {sizes.get(key, 0):,} numbers in the whole model, and ranks hold "
        f"{held[key]:,}; both must be the same"
        for key in sorted({*sizes, *held})
        if sizes.get(key, 0) != held[key]
    ]


def _wrong_model(rank: int, built: _Built, first: _Built) -> list[str]:
    """Return a problem if a rank differs from the first rank with the same part of the model."""
    sizes, expected = _model_sizes(built.rank), _model_sizes(first.rank)
    if sizes == expected:
        return []
    return [f"rank {rank} has (dense, experts, weights, gradients) {sizes}, not {expected}"]


def _wrong_optimizer(
    rank: int, built: BuiltRank, coordinates: Coordinates, config: Config
) -> list[str]:
    """Return problems unless the state has the expected size and every parameter is updated."""
    problems = []
    expected = _optimizer_bytes(built, coordinates, config)
    if built.optimizer_bytes != expected:
        problems.append(
            f"rank {rank} has {built.optimizer_bytes:,} bytes of optimizer state; by the layout of "
            f"its buffers it must have {expected:,}"
        )
    if not config.parallel.use_distributed_optimizer:
        return problems
    for kind, numbers, parameters in (
        ("dense", built.dense_optimizer_numbers, built.dense_parameters),
        ("expert", built.expert_optimizer_numbers, built.expert_parameters),
    ):
        if numbers.sum() != parameters:
            problems.append(
                f"the data-parallel ranks of rank {rank} update {numbers.sum():,} {kind} "
                f"parameters; they must update {parameters:,}"
            )
    return problems


def _optimizer_bytes(built: BuiltRank, coordinates: Coordinates, config: Config) -> int:
    """Return the bytes of state of a rank that holds the same model as a built one."""
    # The engine's group of both has context parallelism inside.
    dense = coordinates.cp + config.parallel.context_parallel_size * coordinates.dp
    numbers = built.dense_optimizer_numbers[dense]
    if built.expert_parameters:
        numbers += built.expert_optimizer_numbers[coordinates.edp]
    return int(numbers) * built.bytes_per_optimizer_number


def _classes(
    config: Config,
    coordinates: Sequence[Coordinates],
    first_ranks: Mapping[_Place, int],
    built: Mapping[int, _Built],
) -> tuple[tuple[RankClass, ...], tuple[int, ...], tuple[int, ...]]:
    """Return distinct ranks, the class of each rank, and the optimizer bytes of each rank."""
    members: dict[tuple[int, ...], list[int]] = {}
    optimizer_bytes = []
    for rank, each in enumerate(coordinates):
        like = built[first_ranks[_place(each)]].rank
        optimizer_bytes.append(_optimizer_bytes(like, each, config))
        members.setdefault((each.pp, *_model_sizes(like)), []).append(rank)
    classes, class_of_rank = [], [0] * len(coordinates)
    for i, ranks in enumerate(members.values()):
        for rank in ranks:
            class_of_rank[rank] = i
        first = built[first_ranks[_place(coordinates[ranks[0]])]]
        kept, of_pass, passing = first.activations or (None, None, None)
        classes.append(
            RankClass(
                coordinates=coordinates[ranks[0]],
                first_rank=ranks[0],
                num_ranks=len(ranks),
                dense_parameters=first.rank.dense_parameters,
                expert_parameters=first.rank.expert_parameters,
                weight_bytes=first.rank.weight_bytes,
                gradient_bytes=first.rank.gradient_bytes,
                optimizer_bytes=max(optimizer_bytes[rank] for rank in ranks),
                smallest_optimizer_bytes=min(optimizer_bytes[rank] for rank in ranks),
                activation_bytes=kept,
                activation_bytes_of_pass=of_pass,
                passing_bytes=passing,
            )
        )
    return tuple(classes), tuple(class_of_rank), tuple(optimizer_bytes)
