"""Run ``megapoly analyze``."""

import sys

from megapoly.commands import run

if __name__ == "__main__":
    sys.exit(run("analyze", sys.argv[1:]))
