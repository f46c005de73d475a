"""Configuration of a PolyCom language model, dense or mixture of experts."""

import transformers
from transformers import PretrainedConfig

# Names of two ways of splitting a linear layer, which depend on the release of transformers:
# outputs are computed in parts and gathered; inputs are complete and each rank uses its part.
_GATHER, _SPLIT = (
    ("colwise_rep", "rowwise_rep")
    if transformers.__version__.startswith("4.")
    else ("colwise_gather_output", "rowwise_split_input")
)

# Activations applied to a gate projection and multiplied by the up projection.
GATED = ("swiglu", "geglu", "gated_polynorm")


class MegapolyConfig(PretrainedConfig):
    """Configuration of a decoder with rotary positions, RMSNorm and learnable activations.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        intermediate_size: width of the FFN or of one expert, at its activation.
        num_hidden_layers: number of layers.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key/value heads; None: the number of query heads.
        head_dim: width of a head; None: ``hidden_size / num_attention_heads``.
        hidden_act: ``polynorm``, ``polyrelunorm``, ``gated_polynorm``, ``polyrelu``, ``polyprelu``,
            ``swiglu``, ``geglu``, ``gelu``, ``silu``, ``relu`` or ``squared_relu``.
        activation_order: highest power of a polynomial activation.
        activation_norm: norm that divides a power in the PolyNorm family: ``rms`` or ``l2``.
        activation_eps: added to the mean square (``l2``: to the sum of squares).
        activation_coefficients: ``shared`` by all experts of a layer, or ``per_expert``.
        rms_norm_eps: epsilon of every RMSNorm.
        qk_norm: RMSNorm on queries and keys: ``none``, over each ``head``, or over the ``full``
            projection.
        rope_theta: base of the rotary frequencies.
        max_position_embeddings: length of the sequences that the model was trained on.
        tie_word_embeddings: share one matrix between input and output embeddings.
        num_experts: number of experts per layer; None: a dense model.
        num_experts_per_tok: number of experts per token.
        norm_topk_prob: divide the probabilities of the chosen experts by their sum.
        shared_expert_intermediate_size: width of the expert that every token uses; None: none.
        output_router_logits: return router logits, and add the load-balancing loss to a loss; a
            dense model's configuration does not have it, nor the next.
        router_aux_loss_coef: weight of that loss.
        attention_dropout: dropout of attention probabilities in training.
        initializer_range: standard deviation of initial weights.
        use_cache: keep keys and values while generating.
        **kwargs: arguments of ``PretrainedConfig``.
    """

    model_type = "megapoly"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8256,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=None,
        head_dim=None,
        hidden_act="polynorm",
        activation_order=3,
        activation_norm="rms",
        activation_eps=1e-6,
        activation_coefficients="shared",
        rms_norm_eps=1e-5,
        qk_norm="none",
        rope_theta=10000.0,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        num_experts=None,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        shared_expert_intermediate_size=None,
        output_router_logits=False,
        router_aux_loss_coef=0.01,
        attention_dropout=0.0,
        initializer_range=0.02,
        use_cache=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.activation_order = activation_order
        self.activation_norm = activation_norm
        self.activation_eps = activation_eps
        self.activation_coefficients = activation_coefficients
        self.rms_norm_eps = rms_norm_eps
        self.qk_norm = qk_norm
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        if num_experts is not None:  # by these, trainers tell a mixture from a dense model
            self.output_router_logits = output_router_logits
            self.router_aux_loss_coef = router_aux_loss_coef
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.base_model_tp_plan = tensor_parallel_plan(self)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def to_dict(self):
        """Leave out the plan, which follows from other fields and the release of transformers."""
        return {k: v for k, v in super().to_dict().items() if k != "base_model_tp_plan"}


def tensor_parallel_plan(config):
    """Return how ``tp_plan="auto"`` splits the model so that results are those of one rank.

    A norm needs the whole row: PolyNorm, or an RMSNorm over all heads, would be another function
    over a rank's own columns. So FFN projections are gathered before the activation, and with
    ``qk_norm="full"`` attention projections are gathered before the norm.
    """
    columns, rows = (_GATHER, _SPLIT) if config.qk_norm == "full" else ("colwise", "rowwise")
    plan = {f"layers.*.self_attn.{name}_proj": columns for name in "qkv"}
    plan["layers.*.self_attn.o_proj"] = rows
    ffns = ["mlp.experts.*"] if config.num_experts else ["mlp"]
    if config.shared_expert_intermediate_size:
        ffns.append("mlp.shared_expert")
    for ffn in ffns:
        if config.hidden_act in GATED:
            plan[f"layers.*.{ffn}.gate_proj"] = _GATHER
        plan[f"layers.*.{ffn}.up_proj"] = _GATHER
        plan[f"layers.*.{ffn}.down_proj"] = _SPLIT
    return plan


OUTPUT_TENSOR_PARALLEL_PLAN = {"lm_head": _GATHER}
