"""Run ``megapoly generate``."""

import sys

from megapoly.commands import run

if __name__ == "__main__":
    sys.exit(run("generate", sys.argv[1:]))
