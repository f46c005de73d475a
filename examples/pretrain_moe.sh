#!/usr/bin/env bash
# Pre-train a mixture-of-experts model. Both of these work, and take the same options:
#
#     torchrun --nproc-per-node 2 examples/pretrain_moe.sh [--config FILE.yaml] [--section.field value ...]
#     NPROC_PER_NODE=2 bash examples/pretrain_moe.sh [--config FILE.yaml] [--section.field value ...]
#
# The file is a shell script and a Python program at once. torchrun runs it with Python, to which the
# shell's lines are a string: ''':' opens one, and is `:`, the command that does nothing, to the shell.
''':'
PATH="$PATH:$(dirname "$0")/../.venv/bin"
exec megapoly-launch --standalone --nproc-per-node "${NPROC_PER_NODE:-2}" "$0" "$@"
'''
import sys

from megapoly.pretrain import main

if __name__ == "__main__":  # saving a checkpoint starts a process that imports this file again
    sys.exit(main(sys.argv[1:], default_recipe="moe_tiny", program="pretrain_moe.sh"))
