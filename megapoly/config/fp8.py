"""FP8 recipes: which devices have them, and by what sizes must divide.

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
class Recipe:
    """What a recipe asks of the machine and of the sizes.

    Args:
        capability: lowest compute capability that has it.
        beyond: first compute capability above that does not have it; None: all above do.
        multiple: by what every axis of a matrix product divides on each rank.
        gathered_multiple: the same for the activations that tensor-parallel ranks gather in FP8,
            with sequence parallelism.
        cuda: oldest CUDA toolkit whose cuBLAS has it; None: any that this project's torch takes.
    """

    capability: tuple[int, int]
    beyond: tuple[int, int] | None = None
    multiple: int = 16
    gathered_multiple: int = 16
    cuda: tuple[int, int] | None = None

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a device has it."""
        return self.capability <= capability and (self.beyond is None or capability < self.beyond)


RECIPES: dict[str, Recipe] = {
    "delayed": Recipe((8, 9)),
    "tensorwise": Recipe((8, 9)),
    # Blocks may end early, but what ranks gather must be whole blocks.
    "blockwise": Recipe((9, 0), gathered_multiple=128, cuda=(12, 9)),
    "mxfp8": Recipe((10, 0), beyond=(12, 0), multiple=32, gathered_multiple=32),
}


def sequence_multiple(config: Config) -> int:
    """By what the length of a sequence divides on every rank so that FP8 can multiply it; or 1."""
    training = config.training
    if training.fp8 is None:
        return 1
    recipe = RECIPES[training.fp8_recipe]
    return math.lcm(recipe.multiple, recipe.gathered_multiple)
