import io
import math
from pathlib import Path

from made_runs import write_run
from rich.console import Console

from megapoly.study.report.terminal import show_tables


def test_tables_and_sentences_of_complete_runs_are_shown(tmp_path: Path) -> None:
    for activation, end in (("swiglu", 3.0), ("polynorm", 2.75)):
        for seed, gap in ((1, 0.01), (2, -0.01)):
            write_run(
                tmp_path / f"{activation}.{seed}",
                [4.0, end],
                activation=activation,
                seed=seed,
                evaluations={2: {"a": end - 0.5 + gap, "b": end + 0.5 + gap}},
            )
    write_run(tmp_path / "unfinished", [4.0], activation="gelu", steps=2)
    console = Console(file=io.StringIO(), width=120)
    show_tables(tmp_path, "swiglu", console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    rows = [line.split() for line in shown.splitlines()]
    # Means of two losses, and of exp of these: cosh(0.01) exp of 2.5, 3.5 and 3.
    assert ["PolyNorm", "2.7500", "–", "−0.2500", "1,", "untuned"] in rows
    means = [f"{math.cosh(0.01) * math.exp(loss):.2f}" for loss in (2.5, 3.5, 3.0)]
    assert any(row[:1] == ["SwiGLU"] and set(means) <= set(row) for row in rows)
    assert "PolyNorm has the lowest validation loss, 2.750: below SwiGLU by 0.250" in shown
    assert "GELU" not in shown
