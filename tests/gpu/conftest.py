"""Settings of all tests on a GPU."""

import os

import pytest

# Failed assertions of the shared checks show the values.
pytest.register_assert_rewrite("gpu_jobs")

# NVIDIA's images let fp32 be multiplied in TF32, which is 2^-11 off. Read when torch and cuBLAS are
# first used, here or by the processes of a job.
os.environ["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "0"
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
