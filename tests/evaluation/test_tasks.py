"""Groups of tasks, and assumptions about them that the paper's own figures confirm."""

import pytest

from megapoly.errors import EvaluationError
from megapoly.evaluation.paper_tables import PAPER_TABLES
from megapoly.evaluation.tasks import GROUPS, TASKS, select

ARC_SIZES = {  # Clark et al., 2018, Table 1: questions of the validation and of the test split
    "arc_easy": (570, 2376),
    "arc_challenge": (299, 1172),
}


def is_a_count(percent, size):
    """Check whether some number of ``size`` questions is this percentage, to two decimals."""
    return any(f"{100 * right / size:.2f}" == f"{percent:.2f}" for right in range(size + 1))


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge"])
def test_split_of_arc_in_each_table(name):
    validation, test = ARC_SIZES[name]
    first, third = GROUPS["table1"].index(name), GROUPS["table3"].index(f"{name}_validation")
    figures = [row[first] for row in PAPER_TABLES["table1"].rows.values()]
    assert all(is_a_count(figure, test) for figure in figures)
    assert not all(is_a_count(figure, validation) for figure in figures)
    figures = [row[third] for row in PAPER_TABLES["table3"].rows.values()]
    assert all(is_a_count(figure, validation) for figure in figures)
    assert not all(is_a_count(figure, test) for figure in figures)
    assert TASKS[name].split == "test" and TASKS[f"{name}_validation"].split == "validation"


@pytest.mark.parametrize("name", ["table1", "table3"])
def test_columns_and_averages_of_the_paper(name):
    table = PAPER_TABLES[name]
    columns = [column.replace("-\n", "").lower() for column in table.columns]
    assert columns == [TASKS[task].column.lower() for task in GROUPS[name]]
    for activation, figures in table.rows.items():
        mean = sum(figures) / len(columns)
        assert mean == pytest.approx(table.averages[activation], abs=0.0051)


def test_groups_and_names():
    assert [task.name for task in select(["table1", "piqa", "copa"]).tasks] == [
        *GROUPS["table1"],
        "copa",
    ]
    paper = select(["paper"])
    assert paper.tables == ("table1", "table3")
    # The thirteen of section 4.1, and ARC's two sets in either split.
    assert len({task.column for task in paper.tasks}) == 13 and len(paper.tasks) == 15
    assert {task.name: task.num_fewshot for task in paper.tasks if task.num_fewshot} == {"mmlu": 5}
    [other] = select(["lambada_openai"]).tasks
    assert (other.harness_task, other.metric, other.num_fewshot) == ("lambada_openai", None, None)
    with pytest.raises(EvaluationError, match="`--tasks` is empty"):
        select([])
