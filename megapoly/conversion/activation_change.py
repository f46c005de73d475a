"""Change the activation of an imported model; only the weights outside its FFNs are kept."""

from __future__ import annotations

import copy
import dataclasses

from megapoly.activations import registry
from megapoly.config import ModelConfig
from megapoly.conversion import tensor_map
from megapoly.errors import ConfigError
from megapoly.polynomial import DEFAULT_ORDER


@dataclasses.dataclass(frozen=True)
class ActivationChange:
    """Activation of the model to start.

    Args:
        name: its name in the registry.
        order: highest power, for a polynomial.
        ffn_hidden_size: width of the FFN or of each expert; None keeps the number of parameters.
        seed: seed of the initialised weights.
    """

    name: str
    order: int = DEFAULT_ORDER
    ffn_hidden_size: int | None = None
    seed: int = 1234


def change_activation(model: ModelConfig, activation: ActivationChange) -> ModelConfig:
    """Return the same model with another activation.

    Its FFN has the same number of parameters, apart from coefficients: 3/2 of the width if only the
    source is gated, 2/3 if only the result is.

    Raises:
        ConfigError: the activation is unknown, or the width is not a whole number.
    """
    changed = copy.deepcopy(model)
    changed.activation, changed.activation_order = activation.name, activation.order
    was, is_gated = registry.get(model.activation).gated, registry.get(activation.name).gated
    times, over = {(True, False): (3, 2), (False, True): (2, 3)}.get((was, is_gated), (1, 1))

    def scaled(width: int) -> int:
        if width * times % over:
            raise ConfigError(
                [
                    f"the FFN's width ({width}) times {times} / {over} must be a whole number, so "
                    f"that {activation.name} has the parameters of {model.activation}; choose "
                    "one with --ffn-hidden-size"
                ]
            )
        return width * times // over

    given = activation.ffn_hidden_size
    if model.num_moe_experts is None:
        changed.ffn_hidden_size = scaled(model.ffn_hidden_size) if given is None else given
        return changed
    assert model.moe_ffn_hidden_size is not None
    changed.moe_ffn_hidden_size = scaled(model.moe_ffn_hidden_size) if given is None else given
    shared = model.moe_shared_expert_intermediate_size
    changed.moe_shared_expert_intermediate_size = scaled(shared) if shared else None
    return changed


def names_outside_ffn(model: ModelConfig) -> set[str]:
    """Return the names of all tensors outside FFNs: attention, embeddings and norms."""
    return {each.name for each in tensor_map.tensor_mappings(model) if ".mlp." not in each.name}
