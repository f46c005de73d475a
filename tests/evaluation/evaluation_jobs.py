"""Functions that the processes of a test run on a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import warnings
from pathlib import Path

import torch

from megapoly.evaluation.loaded_checkpoint import loaded_checkpoint

TALE = (
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in "
    "my purse, and nothing particular to interest me on shore, I thought I would sail about a "
    "little and see the watery part of the world. It is a way I have of driving off the spleen."
)
TEXTS = [
    ("The whale", " swam in the sea"),
    ("", "Call me Ishmael."),  # after an end of document
    ("The whale ", "swam"),  # the space belongs to what follows
    (TALE, " and regulating the circulation."),  # context too long
    ("Once upon a time:", TALE),  # continuation too long
    ("a", " b"),
    ("It is", " a way"),
]
# Models and layouts that the harness evaluates also.
WITH_HARNESS = [("dense", "1"), ("dense", "dp2")]


@dataclasses.dataclass
class Outcome:
    """Results of one rank; by hand are those that one process computes sequence by sequence."""

    validation: dict[str, tuple[float, float, int]]
    scores: list[tuple[float, bool]]
    rolling: list[float]
    harness: dict[str, float] | None
    progress: list[tuple[int, int]]
    token_scores: list[tuple[float, bool]]
    by_hand: list[tuple[float, bool]] = dataclasses.field(default_factory=list)
    rolling_by_hand: list[float] = dataclasses.field(default_factory=list)
    greedy_requests: list[tuple[list[int], list[int]]] = dataclasses.field(default_factory=list)
    accuracy_by_hand: float = 0.0


def evaluate_everything(
    checkpoint: Path,
    overrides: list[str],
    task_folder: Path,
    greedy: list[tuple[list[int], list[int]]] | None,
    with_harness: bool,
) -> Outcome:
    """Validation sets and requests at a layout; ``greedy`` None: also all by hand."""
    warnings.filterwarnings("ignore")
    with loaded_checkpoint(checkpoint, overrides, with_validation=True) as loaded:
        from lm_eval.api.instance import Instance

        from megapoly.evaluation.engine_lm import EngineLM
        from megapoly.training.evaluation import evaluate_validation_sets

        progress: list[tuple[int, int]] = []
        lm = EngineLM(
            loaded.model,
            loaded.tokenizer,
            batch_size=2,
            on_progress=lambda *numbers: progress.append(numbers),
        )
        by_hand = _ByHand(loaded) if greedy is None else None
        if by_hand is not None:
            greedy = by_hand.greedy_requests()
        results = evaluate_validation_sets(loaded.model, loaded.validation)
        scores = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in TEXTS])
        outcome = Outcome(
            validation={name: (r.loss, r.ppl, r.num_tokens) for name, r in results.items()},
            scores=scores,
            progress=list(progress),
            rolling=lm.loglikelihood_rolling(
                [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (TALE, "Sea")]
            ),
            harness=_harness(lm, task_folder) if with_harness else None,
            token_scores=lm._loglikelihood_tokens([(None, *pair) for pair in greedy]),
        )
        if by_hand is not None:
            outcome.by_hand = [by_hand.score(*pair) for pair in TEXTS]
            outcome.rolling_by_hand = [by_hand.rolling(text) for text in (TALE, "Sea")]
            outcome.greedy_requests = greedy
            outcome.accuracy_by_hand = by_hand.accuracy(task_folder / "questions.jsonl")
        return outcome


def _harness(lm, task_folder: Path) -> dict[str, float] | None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    results = lm_eval.simple_evaluate(lm, tasks=["whales"], task_manager=manager)
    return None if results is None else results["results"]["whales"]


class _ByHand:
    """Log-likelihoods from logits of one process, a sequence at a time, in fp64."""

    def __init__(self, loaded):
        (self.model,) = loaded.model.chunks
        self.encode, self.eod = loaded.tokenizer.encode, loaded.tokenizer.eod
        self.window = loaded.model.config.training.seq_length

    @torch.no_grad()
    def log_probabilities(self, tokens: list[int]) -> torch.Tensor:
        positions = torch.arange(len(tokens))[None]
        logits = self.model(torch.tensor(tokens)[None], positions, attention_mask=None)
        return logits[0].double().log_softmax(dim=-1)

    def score_ids(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        room = max(1, self.window + 1 - len(continuation))
        tokens = context[-room:] + continuation
        rows = self.log_probabilities(tokens[:-1])[-len(continuation) :]
        total = sum(row[token].item() for row, token in zip(rows, continuation, strict=True))
        return total, rows.argmax(dim=-1).tolist() == continuation

    def score(self, context: str, continuation: str) -> tuple[float, bool]:
        tokens = self.encode(context + continuation)
        length = len(self.encode(context.rstrip()))
        return self.score_ids(tokens[:length] or [self.eod], tokens[length:])

    def rolling(self, text: str) -> float:
        tokens, total = self.encode(text), 0.0
        for start in range(0, len(tokens), self.window):
            end = min(len(tokens), start + self.window)
            seen = [self.eod, *tokens][:end][-self.window :]
            rows = self.log_probabilities(seen)[start - end :]
            total += sum(r[t].item() for r, t in zip(rows, tokens[start:end], strict=True))
        return total

    def accuracy(self, questions: Path) -> float:
        right = []
        for line in questions.read_text().splitlines():
            question = json.loads(line)
            scores = [self.score(question["question"], f" {c}")[0] for c in question["choices"]]
            right.append(scores.index(max(scores)) == question["gold"])
        return sum(right) / len(right)

    def greedy_requests(self) -> list[tuple[list[int], list[int]]]:
        """Return continuations of most likely tokens, each also with another last token."""
        requests = []
        for text in ("The whale", "Call me", TALE):
            context = self.encode(text)[: self.window - 2]
            tokens = list(context)
            for _ in range(3):
                tokens.append(int(self.log_probabilities(tokens)[-1].argmax()))
            continuation = tokens[len(context) :]
            other = [*continuation[:2], continuation[2] ^ 1]
            requests += [(context, continuation), (context, other)]
        return requests


def evaluate_with_cache(cache: str, argv: list[str]) -> tuple[int, str, str]:
    """As :func:`evaluate_command`, with copies of stored checkpoints in a folder."""
    os.environ["XDG_CACHE_HOME"] = cache
    return evaluate_command(argv)


def evaluate_command(args: list[str]) -> tuple[int, str, str]:
    """Return exit status, standard output and error of ``megapoly evaluate`` on this rank."""
    from megapoly.commands import evaluate

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = evaluate.main(args)
    return status, out.getvalue(), err.getvalue()


def encoded_by_engine_lm(folder: Path, texts: list[str], add_bos: bool) -> list[list[int]]:
    """Return ids of texts, and at the end the id before a text without context."""
    warnings.filterwarnings("ignore")
    from megapoly.data.tokenizer import load_tokenizer
    from megapoly.evaluation.engine_lm import EngineLM

    # The model is not read where text becomes ids.
    lm = EngineLM(None, load_tokenizer(folder), batch_size=1, add_bos=add_bos)
    return [*map(lm.tok_encode, texts), [lm.prefix_token_id]]


def rule_of_loaded(checkpoint: Path) -> bool:
    """Return whether a checkpoint's texts begin with BOS, as the engine's evaluation reads it."""
    with loaded_checkpoint(checkpoint) as loaded:
        return loaded.add_bos
