"""A model from a checkpoint, without optimizer and gradients."""

from __future__ import annotations

from pathlib import Path

from megapoly.config import Config
from megapoly.model.builder import build_chunks
from megapoly.platform.device import Platform
from megapoly.training.load_checkpoint import load_weights
from megapoly.training.state import ModelState, batch_layout


def load_model(config: Config, platform: Platform, path: Path) -> ModelState:
    """Build this rank's part of a model and load its weights; collective.

    Needs memory for the weights only: no gradient buffers, no optimizer state.

    Args:
        config: resolved; its layout may differ from the checkpoint's. The engine's process groups
            must exist.
        platform: the device of the model.
        path: an ``iter_*`` folder.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: the checkpoint is not complete, or of another model.
    """
    state = ModelState(config, platform, build_chunks(config, platform), batch_layout(config))
    for chunk in state.chunks:
        chunk.eval().requires_grad_(False)
    load_weights(state, path)
    return state
