"""Run ``megapoly evaluate``."""

import sys

# For some metrics the harness imports the package `evaluate`, which must not be this file.
sys.path.pop(0)

from megapoly.commands import run  # noqa: E402

if __name__ == "__main__":
    sys.exit(run("evaluate", sys.argv[1:]))
