"""Run ``megapoly benchmark training``."""

import sys

from megapoly.commands import run

if __name__ == "__main__":
    sys.exit(run("benchmark", ["training", *sys.argv[1:]]))
