"""What tests of kernels take from Triton's interpreter and from torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch


@pytest.fixture
def interpreter_rounds_like_a_gpu(monkeypatch):
    """Triton's own conversion to bf16 truncates, and is wrong for subnormal numbers."""
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(self, source, dtype):
        if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast(self, source, dtype)
        rounded = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.uint16)
        return interpreter.TensorHandle(rounded.numpy(), dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounding_cast)


@pytest.fixture
def fresh_memory_is_nan():
    """So that what a kernel forgot to write is not zero by chance."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.ones(1).new_empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
