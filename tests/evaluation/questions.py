"""Made-up questions in the form of each benchmark's file; a model that prefers short answers."""

import json

from lm_eval.api.model import LM

from megapoly.evaluation.local_tasks import all_files

ARC = [
    {
        "question": "Which of these melts in the sun?",
        "choices": {"label": ["A", "B", "C"], "text": ["a granite block", "ice", "a copper pot"]},
        "answerKey": "B",
    },
    {
        "question": "What do roots take up?",
        "choices": {"label": ["1", "2"], "text": ["rain water", "light"]},
        "answerKey": "1",
    },
]
FROZEN = [
    {"id": "1", "question": "Which is hot?", "choices": ["a glacier", "fire"], "gold": 1},
    {"id": "2", "question": "Which is wet?", "choices": ["the open sea", "sand"], "gold": 0},
]
MMLU = [
    {"question": "Two and two? ", "choices": ["four", "five", "six", "ten"], "answer": 0},
    {"question": "Red and blue?", "choices": ["green", "violet", "black", "grey"], "answer": 1},
]
BY_FILE = {
    "arc_easy__test.jsonl": FROZEN,
    "arc_challenge__test.jsonl": FROZEN,
    "openbookqa__test.jsonl": FROZEN,
    "ai2_arc__ARC-Easy__validation.jsonl": ARC,
    "ai2_arc__ARC-Challenge__validation.jsonl": ARC,
    "openbookqa__main__validation.jsonl": [
        {
            "question_stem": "A kettle boils when it is",
            "choices": {"label": ["A", "B"], "text": ["hot", "in a cupboard"]},
            "answerKey": "A",
        },
        {
            "question_stem": "Owls hunt",
            "choices": {"label": ["A", "B"], "text": ["at noon", "after nightfall"]},
            "answerKey": "B",
        },
    ],
    "hellaswag__none__validation.jsonl": [
        {
            "activity_label": "Baking bread",
            "ctx_a": "A woman kneads dough.",
            "ctx_b": "she",
            "endings": ["puts it [title] in a tin.", "sails.", "paints a wall.", "sings aloud."],
            "label": "0",
        },
        {
            "activity_label": "Rowing",
            "ctx_a": "Two men sit in a boat.",
            "ctx_b": "they",
            "endings": ["row.", "fly to the moon.", "read the paper.", "eat a whole horse."],
            "label": "0",
        },
    ],
    "piqa__plain_text__validation.jsonl": [
        {"goal": "Dry a wet shirt", "sol1": "Hang it up.", "sol2": "Put it in a pond.", "label": 0},
        {"goal": "Cut paper", "sol1": "Use soup.", "sol2": "Use a pair of scissors.", "label": 1},
    ],
    "sciq__none__validation.jsonl": [
        {
            "support": " Plants make sugar from light.",
            "question": "What do plants make?",
            "distractor1": "granite",
            "distractor2": "plastic",
            "distractor3": "petrol",
            "correct_answer": "sugar",
        },
        {
            "support": "",
            "question": "Who walks on the moon?",
            "distractor1": "fish",
            "distractor2": "oaks",
            "distractor3": "whales",
            "correct_answer": "astronauts",
        },
    ],
    "winogrande__winogrande_xl__validation.jsonl": [
        {"sentence": "Ann met Eve and _ waved.", "option1": "Ann", "option2": "Eve", "answer": "1"},
        {"sentence": "The cup hit the jug, so the _ broke.", "option1": "cup", "option2": "jug",
         "answer": "2"},
    ],
    "super_glue__copa__validation.jsonl": [
        {"premise": "It rained.", "question": "effect", "choice1": "The road got wet.",
         "choice2": "The moon fell into the sea.", "label": 0},
        {"premise": "She laughed.", "question": "cause", "choice1": "It rained.",
         "choice2": "She had heard a joke.", "label": 1},
    ],
    "boolq__none__validation.jsonl": [
        {"passage": "Iron is a metal.", "question": "is iron a metal", "answer": True},
        {"passage": "Oak is a wood.", "question": "is oak a metal", "answer": False},
        {"passage": "Ice is cold.", "question": "is ice hot", "answer": False},
    ],
    "tau__commonsense_qa__none__validation.jsonl": [
        {
            "question": f"Where is the {thing}?",
            "choices": {"label": list("ABCDE"), "text": ["sea", "sky", "inn", "mill", "cave"]},
            "answerKey": key,
        }
        for thing, key in (("fish", "A"), ("baker", "D"))
    ],
    "social_i_qa__none__validation.jsonl": [
        {"context": "Kim lost a shoe.", "question": "What next?", "answerA": "look for it again",
         "answerB": "sleep", "answerC": "jump up and down", "label": "1"},
        {"context": "Lee won.", "question": "How does Lee feel?", "answerA": "sad and blue",
         "answerB": "very proud", "answerC": "glad", "label": "3"},
    ],
    "coqa__none__validation.jsonl": [
        {
            "story": "Tom has a cat.",
            "questions": {"input_text": ["Who has a cat?", "What has Tom?"]},
            "answers": {"input_text": ["Tom", answer]},
            "additional_answers": {"0": {"input_text": ["Tom", answer]}},
        }
        for answer in ("a cat", "one black cat")
    ],
}  # fmt: skip


def write_folder(folder):
    """Write every file that a folder of questions can have."""
    for file in all_files():
        records = BY_FILE.get(file, MMLU * 3 if file.endswith("__dev.jsonl") else MMLU)
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / file).write_text(text)
    return folder


class ShortAnswers(LM):
    """The log-likelihood of an answer is minus its length; texts that it generates are ``a cat``.

    Keeps the requests.
    """

    def __init__(self):
        super().__init__()
        self.scored, self.generated = [], []

    def loglikelihood(self, requests):
        answers = []
        for request in requests:
            self.scored.append(request.args)
            answers.append((-float(len(request.args[1])), False))
            self.cache_hook.add_partial("loglikelihood", request.args, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests):
        return [-float(len(request.args[0])) for request in requests]

    def generate_until(self, requests):
        self.generated += [request.args[0] for request in requests]
        for request in requests:
            self.cache_hook.add_partial("generate_until", request.args, "a cat")
        return ["a cat"] * len(requests)
