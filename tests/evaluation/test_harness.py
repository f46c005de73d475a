"""Scores compared with log-likelihoods summed by hand, and refusals."""

import json
import random

import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from questions import ShortAnswers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from megapoly.errors import EvaluationError
from megapoly.evaluation.harness import SEEDS, evaluate_tasks
from megapoly.evaluation.harness_results import collect_results
from megapoly.evaluation.lm_loader import load_lm
from megapoly.evaluation.local_tasks import QUESTION_FILES
from megapoly.evaluation.tasks import EvalTask, select

NUM_QUESTIONS = 24
HAND_CHECKED = ["arc_challenge_validation", "piqa", "winogrande", "hellaswag"]


def phrase(generator, shortest, longest):
    words = ["tar", "light", "of", "seven", "under", "the", "Ahab", "sperm", "whale", "grey"]
    return " ".join(generator.choices(words, k=generator.randint(shortest, longest)))


def made_up(name, generator):
    """Return a question in the form of a benchmark's file, and its prompts, answers and gold."""
    text, answers = phrase(generator, 3, 8), [phrase(generator, 1, 9) for _ in range(4)]
    if name == "piqa":
        gold = generator.randrange(2)
        record = {"goal": text, "sol1": answers[0], "sol2": answers[1], "label": gold}
        return record, [f"Question: {text}\nAnswer:"] * 2, answers[:2], gold
    gold = generator.randrange(4)
    if name == "arc_challenge_validation":
        choices = {"label": list("ABCD"), "text": answers}
        record = {"question": text, "choices": choices, "answerKey": "ABCD"[gold]}
        return record, [f"Question: {text}\nAnswer:"] * 4, answers, gold
    if name == "hellaswag":
        record = {"activity_label": "Whaling", "ctx_a": "A ship.", "ctx_b": text}
        prompt = f"Whaling: A ship. {text.capitalize()}"
        return record | {"endings": answers, "label": str(gold)}, [prompt] * 4, answers, gold
    assert name == "winogrande"
    record = {"sentence": f"So _ {text}.", "option1": "Ahab", "option2": "Queequeg"}
    prompts = ["So Ahab", "So Queequeg"]
    return record | {"answer": str(gold % 2 + 1)}, prompts, [f"{text}."] * 2, gold % 2


def log_likelihood(model, tokenizer, prompt, answer):
    """Sum log p(token | all before) over the tokens of an answer, in fp64, one answer at a time."""
    start = len(tokenizer(prompt).input_ids)
    ids = torch.tensor([tokenizer(f"{prompt} {answer}").input_ids])
    with torch.no_grad():
        log_p = model(ids).logits.double().log_softmax(-1)[0]
    return sum(log_p[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))


@pytest.fixture(scope="module")
def hand_checked(export, tmp_path_factory):
    """A folder of questions, and accuracy and length-normalised accuracy of each benchmark."""
    folder, generator, expected = tmp_path_factory.mktemp("random"), random.Random(5), {}
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(export)
    for name in HAND_CHECKED:
        right, right_by_length, lines = 0, 0, []
        for _ in range(NUM_QUESTIONS):
            record, prompts, answers, gold = made_up(name, generator)
            lines.append(json.dumps(record) + "\n")
            pairs = zip(prompts, answers, strict=True)
            scores = [log_likelihood(model, tokenizer, *pair) for pair in pairs]
            by_length = [score / len(each) for score, each in zip(scores, answers, strict=True)]
            right += scores.index(max(scores)) == gold
            right_by_length += by_length.index(max(by_length)) == gold
        (folder / QUESTION_FILES[name].file).write_text("".join(lines))
        expected[name] = right / NUM_QUESTIONS, right_by_length / NUM_QUESTIONS
    return folder, expected


@pytest.mark.parametrize("batch_size", [1, 5])
def test_scores_by_hand(export, hand_checked, batch_size):
    folder, expected = hand_checked
    lm = load_lm(export, dtype="float32", device="cpu", batch_size=batch_size)
    results = evaluate_tasks(lm, select(HAND_CHECKED), task_data=folder)
    for name, (accuracy, by_length) in expected.items():
        metrics = results.find(name).metrics
        assert metrics["acc"].value == pytest.approx(accuracy)
        if name == "winogrande":  # the answers are the same: the harness has no acc_norm
            assert list(metrics) == ["acc"]
        else:
            assert metrics["acc_norm"].value == pytest.approx(by_length)
            assert accuracy != by_length and 0 < accuracy < 1
    assert results.find("piqa").score == pytest.approx(100 * expected["piqa"][1])
    assert results.find("winogrande").score == pytest.approx(100 * expected["winogrande"][0])
    scores = [100 * expected[name][name != "winogrande"] for name in HAND_CHECKED]
    assert results.average() == pytest.approx(sum(scores) / 4)


def test_first_questions_only(task_data):
    lm = ShortAnswers()
    results = evaluate_tasks(lm, select(["piqa"]), task_data=task_data, limit=1)
    [result] = results.tasks
    assert lm.scored == [
        ("Question: Dry a wet shirt\nAnswer:", " Hang it up."),
        ("Question: Dry a wet shirt\nAnswer:", " Put it in a pond."),
    ]
    assert (result.num_questions, result.num_questions_in_split) == (1, 2)
    # -12 against -18 with the space before; by length, which is without it, -12/11 against -18/17.
    assert result.metrics["acc"].value == 1 and result.score == 0
    assert result.stderr is None and results.limit == 1


def test_few_shot_examples_are_reproducible_and_not_the_question(hand_checked):
    folder, _ = hand_checked
    runs = [ShortAnswers() for _ in range(2)]
    for lm in runs:
        results = evaluate_tasks(lm, select(["piqa"]), task_data=folder, num_fewshot=3)
        assert results.tasks[0].num_fewshot == 3 and results.seeds == SEEDS
        for context, _ in lm.scored:
            questions = [part.split("\nAnswer:")[0] for part in context.split("\n\n")]
            assert len(set(questions)) == 4
    assert runs[0].scored == runs[1].scored
    # 24 questions with three examples each, not the same three.
    assert len({context.split("\n\n")[0] for context, _ in runs[0].scored}) > 5


def test_progress_counts_answers(task_data):
    lm, seen = ShortAnswers(), []
    hook = lm.cache_hook
    selection = select(["hellaswag", "piqa", "coqa"])
    evaluate_tasks(
        lm, selection, task_data=task_data, on_progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(i, 2 * 4 + 2 * 2 + 2) for i in range(1, 15)]
    assert lm.cache_hook is hook


def test_one_bar_replaces_the_models_own(export, task_data, capfd):
    lm, seen = load_lm(export, dtype="float32", device="cpu", batch_size=2), []
    method = lm.loglikelihood
    evaluate_tasks(
        lm, select(["piqa"]), task_data=task_data, on_progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert "Running loglikelihood" not in capfd.readouterr().err
    assert lm.loglikelihood == method


def test_tasks_that_run_the_answers_are_refused(task_data, monkeypatch):
    """By the harness, too, at the end; its own such tasks need a connection."""
    monkeypatch.setattr(ConfigurableTask, "UNSAFE_CODE", True, raising=False)
    with pytest.raises(EvaluationError, match=r"answers as programs are refused \(megapoly_piqa\)"):
        evaluate_tasks(ShortAnswers(), select(["piqa"]), task_data=task_data)


def test_warnings_of_the_harness_are_counted(export, task_data, tmp_path):
    answers = {"sol1": "Hang it up.", "sol2": "Put it away.", "label": 0}
    lines = [json.dumps({"goal": f"{i} " + "tar " * 600, **answers}) + "\n" for i in range(3)]
    (tmp_path / QUESTION_FILES["piqa"].file).write_text("".join(lines))
    lm = load_lm(export, dtype="float32", device="cpu", batch_size=1)
    [warning] = evaluate_tasks(lm, select(["piqa"]), task_data=tmp_path).warnings
    assert "exceeds model's maximum length (512)" in warning.text and warning.count == 6
    assert evaluate_tasks(ShortAnswers(), select(["copa"]), task_data=task_data).warnings == ()


def test_other_ranks_have_no_results(task_data, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert evaluate_tasks(ShortAnswers(), select(["piqa"]), task_data=task_data) is None


def test_missing_files(task_data, tmp_path):
    for name in ("piqa", "copa"):
        file = QUESTION_FILES[name].file
        (tmp_path / file).write_text((task_data / file).read_text())
    selection = select(["piqa", "coqa", "mmlu", "copa", "lambada_openai"])
    with pytest.raises(EvaluationError) as error:
        evaluate_tasks(ShortAnswers(), selection, task_data=tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0] == f"`{tmp_path}` lacks the data of 3 of 5 tasks:"
    assert lines[1] == "  coqa: coqa__none__validation.jsonl"
    assert lines[2].startswith("  mmlu: hails__mmlu_no_train__abstract_algebra__test.jsonl, ")
    assert lines[2].endswith(" and 111 more")  # 57 subjects, two files each, less three
    assert lines[3] == "  lambada_openai: `lambada_openai` cannot be read from a folder"
    results = evaluate_tasks(ShortAnswers(), selection, task_data=tmp_path, skip_missing=True)
    assert [result.task.name for result in results.tasks] == ["piqa", "copa"]
    assert [skipped.task.name for skipped in results.skipped] == ["coqa", "mmlu", "lambada_openai"]
    with pytest.raises(EvaluationError, match="lacks the data of 1 of 1 tasks"):
        evaluate_tasks(ShortAnswers(), select(["coqa"]), task_data=tmp_path, skip_missing=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, r"`limit` \(0\) must be at least 1"),
        ({"num_fewshot": -1}, r"`num_fewshot` \(-1\) must not be negative"),
    ],
)
def test_numbers_out_of_range(task_data, options, message):
    with pytest.raises(EvaluationError, match=message):
        evaluate_tasks(ShortAnswers(), select(["piqa"]), task_data=task_data, **options)


def test_no_folder(tmp_path):
    with pytest.raises(EvaluationError, match="is not a folder"):
        evaluate_tasks(ShortAnswers(), select(["piqa"]), task_data=tmp_path / "none")


def test_damaged_file(task_data, tmp_path):
    file = QUESTION_FILES["piqa"].file
    (tmp_path / file).write_text((task_data / file).read_text() + "{")
    with pytest.raises(EvaluationError, match="line 3 of .*piqa.* is not a JSON object"):
        evaluate_tasks(ShortAnswers(), select(["piqa"]), task_data=tmp_path)


def test_tasks_of_the_harness(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(EvaluationError, match="`hellaswog` is not valid; .* nearest are hellaswag"):
        evaluate_tasks(ShortAnswers(), select(["hellaswog"]))
    with pytest.raises(EvaluationError, match="data of `piqa` cannot .*`--task-data`"):
        evaluate_tasks(ShortAnswers(), select(["piqa"]))


def test_a_tag_of_the_harness_gives_a_result_for_each_task(task_data, tmp_path):
    for number in (1, 2):
        content = {
            "task": f"dry_{number}",
            "tag": "drying",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(task_data / QUESTION_FILES["piqa"].file)},
                "cache_dir": str(tmp_path / "cache"),
            },
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "goal",
            "doc_to_choice": "{{[sol1, sol2]}}",
            "doc_to_target": "label",
            "num_fewshot": number - 1,
        }
        (tmp_path / f"dry_{number}.yaml").write_text(yaml.safe_dump(content))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    members = manager.load(["drying"])
    raw = lm_eval.simple_evaluate(
        ShortAnswers(), tasks=["drying"], task_manager=manager, log_samples=False
    )
    results = list(collect_results(raw, EvalTask("drying", "drying", "drying"), members))
    assert [result.task.name for result in results] == ["dry_1", "dry_2"]
    assert [result.num_fewshot for result in results] == [0, 1]
    # The metric is the first that the harness reports; one of two shortest answers is right.
    assert [(result.metric, result.score) for result in results] == [("acc", 50)] * 2
