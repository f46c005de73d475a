"""Triton kernels of the operators; imported only where they run."""
