"""PolyCom operators and modules, which need torch alone.

==================================  ===========================================================
modules.py                          PolyNorm and PolyReLU as ``torch.nn.Module``
polynorm.py, polyrelu.py            the public functions: arguments, checks
polynorm_reference.py, ..           what every backend computes, in plain PyTorch
polynorm_registration.py, ..        ``torch.ops.megapoly``: forward, backward, collectives
triton/polynorm_launch.py, ..       the functions of the reference, by Triton kernels
triton/kernels/                     device code: polynorm_whole_row, polynorm_split_row,
                                    polyrelu_row and what they share
triton/tile_sizes.py                blocks and warps of a row
triton/ahead_of_time.py             compiles the kernels without a GPU and reports registers
arguments.py                        checks, rows, coefficients of a row's expert
backends.py                         which backend runs
collectives.py                      sums over the ranks that share a row
recomputation.py                    keeps row statistics when activations are recomputed
library.py                          registration with ``torch.library``
==================================  ===========================================================
"""

from megapoly.ops.arguments import expert_offsets
from megapoly.ops.modules import PolyNorm, PolyReLU
from megapoly.ops.polynorm import polynorm
from megapoly.ops.polyrelu import polyrelu
from megapoly.ops.recomputation import save_row_statistics

__all__ = [
    "PolyNorm",
    "PolyReLU",
    "expert_offsets",
    "polynorm",
    "polyrelu",
    "save_row_statistics",
]
