"""Run ``megapoly prepare-domains``."""

import sys

from megapoly.commands import run

if __name__ == "__main__":
    sys.exit(run("prepare-domains", sys.argv[1:]))
