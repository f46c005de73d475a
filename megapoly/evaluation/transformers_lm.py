"""LM Evaluation Harness on a model of transformers.

Import it only where it is used: it imports the harness and transformers, which takes seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from megapoly.errors import EvaluationError
from megapoly.evaluation.bos_token import bos_token_id

# The texts, ids of the context, ids of the continuation, as the harness passes them.
Request = tuple[Any, list[int], list[int]]


class TransformersLM(HFLM):
    """Model of the harness in this process, computed by transformers.

    Log-probabilities are computed in fp32 whatever the model's dtype, because rounding to bf16 is
    as large as the difference between close answers.

    A model that was trained here reads text as :class:`megapoly.evaluation.engine_lm.EngineLM`
    does: without special tokens, with their names as ordinary text, after the end-of-document token
    if there is no context, and beyond its length if a continuation alone is longer. For other
    models the tokenizer decides, and longer continuations are refused because their positions may
    be limited.

    Args:
        model: a causal language model of transformers, on its device.
        tokenizer: tokenizer of the model; changed if the model was trained here.
        batch_size: sequences per forward pass.
        trained_here: see above.
        add_bos: put before every text what the tokenizer puts there; None: the tokenizer decides.

    Raises:
        EvaluationError: ``add_bos``, and the tokenizer puts nothing before a text.
    """

    _max_length: int | None  # attribute of the harness's class; None: the model's

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int,
        trained_here: bool,
        add_bos: bool | None,
    ) -> None:
        bos, prefix = None, None
        added = tokenizer("", add_special_tokens=True)["input_ids"]
        if add_bos:
            bos = bos_token_id(added)
        if trained_here:
            tokenizer.split_special_tokens = True
            prefix = tokenizer.eos_token_id if bos is None else bos
        logger = logging.getLogger(HFLM.__module__)
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns if a model is passed instead of loaded
        try:
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                softmax_dtype="float32",
                add_bos_token=add_bos,
                prefix_token_id=prefix,
            )
        finally:
            logger.setLevel(level)
        self._trained_here = trained_here
        self.adds_bos = bool(added) if add_bos is None else add_bos

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate continuations of texts.

        Raises:
            EvaluationError: a task generates as many tokens as the model's context has, or more.
        """
        kwargs = [normalize_gen_kwargs(request.args[1], self.max_gen_toks) for request in requests]
        longest = max((each["max_gen_toks"] for each in kwargs), default=0)
        if longest >= self.max_length:
            raise EvaluationError(
                f"a task generates {longest} tokens, which must be less than the model's context "
                f"({self.max_length}); leave it out"
            )
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score encoded requests, also those that are too long for the harness's own method."""
        allowed = self.max_length
        fits = [len(continuation) <= allowed for _, _, continuation in requests]
        answers = iter(
            super()._loglikelihood_tokens(
                [request for request, fit in zip(requests, fits, strict=True) if fit],
                *args,
                **kwargs,
            )
        )
        return [
            next(answers) if fit else self._score_long(request, *args, **kwargs)
            for request, fit in zip(requests, fits, strict=True)
        ]

    def _score_long(self, request: Request, *args: Any, **kwargs: Any) -> tuple[float, bool]:
        length, allowed = len(request[2]), self._max_length
        if not self._trained_here:
            raise EvaluationError(
                f"an answer of {length} tokens is longer than the model's context "
                f"({self.max_length}); leave the task out"
            )
        self._max_length = length
        try:
            (answer,) = super()._loglikelihood_tokens([request], *args, **kwargs)
        finally:
            self._max_length = allowed
        return answer
