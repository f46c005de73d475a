"""Run ``megapoly benchmark preprocess``."""

import sys

from megapoly.commands import run

if __name__ == "__main__":
    sys.exit(run("benchmark", ["preprocess", *sys.argv[1:]]))
