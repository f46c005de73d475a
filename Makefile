# make pretrain   train the tiny mixture-of-experts model, tensor and expert parallel, on 2 processes,
#                 and let it continue a text
# make paper      the paper in miniature: train activations at equal size, data and tokens, analyze the
#                 models, build the theorems; the result is runs/paper/report/index.html. TEXT=FOLDER
#                 uses these domains (a .jsonl each) instead of the built-in text
# make paper-full the same with three to five seeds and a grid of learning rates, in runs/paper_full
# make test       the CPU test suite
# make test-slow  checks that take minutes each: the wheel in an empty environment, two hosts, ...
# make test-parallel   every kind of parallel layout and their combinations, on up to 8 processes
# make test-cluster    Slurm itself and hosts that are lost, on network namespaces of this machine, and
#                 Prometheus's alerts; needs root and packages, on Debian:
#                 apt-get install slurm-wlm munge iproute2 util-linux prometheus
# make check      lint, format, types and import order of the code; Dockerfiles, shell scripts, the
#                 documentation
# make docs       the documentation, in runs/site
# make test-gpu   kernels, training and numerics on one GPU, then the kernels' speed; uses PYTHON as it
#                 is, whose torch must be for CUDA, and no .venv
# make dist       source distribution and wheel, in dist
#
# Every target but test-gpu sets up .venv first, with what it needs and nothing else. PYTHON chooses the
# interpreter, TORCH the torch to install: the default is PyPI's, which on Linux is for CUDA;
# TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" is the light way.
#
# .venv of `make pretrain` takes 1.3 GB with torch for CPU (a download of 0.19 GB), 5.1 GB with torch for
# CUDA (2.7 GB, most of it NVIDIA's packages); `make test` adds 2.0 GB.

PYTHON ?= python3
export TORCH ?= torch==2.13.0
export TEXT ?=
VENV := .venv
BIN := $(VENV)/bin
# What training and generating need; each other stamp is that and the extras of its rule, below.
INSTALLED := $(VENV)/.installed
INSTALLED_PAPER := $(VENV)/.installed-paper
INSTALLED_DOCS := $(VENV)/.installed-docs
INSTALLED_TEST := $(VENV)/.installed-test

DOCKERFILES := docker/Dockerfile docker/Dockerfile.cpu
SHELL_SCRIPTS := .ci/run docker/launch.sh $(wildcard examples/data/*.sh) examples/paper/paper.sh examples/slurm/pretrain.sbatch examples/slurm/node.sh
# Shell to the line with `exec`, Python after it.
SHELL_AND_PYTHON := examples/pretrain_dense.sh examples/pretrain_moe.sh

.PHONY: pretrain paper paper-full test test-slow test-parallel test-cluster test-gpu check lint docs dist format clean

pretrain: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/pretrain_moe.sh \
	    --parallel.tensor_model_parallel_size 2 --parallel.expert_model_parallel_size 2 \
	    --parallel.expert_tensor_parallel_size 1 --run_dir runs/moe_tiny
	$(BIN)/megapoly generate --model runs/moe_tiny

paper: $(INSTALLED_PAPER)
	PYTHON="$(CURDIR)/$(BIN)/python" examples/paper/paper.sh runs/paper one

paper-full: $(INSTALLED_PAPER)
	PYTHON="$(CURDIR)/$(BIN)/python" examples/paper/paper.sh runs/paper_full full

# Three files of tests at a time, also on two cores: jobs of several processes wait a lot. One thread
# for each process: more threads than cores wait for each other and keep the cores busy meanwhile.
# tests/conftest.py orders the files.
PYTEST_BY_FILES := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder
test test-slow test-cluster: export OMP_NUM_THREADS := 1

test: $(INSTALLED_TEST)
	$(PYTEST_BY_FILES) -n 3

test-slow: $(INSTALLED_TEST)
	$(PYTEST_BY_FILES) -n 2 -m slow

test-parallel: $(INSTALLED_TEST)
	$(BIN)/python -m pytest -m parallel

test-cluster: $(INSTALLED_TEST)
	$(BIN)/python -m pytest -m cluster --durations=0

# Not in .venv: torch there is a build for CPU unless TORCH says else, and a container brings its own,
# with other packages, whose warnings are not errors. Only GPU_REPORT is written.
GPU_REPORT ?= runs/benchmark_ops.json

test-gpu:
	$(PYTHON) tools/doctor.py
	$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu: $(PYTHON) sees no CUDA device")'
	$(PYTHON) -m pytest -m gpu -W default -p no:cacheprovider tests/gpu tests/ops
	mkdir -p $(dir $(GPU_REPORT))
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m megapoly benchmark operators --device cuda --operators polynorm polyrelu --json $(GPU_REPORT)

check: lint docs

# The hooks of .pre-commit-config.yaml are these commands.
lint: $(INSTALLED_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/mypy
	$(BIN)/hadolint $(DOCKERFILES)
	$(BIN)/shellcheck $(SHELL_SCRIPTS)
	for script in $(SHELL_AND_PYTHON); do sed '/^exec /q' $$script | $(BIN)/shellcheck - || exit 1; done

docs: $(INSTALLED_DOCS)
	$(BIN)/megapoly report examples/paper/report/report.json --notes examples/paper/notes.md --output docs/report
	$(BIN)/mkdocs build --strict

dist: $(INSTALLED_TEST)
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

format: $(INSTALLED_TEST)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The tests open exports in the oldest transformers that they are for, too.
TRANSFORMERS_4 := transformers==4.57.6 huggingface-hub==0.36.2 tokenizers==0.22.2

# The tests build and train layers of Transformer Engine by its Python code, which its wheel has
# without the compiled part.
TRANSFORMER_ENGINE := transformer-engine==2.11.0 einops==0.8.2

# torch first: a CPU build that is already chosen then satisfies what the others ask for.
$(INSTALLED): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[train,hf]'
	touch $@

$(INSTALLED_PAPER): $(INSTALLED)
	$(BIN)/pip install --quiet --editable '.[train,data,report]'
	touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	$(BIN)/pip install --quiet --editable '.[docs,report]'
	touch $@

$(INSTALLED_TEST): $(INSTALLED)
	$(BIN)/pip install --quiet --editable '.[test]'
	$(BIN)/pip install --quiet --no-deps --target $(VENV)/transformers-4 $(TRANSFORMERS_4)
	$(BIN)/pip install --quiet --no-deps --target $(VENV)/transformer-engine $(TRANSFORMER_ENGINE)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
