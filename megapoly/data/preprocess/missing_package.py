"""The error for a missing package of the extra ``data``."""

from __future__ import annotations

from megapoly.errors import UnavailableError


def missing_package(purpose: str, package: str) -> UnavailableError:
    """Return the error that says what needs the package and how to install it."""
    return UnavailableError(f"{purpose} needs the package {package}: pip install 'megapoly[data]'.")
