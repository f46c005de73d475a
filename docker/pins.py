"""Print the pins of a constraints file whose packages are not installed.

    python docker/pins.py docker/constraints.txt

NVIDIA's image has its own builds of torch, Transformer Engine, flash-attn and their dependencies,
and keeps them by its own constraints file. If ours pinned another version of one, pip would find no
solution.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def pins_of_absent(lines: Iterable[str], installed: Iterable[str]) -> list[str]:
    """Return the pins of ``lines`` whose package is not in ``installed``."""
    present = {canonicalize_name(name) for name in installed}
    pins = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return [pin for pin in pins if canonicalize_name(Requirement(pin).name) not in present]


def main() -> None:
    """Print the pins of the file that the command line names."""
    installed = [distribution.metadata["Name"] for distribution in distributions()]
    print("\n".join(pins_of_absent(Path(sys.argv[1]).read_text().splitlines(), installed)))


if __name__ == "__main__":
    main()
