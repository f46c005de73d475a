"""FP8 recipes: the devices that support them, and the multiples that sizes must be.

Source: ``transformer_engine/pytorch/quantization.py`` (``check_recipe_support``,
``get_align_size_for_quantization``), ``pytorch/utils.py`` (``assert_dim_for_fp8_exec``) and
``pytorch/tensor`` (``is_quantizable`` of each format) of Transformer Engine 2.11.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megapoly.config.schema import Config

FP8_OPTIONS = (
    "fp8",
    "fp8_recipe",
    "fp8_amax_history_len",
    "fp8_amax_compute_algo",
    "first_last_layers_bf16",
)


@dataclass(frozen=True)
class FP8Recipe:
    """Requirements of an FP8 recipe on the machine and on sizes.

    Args:
        capability: lowest compute capability that supports it.
        beyond: first compute capability above that does not; None: all above do.
        multiple: what every axis of a matrix product on each rank must be a multiple of.
        gathered_multiple: the same for the activations that tensor-parallel ranks gather in FP8,
            with sequence parallelism.
        cuda: oldest CUDA toolkit whose cuBLAS has it; None: any that this project's torch supports.
    """

    capability: tuple[int, int]
    beyond: tuple[int, int] | None = None
    multiple: int = 16
    gathered_multiple: int = 16
    cuda: tuple[int, int] | None = None

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Return whether a device of this compute capability supports it."""
        return self.capability <= capability and (self.beyond is None or capability < self.beyond)


FP8_RECIPES: dict[str, FP8Recipe] = {
    "delayed": FP8Recipe((8, 9)),
    "tensorwise": FP8Recipe((8, 9)),
    # The last block may be short, but what ranks gather must be whole blocks.
    "blockwise": FP8Recipe((9, 0), gathered_multiple=128, cuda=(12, 9)),
    "mxfp8": FP8Recipe((10, 0), beyond=(12, 0), multiple=32, gathered_multiple=32),
}


def sequence_multiple(config: Config) -> int:
    """Return what sequence lengths on every rank must be a multiple of for FP8; 1 without it."""
    training = config.training
    if training.fp8 is None:
        return 1
    recipe = FP8_RECIPES[training.fp8_recipe]
    return math.lcm(recipe.multiple, recipe.gathered_multiple)
