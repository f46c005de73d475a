"""Run ``megapoly benchmark operators``."""

import sys

from megapoly.commands import run

if __name__ == "__main__":
    sys.exit(run("benchmark", ["operators", *sys.argv[1:]]))
