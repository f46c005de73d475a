"""Run ``megapoly import``."""

import sys

from megapoly.commands import run

if __name__ == "__main__":
    sys.exit(run("import", sys.argv[1:]))
