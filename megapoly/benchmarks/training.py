"""Benchmark training speed on CPU: megapoly, a plain PyTorch model, PolyNorm and SwiGLU.

    megapoly benchmark training --json speed.json

One process trains, on the same batches of the built-in text and in fp32, megapoly with SwiGLU, the
same model in plain PyTorch with the same initial weights, and megapoly with each of
``--activations`` at equal parameters. A step includes everything from reading a batch to the
updated weights: forward, backward, clipping, AdamW. The candidates take turns, so that other work
on the machine affects all of them; a ratio compares turns of the same round.

It takes about 2 minutes on 2 idle cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from megapoly.benchmarks.plain_model import PlainModel, check_is_plain
from megapoly.benchmarks.round_statistics import RoundStatistics
from megapoly.config import Config
from megapoly.config.command_line import Parser, at_least
from megapoly.config.ranges import MOST_PROCESSES
from megapoly.errors import MegapolyError
from megapoly.platform.device import select_platform
from megapoly.pretrain import configure

if TYPE_CHECKING:
    from megapoly.training.state import TrainState

RECIPE = "dense_tiny"
# The first step allocates and compiles, the second still allocates.
WARM_UP_STEPS = 2
GOALS = {"swiglu / plain": 0.9, "polynorm / swiglu": 0.95}


@dataclass
class Candidate:
    """A model that trains.

    Args:
        name: for the table.
        num_parameters: number of parameters.
        train_step: function that makes one step and returns its loss.
        tokens_per_second: of every turn.
        loss: of the last step.
    """

    name: str
    num_parameters: int
    train_step: Callable[[], float]
    tokens_per_second: list[float] = field(default_factory=list)
    loss: float = float("nan")

    def run(self, num_steps: int) -> float:
        """Make steps and return the seconds that they took."""
        start = time.perf_counter()
        for _ in range(num_steps):
            self.loss = self.train_step()
        return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; return 2 if the configuration is not valid."""
    arguments = build_parser().parse_args(argv)
    # Warnings of the engine: missing optional packages, deprecated names of collectives.
    warnings.filterwarnings("ignore", module=r"megatron|torch\.distributed")
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        with candidates_of(arguments.config, arguments.activations) as (candidates, config):
            tokens_per_step = config.training.global_batch_size * config.training.seq_length
            measure(candidates, arguments.steps, arguments.rounds, tokens_per_step)
    except MegapolyError as error:
        print(error, file=sys.stderr)
        return 2
    ratios = speed_ratios(candidates)
    Console().print(_table(candidates, ratios, tokens_per_step))
    if arguments.json:
        report = _report(arguments, candidates, ratios, tokens_per_step)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def build_parser() -> Parser:
    """Return the benchmark's parser."""
    parser = Parser("benchmark training", __doc__)
    parser.add_argument("--config", default=RECIPE, help="a dense recipe")
    parser.add_argument(
        "--activations",
        nargs="*",
        default=["polynorm"],
        help="compared with swiglu (%(default)s)",
    )
    parser.add_argument(
        "--steps", type=at_least(1), default=1, help="steps of a turn (%(default)s)"
    )
    parser.add_argument(
        "--rounds", type=at_least(1), default=30, help="turns of each candidate (%(default)s)"
    )
    parser.add_argument(
        "--threads", type=at_least(1, MOST_PROCESSES), help="of torch (default: chosen by torch)"
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser


def measure(
    candidates: Sequence[Candidate], num_steps: int, num_rounds: int, tokens_per_step: int
) -> None:
    """Warm every candidate up, then let them take turns of ``num_steps`` steps."""
    for candidate in candidates:
        candidate.run(WARM_UP_STEPS)
    for _ in range(num_rounds):
        for candidate in candidates:
            seconds = candidate.run(num_steps)
            candidate.tokens_per_second.append(num_steps * tokens_per_step / seconds)


@contextmanager
def candidates_of(
    recipe: Path, activations: Sequence[str]
) -> Iterator[tuple[list[Candidate], Config]]:
    """Return all candidates and the configuration of the SwiGLU model."""
    with tempfile.TemporaryDirectory() as folder:
        configs = {
            name: _configure(recipe, name, folder)
            for name in dict.fromkeys(["swiglu", *activations])
        }
        config = configs["swiglu"]
        check_is_plain(config)
        platform = select_platform("cpu")
        from megapoly.data.corpus import load_corpus
        from megapoly.data.tokenizer import load_tokenizer
        from megapoly.training.distributed import process_groups
        from megapoly.training.state import build_state

        with process_groups(config, platform):
            corpus = load_corpus(config, tokenizer=load_tokenizer(config.data.tokenizer))
            states = {name: build_state(c, platform, corpus) for name, c in configs.items()}
            plain = plain_candidate(states["swiglu"])
            megapoly = [megapoly_candidate(state) for state in states.values()]
            if plain.num_parameters != megapoly[0].num_parameters:
                raise AssertionError(
                    f"{plain.num_parameters} and {megapoly[0].num_parameters} parameters: not the "
                    "same model"
                )
            yield [megapoly[0], plain, *megapoly[1:]], config


def _configure(recipe: Path, activation: str, folder: str) -> Config:
    """Return the recipe with an activation and a constant learning rate."""
    overrides = {
        "config": recipe,
        "run_dir": folder,
        "model.activation": activation,
        "optimizer.lr_decay_style": "constant",
        "optimizer.lr_warmup_iters": 0,
        "optimizer.lr_warmup_init": 0,
        "optimizer.decay_norms": "false",
        "data.eod_mask_loss": "false",
        "training.device": "cpu",
    }
    arguments = [f"--{name}={value}" for name, value in overrides.items()]
    return configure(arguments, default_recipe=RECIPE, program="benchmark_training.py")


def megapoly_candidate(state: TrainState) -> Candidate:
    """Return the step of megapoly, as megapoly train runs it."""
    from megapoly.training.step import train_step

    batches = state.training_batches()
    return Candidate(
        f"megapoly, {state.config.model.activation}",
        sum(p.numel() for p in state.chunks[0].parameters()),
        lambda: train_step(state, batches).lm_loss,
    )


def plain_candidate(state: TrainState) -> Candidate:
    """Return the plain model with the weights, batches and optimizer settings of ``state``."""
    from megapoly.model.builder import unwrap

    config, name = state.config, "plain, swiglu"
    model = PlainModel(config)
    model.copy_weights(unwrap(state.chunks[0]))
    optimizer = model.optimizer(config)
    batches, num_microbatches = state.training_batches(), state.layout.num_microbatches

    def train_step() -> float:
        optimizer.zero_grad()
        total = torch.zeros(())
        for batch in islice(batches, num_microbatches):
            loss = model(batch["tokens"], batch["labels"]) / num_microbatches
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        return total.item()

    return Candidate(name, sum(p.numel() for p in model.parameters()), train_step)


def speed_ratios(candidates: Sequence[Candidate]) -> dict[str, RoundStatistics]:
    """Return tokens/s of megapoly over the plain model, and of activations over SwiGLU."""
    swiglu, plain, *others = candidates
    pairs = {"swiglu / plain": (swiglu, plain)}
    pairs |= {f"{other.name.split()[-1]} / swiglu": (other, swiglu) for other in others}
    return {
        name: RoundStatistics.of(
            [a / b for a, b in zip(one.tokens_per_second, other.tokens_per_second, strict=True)]
        )
        for name, (one, other) in pairs.items()
    }


def _table(
    candidates: Sequence[Candidate], ratios: dict[str, RoundStatistics], tokens_per_step: int
) -> Table:
    table = Table(
        caption=f"{tokens_per_step} tokens a step, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; median of {len(candidates[0].tokens_per_second)} rounds"
    )
    table.add_column("")
    for column in ("parameters", "tokens/s", "lowest to highest", "last loss"):
        table.add_column(column, justify="right")
    for candidate in candidates:
        speed = RoundStatistics.of(candidate.tokens_per_second)
        table.add_row(
            candidate.name,
            f"{candidate.num_parameters:,}",
            f"{speed.median:,.0f}",
            f"{speed.min:,.0f} to {speed.max:,.0f}",
            f"{candidate.loss:.4f}",
        )
    table.add_section()
    for name, ratio in ratios.items():
        goal = f"goal {GOALS[name]}" if name in GOALS else ""
        spread = f"{ratio.min:.3f} to {ratio.max:.3f}"
        table.add_row(name, goal, f"{ratio.median:.3f}", spread)
    return table


def _report(
    arguments: argparse.Namespace,
    candidates: Sequence[Candidate],
    ratios: dict[str, RoundStatistics],
    tokens_per_step: int,
) -> dict[str, Any]:
    return {
        "config": str(arguments.config),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "tokens_per_step": tokens_per_step,
        "candidates": [
            {
                "name": candidate.name,
                "num_parameters": candidate.num_parameters,
                "tokens_per_second": asdict(RoundStatistics.of(candidate.tokens_per_second)),
                "tokens_per_second_by_round": candidate.tokens_per_second,
                "loss": candidate.loss,
            }
            for candidate in candidates
        ],
        "ratios": {
            name: asdict(ratio) | {"goal": GOALS.get(name)} for name, ratio in ratios.items()
        },
    }
