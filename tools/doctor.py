"""Run ``megapoly doctor`` of this checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout's, from any folder

from megapoly.commands import run  # noqa: E402

if __name__ == "__main__":
    sys.exit(run("doctor", sys.argv[1:]))
