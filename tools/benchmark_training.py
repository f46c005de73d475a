"""``megapoly benchmark training``, by the path of this file."""

import sys

from megapoly.commands import run

if __name__ == "__main__":
    sys.exit(run("benchmark", ["training", *sys.argv[1:]]))
