"""Convert a ReLU network of any architecture to an equal PolyReLU network: Theorem 1."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn
from torch.nn import functional

from megapoly.errors import UnavailableError
from megapoly.ops.modules import PolyReLU
from megapoly.polynomial import DEFAULT_ORDER

RELU_FUNCTIONS = (torch.relu, torch.relu_, functional.relu, functional.relu_)
RELU_METHODS = ("relu", "relu_")


def relu_to_polyrelu(network: nn.Module, order: int = DEFAULT_ORDER) -> fx.GraphModule:
    """Return the PolyReLU network that equals a ReLU network.

        ReLU(x) = PolyReLU(x) for a = (0, 1, 0, .., 0)

    Source: PolyCom (ICLR 2025), Lemma 1 and Theorem 1. Each ReLU of the graph, whether a module, a
    function or a method, becomes a PolyReLU; the rest of the network does not change. The outputs
    are equal bit for bit wherever every ReLU(x)^r is finite, not only on the theorem's [-1, 1]^d.

    Args:
        network: a module that torch.fx can trace: its control flow does not depend on values.
        order: r, 2 to 4.

    Returns:
        A copy with r + 1 additional coefficients for each ReLU (a module that is called twice
        counts once); depth, width and weights stay the same.

    Raises:
        UnavailableError: the network cannot be traced, or has no ReLU.
    """
    try:
        traced = fx.symbolic_trace(copy.deepcopy(network))
    except Exception as error:  # noqa: BLE001 -- tracing runs the code of the network
        raise UnavailableError(
            f"torch.fx cannot trace this {type(network).__name__} ({error}); its control flow must "
            "not depend on values of tensors."
        ) from error
    parameter = next(network.parameters(), None)
    dtype = torch.get_default_dtype() if parameter is None else parameter.dtype
    found = 0
    for name, module in list(traced.named_modules()):
        if isinstance(module, nn.ReLU):
            traced.set_submodule(name, _as_relu(order, dtype))
            found += 1
    for node in list(traced.graph.nodes):
        if _is_relu_call(node):
            name = f"polyrelu_{found}"
            traced.add_submodule(name, _as_relu(order, dtype))
            with traced.graph.inserting_after(node):
                call = traced.graph.call_module(
                    name, (node.args[0] if node.args else node.kwargs["input"],)
                )
            node.replace_all_uses_with(call)
            traced.graph.erase_node(node)
            found += 1
    if not found:
        raise UnavailableError(f"This {type(network).__name__} has no ReLU to replace.")
    traced.recompile()
    return traced


@torch.no_grad()
def _as_relu(order: int, dtype: torch.dtype) -> PolyReLU:
    unit = PolyReLU(order, backend="reference", dtype=dtype)
    unit.coefficients.copy_(torch.tensor([0.0, 1.0] + [0.0] * (order - 1)))
    return unit


def _is_relu_call(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in RELU_METHODS
    return node.op == "call_function" and node.target in RELU_FUNCTIONS
