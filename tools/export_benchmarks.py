"""Run ``megapoly export-benchmarks``."""

import sys

from megapoly.commands import run

if __name__ == "__main__":
    sys.exit(run("export-benchmarks", sys.argv[1:]))
