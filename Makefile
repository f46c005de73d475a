# make pretrain   train the tiny mixture-of-experts model, tensor and expert parallel, 2 processes,
#                 and let it continue a text
# make paper      the paper in miniature: activations trained at equal size, data and tokens, models
#                 looked into, theorems built; runs/paper/report/index.html. TEXT=FOLDER: on these
#                 domains (a .jsonl each) instead of the built-in text
# make paper-full the same with three to five seeds and a grid of learning rates, in runs/paper_full
# make test       the CPU test suite
# make test-parallel   every kind of parallel layout and their combinations, at up to 8 processes
# make check      lint, format and type checks; Dockerfiles and shell scripts, too
# make test-gpu   kernels, training and numerics on one GPU, then the kernels' speed; with PYTHON as it
#                 is, whose torch is for CUDA, and no .venv
# Each other sets up .venv first. PYTHON chooses the interpreter, TORCH the torch to install.

PYTHON ?= python3
TORCH ?= torch==2.13.0
export TEXT ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

DOCKERFILES := docker/Dockerfile docker/Dockerfile.cpu
SHELL_SCRIPTS := .ci/run docker/launch.sh $(wildcard examples/data/*.sh) examples/paper/paper.sh examples/slurm/pretrain.sbatch
# Shell to the line with `exec`, Python after it.
SHELL_AND_PYTHON := examples/pretrain_dense.sh examples/pretrain_moe.sh

.PHONY: pretrain paper paper-full test test-parallel test-gpu check format clean

pretrain: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/pretrain_moe.sh \
	    --parallel.tensor_model_parallel_size 2 --parallel.expert_model_parallel_size 2 \
	    --parallel.expert_tensor_parallel_size 1 --run_dir runs/moe_tiny
	$(BIN)/python tools/generate.py --model runs/moe_tiny

paper: $(INSTALLED)
	PYTHON="$(CURDIR)/$(BIN)/python" examples/paper/paper.sh runs/paper one

paper-full: $(INSTALLED)
	PYTHON="$(CURDIR)/$(BIN)/python" examples/paper/paper.sh runs/paper_full full

# Two tests at a time, files whole: jobs of several processes wait a lot.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-parallel: $(INSTALLED)
	$(BIN)/python -m pytest -m parallel

# Not .venv's: torch there is a build for CPU unless TORCH says else, and a container brings its own,
# with other packages, whose warnings are not errors. Nothing is written but GPU_REPORT.
GPU_REPORT ?= runs/benchmark_ops.json

test-gpu:
	$(PYTHON) tools/doctor.py
	$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu: $(PYTHON) sees no CUDA device")'
	$(PYTHON) -m pytest -m gpu -W default -p no:cacheprovider tests/gpu tests/ops
	mkdir -p $(dir $(GPU_REPORT))
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) tools/benchmark_ops.py --device cuda --operators polynorm polyrelu --json $(GPU_REPORT)

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

# The tests build and train layers of Transformer Engine by its Python code, which its wheel has
# without the compiled part.
TRANSFORMER_ENGINE := transformer-engine==2.11.0 einops==0.8.2

# torch first: a CPU build that is already chosen then satisfies what the others ask for.
$(INSTALLED): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[test]'
	$(BIN)/pip install --quiet --no-deps --target $(VENV)/transformers-4 $(TRANSFORMERS_4)
	$(BIN)/pip install --quiet --no-deps --target $(VENV)/transformer-engine $(TRANSFORMER_ENGINE)
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
