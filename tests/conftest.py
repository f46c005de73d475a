"""Triton's interpreter runs the kernels where there is no GPU; Ctrl-C reaches what tests start."""

import os
import signal

import torch

# Triton looks at it when it is imported, and Megatron-Core imports it: before any test module.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell starts background jobs with it ignored, which all their children would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
