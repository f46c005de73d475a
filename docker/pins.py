"""Print the pins of constraints files whose packages are not installed.

    python docker/pins.py docker/constraints.txt [FILE ...]

A pin of a later file replaces that of an earlier one.

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
    """Return the pins of ``lines`` whose package is not in ``installed``, the last one of each."""
    present = {canonicalize_name(name) for name in installed}
    pins = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    by_name = {canonicalize_name(Requirement(pin).name): pin for pin in pins}
    return [pin for name, pin in by_name.items() if name not in present]


def main() -> None:
    """Print the pins of the files that the command line names."""
    installed = [distribution.metadata["Name"] for distribution in distributions()]
    lines = [line for path in sys.argv[1:] for line in Path(path).read_text().splitlines()]
    print("\n".join(pins_of_absent(lines, installed)))


if __name__ == "__main__":
    main()
