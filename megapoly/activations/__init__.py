"""FFN activations: the registry, and the module that fills the engine's activation slot."""

from megapoly.activations.registry import ACTIVATIONS, Activation, TensorParallelSum, get

__all__ = ["ACTIVATIONS", "Activation", "TensorParallelSum", "get"]
