"""Run ``megapoly export``."""

import sys

from megapoly.commands import run

if __name__ == "__main__":
    sys.exit(run("export", sys.argv[1:]))
