"""State of every random generator that training draws from, on one rank."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megapoly.platform.device import Platform


def random_state(platform: Platform) -> dict[str, Any]:
    """The state that :func:`set_random_state` goes on from."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    if platform.is_cuda:
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any], platform: Platform) -> None:
    """Go on from a state; that of a GPU is left out where there is none."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state and platform.is_cuda:
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def preserved_random_state(platform: Platform) -> Iterator[None]:
    """What its body draws or seeds leaves no trace in what comes after."""
    state = random_state(platform)
    try:
        yield
    finally:
        set_random_state(state, platform)
