"""Run ``megapoly preprocess``."""

import sys

from megapoly.commands import run

if __name__ == "__main__":
    sys.exit(run("preprocess", sys.argv[1:]))
