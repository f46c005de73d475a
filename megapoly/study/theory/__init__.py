"""The paper's theorems as networks that are evaluated and counted: docs/explanation/theory.md."""

from megapoly.study.theory.equality import relu_to_polyrelu
from megapoly.study.theory.imitation import imitate_network, unit_network
from megapoly.study.theory.network import Network, Size
from megapoly.study.theory.powers import power_network
from megapoly.study.theory.smooth import Wave, polyrelu_network, relu_network
from megapoly.study.theory.spline import spline_network

__all__ = [
    "Network",
    "Size",
    "Wave",
    "imitate_network",
    "polyrelu_network",
    "power_network",
    "relu_network",
    "relu_to_polyrelu",
    "spline_network",
    "unit_network",
]
