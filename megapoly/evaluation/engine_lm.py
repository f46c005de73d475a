"""LM Evaluation Harness on the engine's model, at any parallel layout.

Import it after :func:`megapoly.platform.device.select_platform`, because it imports the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megapoly.config.fp8 import sequence_multiple
from megapoly.data.loader import Batch
from megapoly.data.tokenizer import Tokenizer
from megapoly.errors import DataError, UnavailableError
from megapoly.evaluation.bos_token import bos_token_id
from megapoly.evaluation.token_scores import token_scores
from megapoly.platform.progress import OnProgress
from megapoly.training.distributed import sum_over_all
from megapoly.training.state import ModelState, evaluation_mode
from megapoly.training.step import run_schedule

logger = logging.getLogger(__name__)

_NO_TARGET = -1

# The texts, ids of the context, ids of the continuation, as the harness passes them.
Request = tuple[Any, list[int], list[int]]


@dataclass(frozen=True)
class _ScoredRequest:
    """A request as input of the model.

    Args:
        place: its index among the requests.
        tokens: input; without the last token of the continuation, which predicts nothing.
        continuation: targets of the last positions.
    """

    place: int
    tokens: list[int]
    continuation: list[int]


class EngineLM(TemplateLM):
    """Model of the harness that is distributed over all ranks of a job.

    Every rank calls the harness with the same tasks and gets the same results; for the harness
    each rank is the only process. Within a call, data-parallel ranks share the requests and all
    others compute together.

    Text is encoded as in training: without special tokens unless ``add_bos``, and the name of a
    special token within a text is ordinary text. Context and continuation are encoded as one text;
    spaces at the end of the context belong to the continuation (``TemplateLM``). A text without
    context follows the end-of-document token, as in training, or with ``add_bos`` the token that
    begins a text.

    Note:
        A context is cut on the left so that it fits in ``training.seq_length`` together with the
        continuation. Rotary positions would reach further, but the model was never trained there.
        A continuation is never cut; if it alone is longer, it is read beyond that length, after
        the last token of its context.

    Args:
        state: a run in training, or a model alone; dropout is disabled while requests run.
        tokenizer: tokenizer of its training data.
        batch_size: sequences per forward pass and rank; None: ``training.micro_batch_size``.
        add_bos: put before every text what the tokenizer's post-processor puts there; for models
            whose training text was prepared this way.
        on_progress: called with the numbers of scored sequences and of all sequences of a call;
            each window of a rolling request is a sequence.

    Raises:
        EvaluationError: ``add_bos``, and the tokenizer puts nothing before a text.
    """

    # Reason that `evaluate_tasks` gives before it runs anything.
    refuses_generation = (
        "the training model has no cache of keys and values; evaluate its checkpoint with one "
        "process of `megapoly evaluate`, which converts it, or leave these tasks out"
    )

    def __init__(
        self,
        state: ModelState,
        tokenizer: Tokenizer,
        *,
        batch_size: int | None = None,
        add_bos: bool = False,
        on_progress: OnProgress | None = None,
    ) -> None:
        super().__init__()
        self._state = state
        self._text = tokenizer
        self._batch_size = batch_size or state.config.training.micro_batch_size
        self._add_bos = add_bos
        self._on_progress = on_progress
        self._prefix = tokenizer.eod
        if add_bos:
            self._prefix = bos_token_id(tokenizer.encode_with_special_tokens(""))

    @property
    def eot_token_id(self) -> int:
        """Id that ends a document."""
        return self._text.eod

    @property
    def prefix_token_id(self) -> int:
        """Id before a text without context: with ``add_bos`` bos, else end of document."""
        return self._prefix

    @property
    def max_length(self) -> int:
        """Number of tokens in the model's context."""
        return self._state.config.training.seq_length

    @property
    def tokenizer_name(self) -> str:
        """Name that distinguishes caches of encoded requests."""
        return self._text.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode a text; by default with special tokens only if ``add_bos``."""
        if self._add_bos if add_special_tokens is None else add_special_tokens:
            return self._text.encode_with_special_tokens(string)
        return self._text.encode(string)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score continuations of contexts; collective.

        Returns:
            For each request the sum of its continuation's log-probabilities, and whether each of
            its tokens is the most likely one.
        """
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score texts in windows of ``max_length`` that predict each token once; collective.

        Returns:
            The log-probability of each text.
        """
        windows: list[Request] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            owners += [i] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows)
        for owner, (score, _) in zip(owners, scores, strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Refuse to generate text.

        Raises:
            UnavailableError: always.
        """
        raise UnavailableError(f"{len(requests)} requests generate text: {self.refuses_generation}")

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score encoded requests, longest first, so that a pass has sequences of similar length."""
        scored = [self._as_input(i, *request[1:]) for i, request in enumerate(requests)]
        # Log-probability of each continuation, and how many of its tokens are not the most likely.
        totals = torch.zeros(len(scored), 2, dtype=torch.float64)
        num_cut = sum(
            len(each.tokens) < len(context) + len(continuation) - 1
            for each, (_, context, continuation) in zip(scored, requests, strict=True)
        )
        if num_cut:
            logger.info(
                "%d of %d contexts are cut on the left: with the continuation they are longer than "
                "`training.seq_length` (%d)",
                num_cut,
                len(scored),
                self.max_length,
            )
        scored.sort(key=lambda request: -len(request.tokens))
        num_done = 0
        with evaluation_mode(self._state):
            for of_all in self._rounds(scored):
                self._run(of_all, totals)
                num_done += sum(map(len, of_all))
                if self._on_progress is not None:
                    self._on_progress(num_done, len(scored))
        summed = sum_over_all(totals.flatten().tolist(), self._state.platform)
        return [
            (log_probability, misses == 0)
            for log_probability, misses in zip(summed[::2], summed[1::2], strict=True)
        ]

    def _as_input(self, place: int, context: list[int], continuation: list[int]) -> _ScoredRequest:
        if not continuation:
            raise DataError(
                f"request {place + 1} of the task has a continuation without tokens, which cannot "
                "be scored; correct the task's choices"
            )
        tokens = (context or [self.prefix_token_id]) + continuation
        length = max(self.max_length, len(continuation))
        return _ScoredRequest(place, tokens[-(length + 1) : -1], continuation)

    def _rounds(self, scored: list[_ScoredRequest]) -> Iterator[list[list[_ScoredRequest]]]:
        """Split requests into rounds: the micro-batches that all replicas run at once.

        Every rank has the same number of micro-batches of the same shape, because data-parallel
        ranks share experts and an interleaved pipeline needs as many as it has stages.
        """
        num_parts = (
            parallel_state.get_data_parallel_world_size()
            * parallel_state.get_pipeline_model_parallel_world_size()
        )
        for start in range(0, len(scored), self._batch_size * num_parts):
            chosen = scored[start : start + self._batch_size * num_parts]
            yield [chosen[part::num_parts] for part in range(num_parts)]

    def _run(self, of_all: list[list[_ScoredRequest]], totals: Tensor) -> None:
        """Run this rank's part of a round, and write the scores that it owns to ``totals``."""
        rows = len(of_all[0])
        length = self._padded(max(len(request.tokens) for request in of_all[0]))
        replica = parallel_state.get_data_parallel_rank()
        mine = of_all[replica :: parallel_state.get_data_parallel_world_size()]
        results = run_schedule(
            self._state,
            partial(_forward_step, self._state.platform.device),
            iter([self._batch(requests, rows, length) for requests in mine]),
            len(mine),
            micro_batch_size=rows,
            seq_length=length,
            forward_only=True,
        )
        # Tensor-parallel ranks have equal scores; scores of context-parallel ranks add up.
        if results and parallel_state.get_tensor_model_parallel_rank() == 0:
            for requests, result in zip(mine, results, strict=True):
                places = [request.place for request in requests]
                totals[places] = result[: len(places)].cpu()

    def _padded(self, length: int) -> int:
        """Round up to a length that sequence and context parallelism can split and FP8 supports."""
        parallel = self._state.config.parallel
        multiple = parallel.tensor_model_parallel_size * sequence_multiple(self._state.config)
        if parallel.context_parallel_size > 1:
            multiple *= 2 * parallel.context_parallel_size
        return -(-length // multiple) * multiple

    def _batch(self, requests: list[_ScoredRequest], rows: int, length: int) -> Batch:
        """Build tokens [rows, length], padded on the right, which a causal model does not see."""
        tokens = torch.full((rows, length), self.eot_token_id)
        targets = torch.full((rows, length), _NO_TARGET)
        for row, request in enumerate(requests):
            end = len(request.tokens)
            tokens[row, :end] = torch.tensor(request.tokens)
            targets[row, end - len(request.continuation) : end] = torch.tensor(request.continuation)
        positions = torch.arange(length).repeat(rows, 1)
        return {"tokens": tokens, "targets": targets, "position_ids": positions}


def _forward_step(device: torch.device, batches: Iterator[Batch], model: torch.nn.Module) -> Any:
    """Run one micro-batch; called by the engine's schedules."""
    batch = {key: value.to(device, non_blocking=True) for key, value in next(batches).items()}
    batch = get_batch_on_this_cp_rank(batch)
    logits = model(batch["tokens"], batch["position_ids"], attention_mask=None)
    return logits, partial(_score, batch["targets"])


def _score(targets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce logits [b, s / cp, v / tp] to [b, 2]: log-probability, number of other tokens.

    The second column counts tokens that are not the most likely ones. The first result is a loss
    that the engine's schedules require; it has no effect.
    """
    is_target = targets != _NO_TARGET
    log_probabilities, is_greedy = token_scores(
        logits[is_target],
        targets[is_target],
        group=parallel_state.get_tensor_model_parallel_group(),
    )
    per_token = torch.stack([log_probabilities.double(), (~is_greedy).double()], dim=-1)
    totals = per_token.new_zeros(len(targets), 2)
    totals.index_add_(0, is_target.nonzero()[:, 0], per_token)
    return logits.new_zeros(()), totals
