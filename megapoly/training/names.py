"""Names of parameters and modules in the whole model, from a rank's part of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from megapoly.model.builder import unwrap

_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+")


def named_parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of this rank; layers have their numbers in the whole model, from 0."""
    for chunk in chunks:
        for name, parameter in unwrap(chunk).named_parameters():
            yield in_whole_model(chunk, name), parameter


def pipeline_stage(chunk: int) -> int:
    """Return the place of a chunk of this rank among all chunks, in the order of the layers."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    return chunk * stages + parallel_state.get_pipeline_model_parallel_rank()


def in_whole_model(chunk: torch.nn.Module, name: str) -> str:
    """Return the name of a module or parameter of a chunk with the layer's number in the model.

    Args:
        chunk: has the module.
        name: within the chunk's GPT model.
    """
    layers = unwrap(chunk).decoder.layers
    return _LAYER.sub(lambda match: str(layers[int(match[0])].layer_number - 1), name)
