"""Facts that rules read, and the wording that rules share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megapoly.config import resolve
from megapoly.config.options import OPTIONS
from megapoly.config.schema import Config
from megapoly.platform.machine import Machine

if TYPE_CHECKING:
    from megapoly.activations.registry import Activation


@dataclass(frozen=True)
class Facts:
    """A configuration and the machine that is to run it; arguments of ``find_problems``.

    ``lm_eval_available``: whether LM Evaluation Harness is installed.
    """

    config: Config
    world_size: int
    machine: Machine
    tokenizer_vocab_size: int | None
    lm_eval_available: bool = True

    @property
    def is_moe(self) -> bool:
        """Whether the model has experts."""
        return self.config.model.num_moe_experts is not None

    @property
    def activation(self) -> Activation | None:
        """Entry of the registry; None if the name is unknown, which another rule reports."""
        from megapoly.activations.registry import ACTIVATIONS

        return ACTIVATIONS.get(self.config.model.activation)

    @property
    def device(self) -> str:
        """The device that training would use, ``cpu`` or ``cuda``."""
        requested = self.config.training.device
        return requested if requested != "auto" else "cuda" if self.machine.cuda else "cpu"

    @property
    def uses_transformer_engine(self) -> bool:
        """Whether layers would come from Transformer Engine."""
        return resolve.uses_transformer_engine(self.config.model, self.device, self.machine)

    @property
    def data_parallel_size(self) -> int | None:
        """Model replicas; None if the sizes do not divide the job, which another rule reports."""
        parallel = self.config.parallel
        sizes = (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.context_parallel_size,
        )
        if min(sizes) < 1 or self.world_size % math.prod(sizes):
            return None
        return resolve.data_parallel_size(self.config, self.world_size)


Rule = Callable[[Facts], Iterator[str]]
_LARGEST_FACTORED = 2**32  # 65,536 divisions


def value_of(config: Config, key: str) -> Any:
    """Return the value of an option by its dotted name."""
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)


def have_no_effect(
    config: Config, keys: Sequence[str], condition: str, alternative: str = ""
) -> Iterator[str]:
    """Yield a message if options differ from their defaults where they have no effect.

    Args:
        config: the configuration.
        keys: options by dotted name.
        condition: why they have no effect, such as "with `model.activation` (gelu)".
        alternative: to removing them, such as ", or take WSD".
    """
    values = {key: value_of(config, key) for key in keys}
    found = [f"`{k}` ({value})" for k, value in values.items() if value != OPTIONS[k].default]
    if found:
        has, it = ("has", "it") if len(found) == 1 else ("have", "them")
        yield f"{', '.join(found)} {has} no effect {condition}; remove {it}{alternative}"


def must_be_multiple(what: str, value: int, of: int, of_what: str) -> Iterator[str]:
    """Yield a message if ``value`` is not a multiple; another rule refuses sizes below 1."""
    if value < 1 or of < 1 or value % of == 0:
        return
    below, above = value // of * of, (value // of + 1) * of
    yield (
        f"{what} ({value}) must be divisible by {of_what} ({of}); "
        + (f"{below} and {above} are the nearest that are" if below else f"{above} is the nearest")
    )


def must_divide(what: str, value: int, whole: int, whole_what: str) -> Iterator[str]:
    """Yield a message if ``value`` is not a divisor; another rule refuses sizes below 1."""
    if value < 1 or whole < 1 or whole % value == 0:
        return
    nearest = ""
    if whole <= _LARGEST_FACTORED:  # of any other, the rule on ranges gives the largest
        small = [size for size in range(1, math.isqrt(whole) + 1) if whole % size == 0]
        divisors = {*small, *(whole // size for size in small)}
        below = max(size for size in divisors if size < value)
        above = min((size for size in divisors if size > value), default=None)
        nearest = (
            f"; {below} is the nearest"
            if above is None
            else f"; {below} and {above} are the nearest that do"
        )
    yield f"{what} ({value}) must divide {whole_what} ({whole}){nearest}"
