"""``python -m megapoly``, the same as ``megapoly``."""

import sys

from megapoly.commands import main

if __name__ == "__main__":  # saving a checkpoint starts a process that imports this file again
    sys.exit(main())
