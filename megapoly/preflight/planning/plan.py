"""The plan of a job: all results of this package, as numbers and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from megapoly.config import Config
from megapoly.config.resolve import num_microbatches, tokens_per_step
from megapoly.platform.gpus import GPU
from megapoly.preflight.planning.collectives import Collective, collectives
from megapoly.preflight.planning.memory import HEADROOM, Memory, memory_of_rank
from megapoly.preflight.planning.parameters import (
    Counts,
    active_parameters,
    counts_of_rank,
    model_parts,
    total_parameters,
)
from megapoly.preflight.planning.rank_grid import (
    DENSE_AXES,
    EXPERT_AXES,
    GroupLink,
    RankGrid,
    num_nodes,
)
from megapoly.preflight.planning.step_time import StepTime, step_time
from megapoly.training.flops import (
    forward_flops_per_token,
    recomputed_flops_per_token,
    training_flops_per_token,
)

_SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class Plan:
    """A configuration that the rules allow, at a number of processes, each on one GPU.

    Args:
        config: resolved.
        world_size: number of processes.
        gpu: GPU of every process.
    """

    config: Config
    world_size: int
    gpu: GPU

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages."""
        return self.config.parallel.pipeline_model_parallel_size

    @cached_property
    def grid(self) -> RankGrid:
        """The ranks of the job as a grid."""
        return RankGrid.of(self.config, self.world_size)

    @cached_property
    def counts(self) -> list[Counts]:
        """Parameters of a rank, by pipeline stage."""
        return [counts_of_rank(self.config, stage) for stage in range(self.num_stages)]

    @cached_property
    def memory(self) -> list[Memory]:
        """Memory of a rank, by pipeline stage."""
        stages = range(self.num_stages)
        return [memory_of_rank(self.config, self.world_size, stage) for stage in stages]

    @property
    def fullest(self) -> int:
        """The stage that needs most memory on each rank."""
        return max(range(self.num_stages), key=lambda stage: self.memory[stage].total)

    @property
    def needed_memory(self) -> int:
        """Bytes of the rank that needs most."""
        return self.memory[self.fullest].total

    @property
    def usable_memory(self) -> int:
        """Bytes that a rank may need: the device's memory without what must stay free."""
        return int(self.gpu.memory * (1.0 - HEADROOM))

    @property
    def fits(self) -> bool:
        """Whether every rank fits into the device's memory."""
        return self.needed_memory <= self.usable_memory

    @cached_property
    def collectives(self) -> list[list[Collective]]:
        """Messages of a rank in one step, by pipeline stage."""
        stages = range(self.num_stages)
        return [collectives(self.config, self.world_size, self.gpu, stage) for stage in stages]

    @cached_property
    def step(self) -> StepTime:
        """Lower bound on the time of a step."""
        return step_time(self.config, self.world_size, self.gpu, self.collectives)

    @property
    def train_tokens(self) -> int:
        """Tokens of the whole run."""
        assert self.config.training.train_iters is not None, "resolve first"
        return self.config.training.train_iters * tokens_per_step(self.config)

    @property
    def days(self) -> float:
        """Lower bound on the days of the whole run."""
        return self.train_tokens / self.step.tokens_per_second / _SECONDS_A_DAY

    def group_link(self, *axes: str) -> GroupLink:
        """Return what connects rank 0 with the ranks that differ from it along these axes."""
        return GroupLink.between(self.grid.group(*axes), self.gpu)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as numbers and text; in bytes, seconds and FLOPs."""
        config = self.config
        return {
            "gpu": self.gpu.name,
            "world_size": self.world_size,
            "num_nodes": num_nodes(self.world_size, self.gpu),
            "total_parameters": total_parameters(config),
            "active_parameters": active_parameters(config),
            "parameters": {part.name: part.total for part in model_parts(config)},
            "layout": self.grid.sizes | {"chunks": _chunks(config)},
            "groups_of_rank_0": {
                axis: self.grid.group(axis) for axis in dict.fromkeys(DENSE_AXES + EXPERT_AXES)
            },
            "micro_batch_size": config.training.micro_batch_size,
            "num_microbatches": num_microbatches(config, self.world_size),
            "tokens_per_step": tokens_per_step(config),
            "train_tokens": self.train_tokens,
            "flops": {
                "forward_per_token": asdict(forward_flops_per_token(config)),
                "per_token": training_flops_per_token(config),
                "recomputed_per_token": recomputed_flops_per_token(config),
                "per_step": training_flops_per_token(config) * tokens_per_step(config),
            },
            "memory": {
                "device": self.gpu.memory,
                "usable": self.usable_memory,
                "fits": self.fits,
                "ranks_of_stage": [
                    {"stage": stage, "parameters": self.counts[stage].total}
                    | asdict(memory)
                    | {"total": memory.total}
                    for stage, memory in enumerate(self.memory)
                ],
            },
            "collectives": [
                _message(stage, message)
                for stage, messages in enumerate(self.collectives)
                for message in messages
            ],
            "step_seconds": {
                name: getattr(self.step, name)
                for name in (
                    "products",
                    "operators",
                    "messages",
                    "bubble",
                    "data_parallel",
                    "optimizer",
                    "total",
                )
            },
            "peak_flops_per_gpu": self.gpu.bf16_flops,
            "mfu": self.step.mfu,
            "tokens_per_second": self.step.tokens_per_second,
            "days": self.days,
        }


def _chunks(config: Config) -> int:
    return config.parallel.virtual_pipeline_model_parallel_size or 1


def _message(stage: int, message: Collective) -> dict[str, Any]:
    return {
        "stage": stage,
        "name": message.name,
        "kind": message.kind,
        "axes": list(message.axes),
        "ranks": message.link.size,
        "nodes": message.link.nodes,
        "link": message.link.name,
        "bytes_of_call": message.size,
        "calls": message.calls,
        "sent_bytes": message.sent_bytes,
        "seconds": message.time,
        "hidden": message.hidden,
    }
