"""Where there is no GPU, Triton's interpreter runs the kernels."""

import os

import torch

# Triton looks at it when it is imported, and Megatron-Core imports it: before any test module.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
