"""FFN activations by name; :mod:`megapoly.model.ffn_activation` puts one into the engine's slot."""

from megapoly.activations.registry import (
    ACTIVATIONS,
    Activation,
    ActivationInputs,
    TensorParallelSum,
    get,
)

__all__ = ["ACTIVATIONS", "Activation", "ActivationInputs", "TensorParallelSum", "get"]
