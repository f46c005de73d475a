import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from megapoly.errors import UnavailableError
from megapoly.study.theory.equality import PolyReLU, relu_to_polyrelu


class EveryForm(nn.Module):
    """ReLU as a module that is called twice, as functions and as methods."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d, e, f = self.layers
        x = self.relu(b(self.relu(a(x))))
        x = x + functional.relu(input=c(x))
        x = torch.relu(d(x)).mul(2)
        x = e(x).relu() - f(x).relu_()
        return functional.relu(x, inplace=True)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_equals_bit_for_bit_on_the_whole_line(order: int) -> None:
    torch.manual_seed(0)
    network = EveryForm().double()
    twin = relu_to_polyrelu(network, order)
    x = 1e3 * torch.randn(64, 4, dtype=torch.float64)
    assert torch.equal(twin(x), network(x))
    assert network(x).count_nonzero() > 50
    assert not any(isinstance(module, nn.ReLU) for module in twin.modules())
    calls = [node for node in twin.graph.nodes if node.op != "call_module"]
    assert not any("relu" in str(node.target) for node in calls)


def test_size_grows_by_the_coefficients_alone() -> None:
    network = EveryForm()
    twin = relu_to_polyrelu(network, order=3)
    units = [module for module in twin.modules() if isinstance(module, PolyReLU)]
    assert len(units) == 6  # the module, called twice, and five calls
    before = sum(p.numel() for p in network.parameters())
    assert sum(p.numel() for p in twin.parameters()) == before + 6 * 4
    assert all(unit.coefficients.tolist() == [0, 1, 0, 0] for unit in units)
    assert all(unit.coefficients.requires_grad for unit in units)


def test_original_is_left_alone() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    for parameter in relu_to_polyrelu(network).parameters():
        parameter.data.zero_()
    assert isinstance(network[1], nn.ReLU)
    assert network[0].weight.count_nonzero() == 4


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) if x.sum() > 0 else x


def test_what_cannot_be_converted_is_said() -> None:
    with pytest.raises(UnavailableError, match="cannot trace this Branches"):
        relu_to_polyrelu(Branches())
    with pytest.raises(UnavailableError, match="This Sequential has no ReLU"):
        relu_to_polyrelu(nn.Sequential(nn.Linear(1, 1), nn.GELU()))
