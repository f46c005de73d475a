"""Each benchmark from a folder: prompts, answers and scores of made-up questions."""

import math

import pytest
from questions import BY_FILE, ShortAnswers

from megapoly.errors import EvaluationError
from megapoly.evaluation.harness import evaluate_tasks
from megapoly.evaluation.local_tasks import (
    QUESTION_FILES,
    fingerprint_of_questions,
    missing_files,
)
from megapoly.evaluation.tasks import TASKS, select

# Prompt and answers of the first question of each; the part of all questions whose right answer is
# the shortest, the first of several.
FROZEN_PROMPT = "Question: Which is hot?\nAnswer:"
ARC_PROMPT = "Question: Which of these melts in the sun?\nAnswer:"
CSQA_PROMPT = "Question: Where is the fish?\nA. sea\nB. sky\nC. inn\nD. mill\nE. cave\nAnswer:"
EXPECTED = {
    "arc_easy": (FROZEN_PROMPT, [" a glacier", " fire"], 0.5),
    "arc_challenge": (FROZEN_PROMPT, [" a glacier", " fire"], 0.5),
    "openbookqa": ("Which is hot?", [" a glacier", " fire"], 0.5),
    "arc_easy_validation": (ARC_PROMPT, [" a granite block", " ice", " a copper pot"], 0.5),
    "arc_challenge_validation": (ARC_PROMPT, [" a granite block", " ice", " a copper pot"], 0.5),
    "openbookqa_validation": ("A kettle boils when it is", [" hot", " in a cupboard"], 0.5),
    "hellaswag": (
        "Baking bread: A woman kneads dough. She",
        [" puts it. in a tin.", " sails.", " paints a wall.", " sings aloud."],
        0.5,
    ),
    "piqa": ("Question: Dry a wet shirt\nAnswer:", [" Hang it up.", " Put it in a pond."], 0.5),
    "sciq": (
        "Plants make sugar from light.\nQuestion: What do plants make?\nAnswer:",
        [" granite", " plastic", " petrol", " sugar"],
        0.5,
    ),
    "winogrande": ("Ann met Eve and Ann", [" waved."], 0.5),
    "copa": (
        "It rained therefore",
        ["  the road got wet.", "  the moon fell into the sea."],
        0.5,
    ),
    "boolq": ("Iron is a metal.\nQuestion: is iron a metal?\nAnswer:", [" no", " yes"], 2 / 3),
    "commonsense_qa": (CSQA_PROMPT, [" A", " B", " C", " D", " E"], 0.5),
    "social_iqa": (
        "Q: Kim lost a shoe. What next?\nA:",
        [" look for it again", " sleep", " jump up and down"],
        0.5,
    ),
}
CONVERSATION = "Tom has a cat.\n\nQ: Who has a cat?\n\nA: Tom\n\nQ: What has Tom?\n\nA:"
PLAIN = [*EXPECTED, "coqa"]


@pytest.fixture(scope="module")
def plain(task_data):
    lm = ShortAnswers()
    return lm, evaluate_tasks(lm, select(PLAIN), task_data=task_data)


@pytest.fixture(scope="module")
def mmlu(task_data):
    lm = ShortAnswers()
    return lm, evaluate_tasks(lm, select(["mmlu", "mmlu_continuation"]), task_data=task_data)


def test_every_set_is_covered():
    assert set(PLAIN) == set(QUESTION_FILES)
    assert {*PLAIN, "mmlu", "mmlu_continuation"} == set(TASKS)


@pytest.mark.parametrize("name", EXPECTED)
def test_prompts_and_score(plain, name):
    lm, results = plain
    prompt, answers, accuracy = EXPECTED[name]
    answered = [answer for context, answer in lm.scored if context == prompt]
    assert answered[: len(answers)] == answers
    result = results.find(name)
    assert result.metrics["acc"].value == pytest.approx(accuracy)
    count = len(BY_FILE[QUESTION_FILES[name].file])
    assert (result.num_questions, result.num_questions_in_split) == (count, count)
    assert result.num_fewshot == 0 and result.split == QUESTION_FILES[name].split
    stderr = math.sqrt(accuracy * (1 - accuracy) / (count - 1))
    assert result.metrics["acc"].stderr == pytest.approx(stderr)


def test_conversations(plain):
    lm, results = plain
    assert lm.generated == [CONVERSATION] * 2
    result = results.find("coqa")
    # "one black cat" has one word of three in common with "a cat", whose article does not count.
    assert result.metrics["em"].value == 0.5
    assert result.score == pytest.approx(100 * (1 + 0.5) / 2)


def test_mmlu_prompts(mmlu):
    lm, results = mmlu
    head = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    [context] = {
        context
        for context, answer in lm.scored
        if context.startswith(head) and context.endswith("Red and blue?\n" + _CHOICES[1])
    }
    two, red = f"Two and two?\n{_CHOICES[0]} A\n\n", f"Red and blue?\n{_CHOICES[1]} B\n\n"
    assert context == head + two + red + two + red + two + f"Red and blue?\n{_CHOICES[1]}"
    assert [answer for prompt, answer in lm.scored if prompt == context] == [" A", " B", " C", " D"]
    first, second = results.tasks
    assert (first.num_questions, first.num_fewshot, first.split) == (114, 5, "test")
    # All letters are of one length, and the first is taken: right in one of two questions.
    assert first.score == 50 and len(first.subtasks) == 57
    assert first.subtasks["anatomy"]["acc"].value == 0.5
    # Shortest: "six" (wrong) and "grey" (wrong).
    assert second.score == 0 and second.num_fewshot == 5


_CHOICES = [
    "A. four\nB. five\nC. six\nD. ten\nAnswer:",
    "A. green\nB. violet\nC. black\nD. grey\nAnswer:",
]


def test_examples_never_hold_the_question(task_data):
    lm = ShortAnswers()
    names = [name for name in EXPECTED if name != "winogrande"]
    results = evaluate_tasks(lm, select(names), task_data=task_data, num_fewshot=1)
    assert {result.num_fewshot for result in results.tasks} == {1}
    first = "Question: Dry a wet shirt\nAnswer:"
    second = "Question: Cut paper\nAnswer:"
    contexts = {context for context, _ in lm.scored if "paper\nAnswer" in context}
    assert contexts == {
        f"{first} Hang it up.\n\n{second}",
        f"{second} Use a pair of scissors.\n\n{first}",
    }
    for name, (prompt, *_) in EXPECTED.items():
        ending = [context for context, _ in lm.scored if context.endswith(f"\n\n{prompt}")]
        assert name == "winogrande" or ending
        assert all(context.count(prompt) == 1 for context in ending)


def test_a_field_is_missing(task_data, tmp_path):
    file = QUESTION_FILES["piqa"].file
    (tmp_path / file).write_text('{"goal": "Dry a shirt", "sol1": "Hang it up.", "label": 0}\n')
    with pytest.raises(EvaluationError, match=rf"line 1 of `.*{file}` lacks sol2; each line must"):
        missing_files(TASKS["piqa"], tmp_path)
    line = '{"goal": "Dry a shirt", "sol1": "Hang it.", "sol2": "Eat it.", "label": 0}\n'
    (tmp_path / file).write_text(2 * line + line.replace('"Eat it."', "null"))
    with pytest.raises(EvaluationError, match=rf"line 3 of `.*{file}` lacks sol2"):
        missing_files(TASKS["piqa"], tmp_path)
    (tmp_path / file).write_text("\n")
    with pytest.raises(EvaluationError, match="is not a JSON object"):
        missing_files(TASKS["piqa"], tmp_path)


def test_the_fingerprint_of_a_folder_changes_with_its_questions_alone(tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        (folder / "sciq.jsonl").write_text('{"question": "Why?"}\n')
    (folders[1] / "notes.txt").write_text("not questions")
    first, second = map(fingerprint_of_questions, folders)
    assert first == second
    (folders[1] / "sciq.jsonl").write_text('{"question": "Who?"}\n')
    third = fingerprint_of_questions(folders[1])
    (folders[1] / "sciq.jsonl").rename(folders[1] / "piqa.jsonl")
    assert (
        len({first, third, fingerprint_of_questions(folders[1]), fingerprint_of_questions(None)})
        == 4
    )
