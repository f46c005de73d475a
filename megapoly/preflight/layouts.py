"""Parallel layouts by name, and the layouts to check at a number of processes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from megapoly.config import Config
from megapoly.errors import ConfigError

_SIZES = {
    "tp": "tensor_model_parallel_size",
    "cp": "context_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "dp": "data_parallel_size",
}
_FLAGS = {"nosp": "sequence_parallel", "a2a": "cp_comm_type", "distopt": "distributed_optimizer"}
_TOKEN = re.compile(r"([a-z]+)(\d+)|([a-z0-9]+)")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes and options of ``parallel``; fields are named after these.

    Args:
        data_parallel_size: model replicas.
        cp_comm_type: has no effect with a ``context_parallel_size`` of 1.
        distributed_optimizer: shard the optimizer's state, with overlapped reduction and gathering.
    """

    tensor_model_parallel_size: int = 1
    context_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    data_parallel_size: int = 1
    sequence_parallel: bool = True
    cp_comm_type: str = "all_gather"
    distributed_optimizer: bool = False

    @property
    def ranks_of_replica(self) -> int:
        """Number of processes that share one copy of the dense parameters."""
        return (
            self.tensor_model_parallel_size
            * self.context_parallel_size
            * self.pipeline_model_parallel_size
        )

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.ranks_of_replica * self.data_parallel_size

    @property
    def expert_tensor_size(self) -> int:
        """Number of ranks that share one expert's matrices."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def forms(self) -> frozenset[str]:
        """What distinguishes it from one process, such as ``tp`` or ``distopt``."""
        forms = {name for name, field in _SIZES.items() if (getattr(self, field) or 1) > 1}
        forms.discard("etp")
        if self.expert_tensor_size != self.tensor_model_parallel_size:
            forms.add("etp")
        flags = {
            "nosp": self.tensor_model_parallel_size > 1 and not self.sequence_parallel,
            "a2a": self.context_parallel_size > 1 and self.cp_comm_type == "a2a",
            "distopt": self.distributed_optimizer,
        }
        return frozenset(forms | {name for name, is_on in flags.items() if is_on})

    @property
    def name(self) -> str:
        """Sizes above 1 and options, as :func:`parse_layout` reads them: ``tp2-ep4-etp1-distopt``.

        ``etp`` is named if it is not the tensor-parallel size.
        """
        sizes = [f"{name}{getattr(self, _SIZES[name])}" for name in _SIZES if name in self.forms]
        return "-".join([*sizes, *(name for name in _FLAGS if name in self.forms)]) or "1"

    def at(self, world_size: int) -> Layout | None:
        """Return it with as many replicas as fill the processes; None if these do not divide."""
        if world_size % self.ranks_of_replica:
            return None
        return dataclasses.replace(self, data_parallel_size=world_size // self.ranks_of_replica)

    @property
    def options(self) -> dict[str, Any]:
        """The options, by dotted names, that set this layout in a default configuration."""
        default, parallel = Config().parallel, self.applied_to(Config()).parallel
        return {
            f"parallel.{name}": value
            for name, value in vars(parallel).items()
            if value != getattr(default, name)
        }

    def applied_to(self, config: Config) -> Config:
        """Return a copy of a configuration with this layout."""
        config = copy.deepcopy(config)
        parallel, chunks = config.parallel, self.virtual_pipeline_model_parallel_size
        parallel.tensor_model_parallel_size = self.tensor_model_parallel_size
        parallel.context_parallel_size = self.context_parallel_size
        parallel.pipeline_model_parallel_size = self.pipeline_model_parallel_size
        parallel.virtual_pipeline_model_parallel_size = chunks if chunks > 1 else None
        parallel.expert_model_parallel_size = self.expert_model_parallel_size
        parallel.expert_tensor_parallel_size = self.expert_tensor_size
        parallel.sequence_parallel = self.sequence_parallel and self.tensor_model_parallel_size > 1
        has_context = self.context_parallel_size > 1
        parallel.cp_comm_type = self.cp_comm_type if has_context else None  # type: ignore[assignment]
        parallel.use_distributed_optimizer = self.distributed_optimizer
        parallel.overlap_grad_reduce = self.distributed_optimizer
        parallel.overlap_param_gather = self.distributed_optimizer
        return config


def parse_layout(name: str) -> Layout:
    """Parse a name such as ``tp2-pp2-vpp2``; without ``dp``, the fewest replicas for the experts.

    Raises:
        ConfigError: a part of the name is unknown.
    """
    values: dict[str, int | bool | str] = {}
    for token in name.split("-") if name != "1" else []:
        match = _TOKEN.fullmatch(token)
        if match and match[1] in _SIZES and int(match[2]) >= 1:
            values[_SIZES[match[1]]] = int(match[2])
        elif token in _FLAGS:
            values[_FLAGS[token]] = "a2a" if token == "a2a" else token == "distopt"
        else:
            known = ", ".join([*(f"{size}2" for size in _SIZES), *_FLAGS])
            raise ConfigError(
                [f"the layout {name!r} has the part {token!r}; parts are {known}, joined by -"]
            )
    layout = Layout(**values)  # type: ignore[arg-type]
    if "data_parallel_size" in values:
        return layout
    experts = layout.expert_model_parallel_size * layout.expert_tensor_size
    dense = layout.tensor_model_parallel_size * layout.context_parallel_size
    return dataclasses.replace(layout, data_parallel_size=math.lcm(experts, dense) // dense)


def all_layouts(
    world_size: int, *, num_experts: int | None, is_allowed: Callable[[Layout], bool]
) -> list[Layout]:
    """Return every allowed layout at a number of processes.

    Args:
        world_size: number of processes.
        num_experts: number of experts; None: a dense model.
        is_allowed: returns whether the configuration's rules allow a layout.
    """
    layouts = itertools.chain.from_iterable(
        _variants(dense, num_experts) for dense in _dense_layouts(world_size)
    )
    return [layout for layout in layouts if is_allowed(layout)]


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def _dense_layouts(world_size: int) -> Iterator[Layout]:
    for tensor in divisors(world_size):
        for context in divisors(world_size // tensor):
            for pipeline in divisors(world_size // tensor // context):
                data = world_size // tensor // context // pipeline
                for chunks in (1, 2) if pipeline > 1 else (1,):
                    yield Layout(
                        tensor_model_parallel_size=tensor,
                        context_parallel_size=context,
                        pipeline_model_parallel_size=pipeline,
                        virtual_pipeline_model_parallel_size=chunks,
                        data_parallel_size=data,
                    )


def _variants(dense: Layout, num_experts: int | None) -> Iterator[Layout]:
    """Yield a dense layout with every way to split the experts, and every option."""
    shared = dense.world_size // dense.pipeline_model_parallel_size
    experts = [(1, dense.tensor_model_parallel_size)]
    if num_experts:
        experts = [
            (expert, tensor)
            for expert in divisors(math.gcd(shared, num_experts))
            for tensor in divisors(shared // expert)
        ]
    tensor, context = dense.tensor_model_parallel_size, dense.context_parallel_size
    for (expert, expert_tensor), sequence, comm, sharded in itertools.product(
        experts,
        (True, False) if tensor > 1 and not num_experts else (True,),
        ("all_gather", "a2a") if context > 1 else ("all_gather",),
        (False, True) if context * dense.data_parallel_size > 1 else (False,),
    ):
        yield dataclasses.replace(
            dense,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=expert_tensor,
            sequence_parallel=sequence,
            cp_comm_type=comm,
            distributed_optimizer=sharded,
        )


def covering(layouts: Iterable[Layout], strength: int = 2) -> list[Layout]:
    """Return few layouts that have together every combination of choices that any layout has.

    Args:
        layouts: layouts to choose from.
        strength: number of choices in a combination. A choice is, for each kind of parallelism, a
            size of 1 or a size above 1, and each option enabled or disabled.
    """
    candidates = sorted(layouts, key=lambda layout: (len(layout.forms), layout.name))
    tuples = {layout: _choices(layout, strength) for layout in candidates}
    missing = set().union(*tuples.values())
    chosen: list[Layout] = []
    while missing:
        best = max(candidates, key=lambda layout: len(tuples[layout] & missing))
        chosen.append(best)
        missing -= tuples[best]
    return sorted(chosen, key=candidates.index)


def _choices(layout: Layout, strength: int) -> set[tuple[tuple[str, bool], ...]]:
    choices = [(form, form in layout.forms) for form in (*_SIZES, *_FLAGS)]
    return set(itertools.combinations(choices, strength))
