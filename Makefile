# make pretrain   train the tiny mixture-of-experts model, tensor and expert parallel, 2 processes,
#                 and let it continue a text
# make test       the CPU test suite
# make test-parallel   every kind of parallel layout and their combinations, at up to 8 processes
# make check      lint, format and type checks; Dockerfiles and shell scripts, too
# Each sets up .venv first. PYTHON chooses the interpreter, TORCH the torch to install.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

DOCKERFILES := docker/Dockerfile docker/Dockerfile.cpu
SHELL_SCRIPTS := .ci/run docker/launch.sh examples/data/olmoe_mix_0924.sh examples/data/redpajama_1t.sh examples/data/tokenize_domains.sh examples/slurm/pretrain.sbatch
# Shell to the line with `exec`, Python after it.
SHELL_AND_PYTHON := examples/pretrain_dense.sh examples/pretrain_moe.sh

.PHONY: pretrain test test-parallel check format clean

pretrain: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/pretrain_moe.sh \
	    --parallel.tensor_model_parallel_size 2 --parallel.expert_model_parallel_size 2 \
	    --parallel.expert_tensor_parallel_size 1 --run_dir runs/moe_tiny
	$(BIN)/python tools/generate.py --model runs/moe_tiny

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-parallel: $(INSTALLED)
	$(BIN)/python -m pytest -m parallel

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint $(DOCKERFILES)
	$(BIN)/shellcheck $(SHELL_SCRIPTS)
	for script in $(SHELL_AND_PYTHON); do sed '/^exec /q' $$script | $(BIN)/shellcheck - || exit 1; done

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The tests open exports in the oldest transformers that they are for, too.
TRANSFORMERS_4 := transformers==4.57.6 huggingface-hub==0.36.2 tokenizers==0.22.2

# torch first: a CPU build that is already chosen then satisfies what the others ask for.
$(INSTALLED): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[test]'
	$(BIN)/pip install --quiet --no-deps --target $(VENV)/transformers-4 $(TRANSFORMERS_4)
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
