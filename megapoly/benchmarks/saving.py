"""Benchmark saving on CPU: seconds that the training loop stands still, and memory of the host.

    megapoly benchmark saving --num-ranks 2 --distributed-optimizer

A dense model trains on the built-in text and is saved several times, first while it waits, then in
the background (`checkpoint.async_save`). The loop stands still while a rank plans and hands over a
checkpoint, while it asks whether the files are written, and while rank 0 completes the folder.
Steps that run meanwhile share cores and disk with the writers: their time is in the table, too.

Memory is what a rank has more than before the save, at most, and what its writer has for itself: on
CPU the writer keeps what the rank changes meanwhile, parameters, gradients and moments of a step.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from megapoly.benchmarks.training import RECIPE, WARM_UP_STEPS
from megapoly.config.command_line import Parser, at_least
from megapoly.config.ranges import MOST_PROCESSES
from megapoly.errors import MegapolyError

if TYPE_CHECKING:
    from megapoly.training.state import TrainState

MODES = {"waits": False, "background": True}


@dataclass
class Saves:
    """The saves of one mode, on one rank.

    Args:
        stands_still_s: seconds that the loop stands still, of each save.
        complete_s: seconds until the checkpoint is complete.
        step_s: median seconds of a step while nothing is saved.
        steps_meanwhile_s: seconds of steps while a checkpoint is written.
        rank_mib: memory of the rank at its peak, above that before the save.
        writer_mib: memory that its writer has for itself, at most.
    """

    stands_still_s: list[float] = field(default_factory=list)
    complete_s: list[float] = field(default_factory=list)
    step_s: float = 0.0
    steps_meanwhile_s: list[float] = field(default_factory=list)
    rank_mib: float = 0.0
    writer_mib: float = 0.0


@dataclass
class Result:
    """What one rank measured.

    Args:
        num_parameters: of the model on this rank.
        checkpoint_mib: size of a checkpoint.
        modes: by their names in :data:`MODES`.
    """

    num_parameters: int
    checkpoint_mib: float
    modes: dict[str, Saves]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; return 2 if the configuration is not valid."""
    arguments = build_parser().parse_args(argv)
    from megapoly.preflight.local_ranks import run_on_ranks

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        options = {
            "run_dir": folder,
            "model.num_layers": arguments.num_layers,
            "model.hidden_size": arguments.hidden_size,
            "model.ffn_hidden_size": 3 * arguments.hidden_size,
            "training.seq_length": 64,
            "training.micro_batch_size": 1,
            "training.global_batch_size": arguments.num_ranks,
            "training.device": "cpu",
            "parallel.use_distributed_optimizer": str(arguments.distributed_optimizer).lower(),
            "checkpoint.keep": 1,
        }
        options_of_job = [f"--{name}={value}" for name, value in options.items()]
        try:
            results: list[Result] = run_on_ranks(
                measure, arguments.num_ranks, options_of_job, arguments.saves, timeout_s=3600.0
            )
        except (MegapolyError, RuntimeError) as error:
            print(error, file=sys.stderr)
            return 2
    Console().print(_table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(each) for each in results], indent=2) + "\n")
    return 0


def build_parser() -> Parser:
    """Return the benchmark's parser."""
    parser = Parser("benchmark saving", __doc__)
    parser.add_argument(
        "--num-ranks", type=at_least(1, MOST_PROCESSES), default=1, help="processes (%(default)s)"
    )
    parser.add_argument(
        "--distributed-optimizer", action="store_true", help="`use_distributed_optimizer`"
    )
    parser.add_argument(
        "--hidden-size", type=at_least(64), default=768, help="of the model (%(default)s)"
    )
    parser.add_argument(
        "--num-layers", type=at_least(1), default=6, help="of the model (%(default)s)"
    )
    parser.add_argument(
        "--saves", type=at_least(1), default=5, help="checkpoints of each mode (%(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="where to save (default: for temporary files)")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser


def measure(options: list[str], num_saves: int) -> Result:
    """Train and save on this rank of a job."""
    from megapoly.data.corpus import load_corpus
    from megapoly.data.tokenizer import load_tokenizer
    from megapoly.platform.device import select_platform
    from megapoly.pretrain import configure
    from megapoly.training.distributed import process_groups
    from megapoly.training.state import build_state

    config = configure(options, default_recipe=RECIPE, program="benchmark saving")
    platform = select_platform("cpu")
    with process_groups(config, platform):
        corpus = load_corpus(config, tokenizer=load_tokenizer(config.data.tokenizer))
        loop = _Loop(build_state(config, platform, corpus))
        modes = {
            name: loop.save(num_saves, in_background=in_background)
            for name, in_background in MODES.items()
        }
        (checkpoint,) = (Path(config.run_dir) / "checkpoints").iterdir()
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        return Result(
            sum(p.numel() for chunk in loop.state.chunks for p in chunk.parameters()),
            size / 2**20,
            modes,
        )


class _Loop:
    """A training loop that is timed.

    Args:
        state: the run.
    """

    def __init__(self, state: TrainState) -> None:
        from megapoly.training.save_checkpoint import CheckpointSaver

        self.state, self.saver = state, CheckpointSaver(state)
        self.batches = state.training_batches()
        for _ in range(WARM_UP_STEPS):
            self.step()

    def step(self) -> float:
        """Make a step and return its seconds; all ranks begin together."""
        import torch.distributed as dist

        from megapoly.training.step import train_step

        dist.barrier()
        start = time.perf_counter()
        train_step(self.state, self.batches)
        return time.perf_counter() - start

    def save(self, num_saves: int, *, in_background: bool) -> Saves:
        """Save several times, with steps before, between and meanwhile."""
        result, alone = Saves(), [self.step() for _ in range(3)]
        before = _own_memory_mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        for _ in range(num_saves):
            start = time.perf_counter()
            self.saver.save(in_background=in_background)
            still = time.perf_counter() - start
            while self.saver.path is not None:
                result.steps_meanwhile_s.append(self.step())
                result.writer_mib = max(result.writer_mib, _memory_of_writers_mib())
                asked = time.perf_counter()
                self.saver.finish(wait=False)
                still += time.perf_counter() - asked
            result.complete_s.append(time.perf_counter() - start)
            result.stands_still_s.append(still)
            alone.append(self.step())
        result.rank_mib = _own_memory_mib("VmHWM") - before
        result.step_s = statistics.median(alone)
        return result


def _own_memory_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def _memory_of_writers_mib() -> float:
    total = 0
    for process in multiprocessing.active_children():
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return total / 1024


def _table(results: Sequence[Result]) -> Table:
    """Return medians over the saves, of the rank with the highest; at a peak the highest of all."""
    first = results[0]
    table = Table(
        caption=f"{first.num_parameters / 1e6:.1f} M parameters a rank, checkpoint of "
        f"{first.checkpoint_mib:,.0f} MiB, {len(results)} rank{'s' if len(results) > 1 else ''}; "
        f"median of {len(first.modes['waits'].complete_s)} saves"
    )
    table.add_column("", no_wrap=True)
    for column in (
        "stands\nstill, s",
        "complete\nafter, s",
        "step, s",
        "step mean-\nwhile, s",
        "rank,\nMiB",
        "writer,\nMiB",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for name in MODES:
        saves = [each.modes[name] for each in results]
        meanwhile = [statistics.median(s.steps_meanwhile_s) for s in saves if s.steps_meanwhile_s]
        table.add_row(
            name,
            f"{max(statistics.median(s.stands_still_s) for s in saves):.2f}",
            f"{max(statistics.median(s.complete_s) for s in saves):.2f}",
            f"{max(s.step_s for s in saves):.2f}",
            f"{max(meanwhile):.2f}" if meanwhile else "",
            f"+{max(s.rank_mib for s in saves):,.0f}",
            f"{max(s.writer_mib for s in saves):,.0f}",
        )
    return table
