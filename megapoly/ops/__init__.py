"""The PolyCom operators; they need torch alone."""

from megapoly.ops.polynorm import polynorm
from megapoly.ops.polyrelu import polyrelu
from megapoly.ops.recomputation import save_row_statistics

__all__ = ["polynorm", "polyrelu", "save_row_statistics"]
