"""Run ``megapoly compare``."""

import sys

from megapoly.commands import run

if __name__ == "__main__":
    sys.exit(run("compare", sys.argv[1:]))
