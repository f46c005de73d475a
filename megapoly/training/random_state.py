"""State of all random generators that training draws from, on one rank."""

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
    """Return the current state, for :func:`set_random_state`."""
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
    """Restore a state; a GPU's part of it has no effect without a GPU."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state and platform.is_cuda:
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def preserved_random_state(platform: Platform) -> Iterator[None]:
    """Restore the state at the end, whatever the body drew or seeded."""
    state = random_state(platform)
    try:
        yield
    finally:
        set_random_state(state, platform)
