"""A rank that is slower than its peers is named: by the time in which it does not wait.

Times are given; ``test_waiting.py`` shows that those of real collectives are measured.
"""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from megapoly.config import Config
from megapoly.testing import run_on_ranks
from megapoly.training.stragglers import NUM_STEPS, THRESHOLD, slowest


@pytest.mark.parametrize(
    ("busy_s", "stages", "rank", "ratio", "peers"),
    [
        ([1.0, 1.5], [0, 0], 1, 1.5, "the other ranks ("),
        ([1.0, 1.1, 2.0, 1.2], [0] * 4, 2, 2.0 / 1.1, "the other ranks ("),
        # The last stage has more to do: its ranks are compared with each other.
        ([1.0, 1.4, 3.0, 3.0], [0, 0, 1, 1], 1, 1.4, "the other ranks of pipeline stage 0 ("),
        ([1.0, 3.0], [0, 1], 1, 3.0, "the other pipeline stages ("),
    ],
)
def test_the_slowest_among_its_peers(busy_s, stages, rank, ratio, peers) -> None:
    found = slowest(busy_s, stages)
    assert (found.rank, found.busy_s / found.median_s) == (rank, pytest.approx(ratio))
    assert f"rank {rank} is slow: {1e3 * busy_s[rank]:.1f} ms" in str(found)
    assert f"{ratio:.2f} times the median of {peers}" in str(found)


def _watch(waited_s: list[list[float]], stages: int) -> tuple[list[str], dict[int, dict]]:
    """Return what the hook shows, and its details by step, when steps take 1 s.

    Args:
        waited_s: seconds that each rank waits in the first and in the second 50 steps.
        stages: of the pipeline.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megapoly.platform.device import select_platform
    from megapoly.training import stragglers
    from megapoly.training.hooks import StepRecord

    platform = select_platform("cpu")
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=stages)
    state = SimpleNamespace(config=Config(), platform=platform, iteration=0)
    lines: list[str] = []
    hook = stragglers.StragglerHook(state, lines.append)
    details = {}
    for state.iteration in range(1, 2 * NUM_STEPS + 3):
        first = state.iteration <= 2  # of the process, not counted
        window = 0 if state.iteration <= NUM_STEPS + 2 else 1
        hook.before_step()
        hook._waiting._seconds = waited_s[dist.get_rank()][window]
        step = StepRecord(SimpleNamespace(), 1000.0 * (1 + dist.get_rank()) if first else 1.0)
        hook.after_step(step)
        if step.details:
            details[state.iteration] = step.details
    hook.close()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return lines, details


@pytest.mark.parametrize("stages", [1, 2])
def test_a_slow_rank_is_named_on_all_ranks_while_it_is_slow(stages: int) -> None:
    per_rank = run_on_ranks(_watch, 2, [[0.5, 0.5], [0.1, 0.375]], stages)
    assert per_rank[0] == per_rank[1]
    lines, details = per_rank[0]
    peers = "the other ranks" if stages == 1 else "the other pipeline stages"
    assert lines == [
        f"rank 1 is slow: 900.0 ms of a step without waiting, 1.80 times the median of {peers} "
        f"(500.0 ms), over 50 steps; it runs on {socket.gethostname()}"
    ]
    assert details == {
        52: {"ranks/slowest": 1.0, "ranks/slowest_over_median": pytest.approx(1.8)},
        102: {"ranks/slowest": 1.0, "ranks/slowest_over_median": pytest.approx(1.25)},
    }
    assert 1.25 < THRESHOLD < 1.8
