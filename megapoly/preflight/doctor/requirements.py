"""Packages by what they are for, with the releases that work; the same as in setup.py."""

from __future__ import annotations

PYTHON = ">=3.10"
REQUIRED = {
    "torch": ">=2.7,<2.14",
    "megatron-core": ">=0.16.1,<0.17",
    "jsonargparse": ">=4.40",
    "numpy": "",
    "psutil": "",
    "PyYAML": "",
    "rich": "",
    "setuptools": "",
    "tensorboard": "",
    "tokenizers": ">=0.20",
}
_HF = {"accelerate": "", "safetensors": "", "transformers": ">=4.57"}
# By extra: pip install '.[hf]'.
EXTRAS = {
    "hf": _HF,
    "eval": {"datasets": "", "lm-eval": ">=0.4.12"} | _HF,
    "data": {
        "gigatoken": ">=0.10",
        "matplotlib": "",
        "orjson": "",
        "pyarrow": "",
        "zstandard": "",
    },
}
EXTRA_USES = {
    "hf": "megapoly export, import and generate",
    "eval": "megapoly evaluate, benchmarks during training",
    "data": "megapoly preprocess",
}
GPU = {"transformer-engine": ">=2.9,<2.12", "flash-attn": "", "apex": "", "triton": ""}

KNOWN_COMBINATIONS = (
    "With megatron-core 0.16: torch 2.13.0, with which this project's tests pass on CPU (2.7 to "
    "2.13 can be installed); Transformer Engine 2.9 to 2.11, the releases that the engine's own "
    "package asks for, as in NVIDIA's PyTorch images 25.11 (2.9.0) to 26.01 (2.11.0, torch 2.10)."
)


def all_packages() -> tuple[str, ...]:
    """Every name once."""
    extras = [name for packages in EXTRAS.values() for name in packages]
    return tuple(dict.fromkeys([*REQUIRED, *GPU, *extras]))
