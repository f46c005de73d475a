"""A user's file, as test_public_api.py gives it to mypy: types are known, mistakes are errors."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from typing_extensions import assert_type

from megapoly import Config, PolyNorm, PolyReLU, load_recipe
from megapoly.ops import expert_offsets, polynorm, polyrelu

x = torch.randn(4, 8)
assert_type(PolyNorm(3, gated=True)(x), Tensor)
assert_type(PolyReLU(slope=0.25)(x), Tensor)
assert_type(PolyNorm(num_experts=2).coefficients, Parameter)
assert_type(polynorm(x, x[0, :4]), Tensor)
assert_type(polyrelu(x, x[0, :4]), Tensor)
assert_type(expert_offsets(x), Tensor)
assert_type(load_recipe("moe_tiny"), Config)
assert_type(Config().model.hidden_size, int)
assert_type(Config().model.activation_norm, Literal["rms", "l2"])

PolyNorm("3")  # error: arg-type
PolyNorm(3, norm="max")  # error: arg-type
PolyNorm(3)(x, offset=x)  # error: call-arg
PolyReLU(eps=1e-6)  # error: call-arg
polynorm(x)  # error: call-arg
polyrelu(x, x, backend="fast")  # error: arg-type
load_recipe(3)  # error: arg-type
print(Config().model.hidden_sizes)  # error: attr-defined
