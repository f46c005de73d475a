"""``megapoly evaluate``, by the path of this file."""

import sys

# The harness imports a package of this file's name, `evaluate`, for some metrics.
sys.path.pop(0)

from megapoly.commands import run  # noqa: E402

if __name__ == "__main__":
    sys.exit(run("evaluate", sys.argv[1:]))
