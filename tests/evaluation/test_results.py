"""Content of the JSON, and averages."""

import json
from importlib.metadata import version

import pytest
from questions import ShortAnswers

from megapoly.evaluation.harness import evaluate_tasks
from megapoly.evaluation.local_tasks import QUESTION_FILES
from megapoly.evaluation.results import as_json, write_results
from megapoly.evaluation.tasks import GROUPS, select


@pytest.fixture(scope="module")
def table1(task_data):
    return evaluate_tasks(ShortAnswers(), select(["table1", "coqa"]), task_data=task_data)


def test_json(table1, tmp_path):
    path = tmp_path / "of" / "run.json"
    model = {"path": "somewhere", "dtype": "float32"}
    write_results(path, as_json(model, tasks=table1, perplexity={"mean": {"loss": 2.5}}))
    content = json.loads(path.read_text())
    assert content["model"] == model and content["perplexity"] == {"mean": {"loss": 2.5}}
    assert content["asked_for"] == ["table1", "coqa"] and content["limit"] is None
    assert list(content["tasks"]) == [*GROUPS["table1"], "coqa"]
    winogrande = content["tasks"]["winogrande"]
    assert winogrande == {
        "column": "WinoGrande",
        "harness_task": "winogrande",
        "split": "validation",
        "num_fewshot": 0,
        "num_questions": 2,
        "num_questions_in_split": 2,
        "metric": "acc",
        "score": 50,
        "stderr": 50,
        "chance": 50,
        "unit": "%",
        "metrics": {"acc": {"value": 0.5, "stderr": 0.5}},
    }
    assert set(content["tasks"]["piqa"]["metrics"]) == {"acc", "acc_norm"}
    for library in ("lm_eval", "transformers", "torch"):
        assert content["versions"][library] == version(library)
    assert content["date"][:2] == "20" and content["seeds"]["fewshot"] == 1234
    scores = {name: task["score"] for name, task in content["tasks"].items()}
    assert content["averages"]["all"] == pytest.approx(sum(scores.values()) / 7)
    assert content["averages"]["table1"] == pytest.approx((sum(scores.values()) - 75) / 6)
    assert scores["coqa"] == pytest.approx(75)
    # CoQA's answers are not chosen from a list. SciQ and HellaSwag have four, the others two.
    chances = {name: task["chance"] for name, task in content["tasks"].items()}
    assert chances == dict.fromkeys(scores, 50) | {"sciq": 25, "hellaswag": 25, "coqa": None}
    assert content["averages_chance"]["all"] is None
    assert content["averages_chance"]["table1"] == pytest.approx((2 * 25 + 4 * 50) / 6)
    variances = [content["tasks"][name]["stderr"] ** 2 for name in GROUPS["table1"]]
    expected = (sum(variances) / 36) ** 0.5
    assert content["averages_stderr"]["table1"] == pytest.approx(expected) and expected > 0


def test_chance_follows_the_questions_that_were_asked(task_data):
    """The first question has three answers, the second two."""
    task = select(["arc_easy_validation"])
    for limit, expected in ((1, 100 / 3), (None, (100 / 3 + 50) / 2)):
        results = evaluate_tasks(ShortAnswers(), task, task_data=task_data, limit=limit)
        assert results.tasks[0].chance_score == pytest.approx(expected)
        assert results.average_chance() == pytest.approx(expected)
    assert results.average_stderr() == pytest.approx(results.tasks[0].stderr)


def test_no_average_where_a_task_is_missing(task_data, tmp_path):
    for name in set(GROUPS["table1"]) - {"sciq"}:
        file = QUESTION_FILES[name].file
        (tmp_path / file).write_text((task_data / file).read_text())
    results = evaluate_tasks(
        ShortAnswers(), select(["table1"]), task_data=tmp_path, skip_missing=True
    )
    content = as_json({}, tasks=results)
    assert content["averages"]["table1"] is None and content["averages"]["all"] is not None
    assert content["skipped"] == {"sciq": ["sciq__none__validation.jsonl"]}
