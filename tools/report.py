"""Run ``megapoly report``."""

import sys

from megapoly.commands import run

if __name__ == "__main__":
    sys.exit(run("report", sys.argv[1:]))
