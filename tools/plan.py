"""Run ``megapoly plan``."""

import sys

from megapoly.commands import run

if __name__ == "__main__":
    sys.exit(run("plan", sys.argv[1:]))
