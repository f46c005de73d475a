"""The tables as they are printed."""

import io

from questions import ShortAnswers
from rich.console import Console

from megapoly.evaluation.harness import evaluate_tasks
from megapoly.evaluation.local_tasks import QUESTION_FILES
from megapoly.evaluation.results_table import show_results
from megapoly.evaluation.tasks import GROUPS, select


def printed(results):
    console = Console(file=io.StringIO(), width=80)
    show_results(results, "a [model]", console)
    return console.file.getvalue()


def test_beside_the_papers_models(task_data):
    results = evaluate_tasks(ShortAnswers(), select(["table1"]), task_data=task_data, limit=1)
    text = printed(results)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "Accuracy (%), as in the paper's Table 1" in lines
    assert "ARC-E ARC-C Swag PIQA SciQ Grande Avg." in lines
    # The shortest answer is right in sciq; ties and lengths as in the other tests.
    values = [results.find(name).score for name in GROUPS["table1"]]
    figures = " ".join(f"{value:.2f}" for value in [*values, sum(values) / 6])
    assert f"a [model] {figures}" in lines
    assert "paper: SwiGLU 56.61 27.47 49.23 68.61 86.10 56.83 57.47" in lines
    assert "paper: PolyNorm 59.68 29.01 50.86 69.15 87.20 56.20 58.68" in lines
    assert "this model: only the first question of each task" in lines
    assert "SciQ: validation split, without data of the test split" in lines
    assert "piqa validation 0 1 acc_norm 0.00 - 50.00" in lines
    assert "standard error - - - - - - -" in lines
    assert "chance 50.00 50.00 25.00 50.00 25.00 50.00 41.67" in lines
    mean = sum(result.score for result in results.tasks) / 6
    assert f"mean {mean:.2f} - 41.67" in lines
    assert max(map(len, text.splitlines())) <= 80


def test_without_some_of_the_data(task_data, tmp_path):
    for name in set(GROUPS["table3"]) - {"mmlu", "copa"}:
        file = QUESTION_FILES[name].file
        (tmp_path / file).write_text((task_data / file).read_text())
    selection = select(["table3"])
    results = evaluate_tasks(ShortAnswers(), selection, task_data=tmp_path, skip_missing=True)
    lines = [" ".join(line.split()) for line in printed(results).splitlines()]
    errors = [line for line in lines if line.startswith("standard error")]
    found = [results.find(name) for name in GROUPS["table3"]]
    e = [f"{result.stderr:.2f}" if result else "-" for result in found]
    assert errors == [f"standard error {' '.join(e)} -"]
    scores = [results.find(name) for name in GROUPS["table3"]]
    cells = [f"{result.score:.2f}" if result else "-" for result in scores]
    assert cells[0] == cells[-1] == "-" and f"a [model] {' '.join(cells)} -" in lines
    assert "paper: PolyNorm 37.27 67.63 92.40 38.46 70.70 77.04 62.19 40.60 84.00 63.37" in lines
    assert "no data, so no average: MMLU, COPA" in lines
    assert "copa no data" in lines and "arc_challenge_validation" in " ".join(lines)
    assert not any("first" in line for line in lines)
