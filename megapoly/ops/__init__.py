"""The PolyCom operators; they need torch alone."""

from megapoly.ops.polynorm import polynorm
from megapoly.ops.polyrelu import polyrelu

__all__ = ["polynorm", "polyrelu"]
