"""Run ``megapoly check-parallel``."""

import sys

from megapoly.commands import run

if __name__ == "__main__":
    sys.exit(run("check-parallel", sys.argv[1:]))
