import io
from pathlib import Path

from made_runs import write_run
from rich.console import Console

from megapoly.study.report.terminal import show_tables


def test_tables_and_sentences_of_complete_runs_are_shown(tmp_path: Path) -> None:
    for activation, end in (("swiglu", 3.0), ("polynorm", 2.75)):
        write_run(
            tmp_path / activation,
            [4.0, end],
            activation=activation,
            evaluations={2: {"a": end - 0.5, "b": end + 0.5}},
        )
    write_run(tmp_path / "unfinished", [4.0], activation="gelu", steps=2)
    console = Console(file=io.StringIO(), width=120)
    show_tables(tmp_path, "swiglu", console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    rows = [line.split() for line in shown.splitlines()]
    assert ["SwiGLU", "12.18", "33.12", "20.09"] in rows  # exp of 2.5, 3.5 and 3
    assert ["PolyNorm", "9.49", "25.79", "15.64"] in rows
    assert "PolyNorm ends below SwiGLU by 0.250" in shown
    assert "GELU" not in shown
