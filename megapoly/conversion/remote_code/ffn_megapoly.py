"""The FFN of a PolyCom language model: learnable activations, dense and sparse FFNs.

    PolyReLU(x) = a0 + a1 relu(x) + .. + ar relu(x)^r
    PolyNorm(x) = a0 + a1 n(x) + .. + ar n(x^r),   n(u) = u / sqrt(mean(u^2) + eps)

(PolyCom, https://arxiv.org/abs/2411.03884). Coefficients are stored highest power first, as
``act_fn.weight`` [r], and a0 as ``act_fn.bias`` [1].

vLLM opens this code too, and replaces what it takes for its own layers. The notes that begin with
"vLLM" say what keeps it from replacing a layer by another function.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from .configuration_megapoly import GATED

POINTWISE = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
}
NORMALIZED = ("polynorm", "polyrelunorm", "gated_polynorm")


class MegapolyActivation(nn.Module):
    """The learnable activation; ``weight`` is [a_r, .., a_1] and ``bias`` [a_0].

    Args:
        config: configuration of the model.
        width: number of columns of a row.
    """

    def __init__(self, config, width):
        super().__init__()
        self.name, self.order, self.width = config.hidden_act, config.activation_order, width
        self.norm, self.eps = config.activation_norm, config.activation_eps
        self.weight = nn.Parameter(torch.full((self.order,), 1.0 / self.order))
        self.bias = nn.Parameter(torch.zeros(1))
        if self.name == "polyprelu":
            self.slope = nn.Parameter(torch.full((1,), 0.25))

    def forward(self, x):
        """Apply the activation to [.., width]; computed in fp32.

        Raises:
            ValueError: an activation that normalizes got part of a row.
        """
        if self.name in NORMALIZED and x.shape[-1] != self.width:
            raise ValueError(
                f"{self.name} normalizes whole rows of {self.width} columns; it got "
                f"{x.shape[-1]}. Tensor parallelism must gather the columns before it, as the "
                "plan of this model's configuration does (`base_model_tp_plan`)."
            )
        wide, coefficients = x.float(), self.weight.float().flip(0)
        if self.name in ("polyrelu", "polyrelunorm"):
            wide = F.relu(wide)
        if self.name == "polyprelu":
            wide = F.prelu(wide, self.slope.float())
        powers = self._normalized_powers if self.name in NORMALIZED else self._powers
        y = self.bias.float().expand_as(wide)
        for coefficient, power in zip(coefficients, powers(wide), strict=True):
            y = y + coefficient * power
        return y.to(x.dtype)

    def _powers(self, x):
        """Yield x, x^2, .., x^r."""
        return (x**k for k in range(1, self.order + 1))

    def _normalized_powers(self, x):
        """Yield n(x), .., n(x^r), computed from z = x / m because x^2r could overflow."""
        scale = x.detach().abs().amax(-1, keepdim=True).clamp_min(1.0)
        z = x / scale
        for k in range(1, self.order + 1):
            squares = z ** (2 * k)
            if self.norm == "rms":
                moment = squares.mean(-1, keepdim=True)
            else:
                moment = squares.sum(-1, keepdim=True)
            yield z**k * torch.rsqrt(moment + self.eps / scale ** (2 * k))


class MegapolyMLP(nn.Module):
    """down(f(up x)), or down(f(gate x) * up x) with a gated activation f."""

    def __init__(self, config, intermediate_size, has_coefficients=True):
        super().__init__()
        hidden_size = config.hidden_size
        self.hidden_act = config.hidden_act
        if self.hidden_act in GATED:
            self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        if self.hidden_act not in POINTWISE and has_coefficients:
            self.act_fn = MegapolyActivation(config, intermediate_size)

    def forward(self, x):
        """Apply the FFN to [.., h]."""
        return feed_forward(self, POINTWISE.get(self.hidden_act) or self.act_fn, x)


def feed_forward(mlp, act_fn, x, probs=None):
    """Apply a dense FFN or an expert: [.., h] -> [.., h].

    vLLM merges projections that a module's ``forward`` calls by name, and leaves each rank its own
    columns, which the activation must not have. It does not look into this function.

    Args:
        mlp: module with the linear layers.
        act_fn: activation, which the experts of a layer may share.
        x: [.., h].
        probs: [..] router probabilities, multiplied in after the activation; where zero, so is the
            output.
    """
    up = mlp.up_proj(x)
    y = act_fn(mlp.gate_proj(x)) * up if mlp.hidden_act in GATED else act_fn(up)
    if probs is not None:
        probs = probs[..., None]
        y = torch.where(probs > 0, y * probs, 0.0).to(y.dtype)
    return mlp.down_proj(y)


class MegapolyRouter(nn.Module):
    """Router: logits of all experts, in fp32. vLLM would compute an ``nn.Linear`` in bf16."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x):
        """Return the logits [tokens, experts] in fp32 for [tokens, h]."""
        return F.linear(x.float(), self.weight.float())


class MegapolyExperts(nn.Module):
    """Experts of a layer, by number.

    vLLM replaces an ``nn.ModuleList`` called ``experts`` by its fused experts, whose activation is
    SiLU.
    """

    def __init__(self, experts):
        super().__init__()
        for i, expert in enumerate(experts):
            self.add_module(str(i), expert)


class MegapolySparseMLP(nn.Module):
    """Experts of a layer; a token's output is the sum of its experts', weighted by probability."""

    def __init__(self, config):
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = MegapolyRouter(config)
        per_expert = config.activation_coefficients == "per_expert"
        width = config.intermediate_size
        self.experts = MegapolyExperts(
            MegapolyMLP(config, width, has_coefficients=per_expert)
            for _ in range(config.num_experts)
        )
        self.hidden_act, self.per_expert = config.hidden_act, per_expert
        if config.hidden_act not in POINTWISE and not per_expert:
            self.act_fn = MegapolyActivation(config, width)
        self.shared_expert = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = MegapolyMLP(config, config.shared_expert_intermediate_size)

    def forward(self, hidden_states):
        """Return output [b, s, h] and router logits [b s, experts] for [b, s, h]."""
        x = hidden_states.flatten(0, -2)
        router_logits = self.gate(x)
        probs, chosen = router_logits.softmax(-1).topk(self.top_k, dim=-1)  # [tokens, k]
        if self.norm_topk_prob:
            probs = probs / probs.sum(-1, keepdim=True)
        output = torch.zeros_like(x)
        if _needs_static_shapes():
            shares = torch.zeros_like(router_logits).scatter(1, chosen, probs)
            for expert, share in zip(self.experts.children(), shares.unbind(1), strict=True):
                output = output + self._expert_output(expert, x, share).to(output.dtype)
        else:
            for i in chosen.unique().tolist():
                token, place = torch.where(chosen == i)
                expert = self.experts.get_submodule(str(i))
                y = self._expert_output(expert, x[token], probs[token, place])
                output = output.index_add(0, token, y.to(output.dtype))
        if self.shared_expert is not None:
            output = output + self.shared_expert(x)
        return output.view_as(hidden_states), router_logits

    def _expert_output(self, expert, x, probs):
        """Return the output [tokens, h] of an expert for [tokens, h], times ``probs`` [tokens]."""
        owner = expert if self.per_expert else self
        return feed_forward(expert, POINTWISE.get(self.hidden_act) or owner.act_fn, x, probs)


def _needs_static_shapes():
    """Check whether a graph is recorded, in which every expert then computes every token.

    Which tokens an expert computes is data. Where gradients are needed, torch.compile breaks the
    graph at the experts instead: their activations would take the memory of all experts.
    """
    if torch.jit.is_tracing() or getattr(torch.compiler, "is_exporting", bool)():
        return True
    return torch.compiler.is_compiling() and not torch.is_grad_enabled()
