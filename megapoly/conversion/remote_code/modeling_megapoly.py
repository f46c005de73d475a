"""A PolyCom language model for Hugging Face transformers; needs only torch and transformers.

Pre-norm decoder with rotary positions, dense or a mixture of experts; ``ffn_megapoly.py`` has its
FFNs. vLLM opens this code too, as its "Transformers backend".
"""

import inspect

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_megapoly import OUTPUT_TENSOR_PARALLEL_PLAN, MegapolyConfig
from .ffn_megapoly import MegapolyActivation, MegapolyMLP, MegapolyRouter, MegapolySparseMLP

# Releases of transformers differ in these.
_MASK_ARGUMENTS = tuple(inspect.signature(create_causal_mask).parameters)
_UPDATE_ARGUMENTS = tuple(inspect.signature(Cache.update).parameters)
# From 5.24 on, arguments and outputs are called `cache`, also that of continuous batching. Before,
# only the latter was, and its attention function updates it.
_CACHE = "cache" if "cache" in _MASK_ARGUMENTS else "past_key_values"


class MegapolyRMSNorm(nn.Module):
    """w x / sqrt(mean(x^2) + eps) over the last dimension."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        """Normalize [.., size]; the mean is computed in fp32."""
        wide = x.float()
        normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normalized.to(x.dtype)


class MegapolyRotaryEmbedding(nn.Module):
    """Cosine and sine of position times frequency, for pairs (j, j + d / 2) of a head."""

    def __init__(self, config):
        super().__init__()
        self.register_buffer("inv_freq", rotary_frequencies(config), persistent=False)

    @torch.no_grad()
    def forward(self, x, position_ids):
        """Return cos and sin [b, 1, s, d] of positions [b, s], in the dtype of ``x``."""
        angles = position_ids[:, None, :, None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotary_frequencies(config, device=None):
    """Return theta^(-2 j / d) for j = 0 .. d / 2 - 1, in fp32."""
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device)
    return 1.0 / config.rope_theta ** (steps / config.head_dim)


def rotate(x, cos, sin):
    """Rotate the pairs of [b, heads, s, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs
):
    """Return softmax(q k^T scaling + mask) v as [b, s, heads, d], and the probabilities."""
    key, value = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probs = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probs = F.dropout(probs, p=dropout, training=module.training)
    return (probs @ value).transpose(1, 2).contiguous(), probs


class MegapolyAttention(nn.Module):
    """Causal self-attention with grouped queries, rotary positions and optional QK-norm."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.qk_norm = config.head_dim, config.qk_norm
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        query_size = config.num_attention_heads * self.head_dim
        key_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        if self.qk_norm != "none":
            sizes = (query_size, key_size) if self.qk_norm == "full" else (self.head_dim,) * 2
            self.q_norm, self.k_norm = (MegapolyRMSNorm(n, config.rms_norm_eps) for n in sizes)
        self.join_heads = MegapolyJoinHeads()

    def forward(
        self,
        hidden_states,
        position_embeddings,
        attention_mask=None,
        past_key_values=None,
        **kwargs,
    ):
        """Return output [b, s, h] and attention probabilities, None if not computed."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
        if self.qk_norm == "full":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.view(shape), key.view(shape)
        if self.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        value = self.v_proj(hidden_states).view(shape)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # [b, heads, s, d]
        cos, sin = position_embeddings
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if past_key_values is not None:
            key, value = update_cache(past_key_values, key, value, self.layer_idx, kwargs)
        # vLLM takes over the projections of a module whose attention function it finds here.
        implementation = self.config._attn_implementation
        if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get(implementation, eager_attention_forward)
        output, probs = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(self.join_heads(output, query)), probs


def update_cache(cache, key, value, layer_idx, kwargs):
    """Add keys and values to a cache; return all that it has for this layer.

    Args:
        cache: cache of transformers.
        key: [b, heads, s, d].
        value: [b, heads, s, d].
        layer_idx: number of the layer.
        kwargs: arguments of the attention function, which a paged cache reads and changes.
    """
    arguments = {}
    if _CACHE == "cache":
        arguments["kwargs"] = kwargs
    elif "cache_kwargs" in _UPDATE_ARGUMENTS:
        arguments["cache_kwargs"] = {"cache_position": kwargs["cache_position"]}
    return cache.update(key, value, layer_idx, **arguments)


class MegapolyJoinHeads(nn.Module):
    """Concatenate the heads of an attention function's output.

    A module, which vLLM does not trace, because it compares sizes.
    """

    def forward(self, output, query):
        """Return [b, s, heads d] of an output [b, s, heads, d] or, in vLLM, [b s, heads d].

        Args:
            output: output of the attention function.
            query: [b, heads, s, d], its queries.

        Raises:
            ValueError: the attention function computed other heads than those of the queries.
        """
        batch, heads, length, head_dim = query.shape
        if output.numel() != query.numel():
            raise ValueError(
                f"attention got queries of {heads} heads of {head_dim} columns and {batch} x "
                f"{length} positions, and returned {tuple(output.shape)}. Tensor parallelism must "
                "give the attention function as many heads as the projections have on a rank."
            )
        return output.reshape(batch, length, heads * head_dim)


class MegapolyDecoderLayer(GradientCheckpointingLayer):
    """Attention and FFN, each on a normalized input and added to the residual stream."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_layernorm = MegapolyRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MegapolyAttention(config, layer_idx)
        self.post_attention_layernorm = MegapolyRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_sparse = config.num_experts is not None
        if self.is_sparse:
            self.mlp = MegapolySparseMLP(config)
        else:
            self.mlp = MegapolyMLP(config, config.intermediate_size)

    def __call__(self, *args, **kwargs):
        """Checkpoint only if there are gradients; before 5.24, a layer would lose its cache."""
        if torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        return nn.Module.__call__(self, *args, **kwargs)

    def forward(self, hidden_states, **kwargs):
        """Return output [b, s, h], attention probabilities, router logits (None if dense)."""
        attended, probs = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        output, router_logits = self.mlp(self.post_attention_layernorm(hidden_states)), None
        if self.is_sparse:
            output, router_logits = output
        return hidden_states + output, probs, router_logits


class MegapolyPreTrainedModel(PreTrainedModel):
    """Base class with the properties that transformers reads."""

    config_class = MegapolyConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MegapolyDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        """Draw matrices from a normal distribution; set norms, coefficients and frequencies."""
        config = self.config
        if isinstance(module, nn.Linear | nn.Embedding | MegapolyRouter):
            nn.init.normal_(module.weight, std=config.initializer_range)
        elif isinstance(module, MegapolyRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, MegapolyActivation):
            nn.init.constant_(module.weight, 1.0 / config.activation_order)
            nn.init.zeros_(module.bias)
            if config.hidden_act == "polyprelu":
                nn.init.constant_(module.slope, 0.25)
        elif isinstance(module, MegapolyRotaryEmbedding):
            # Not in a checkpoint; models are constructed without memory and filled from one.
            module.inv_freq.copy_(rotary_frequencies(config, module.inv_freq.device))


class MegapolyModel(MegapolyPreTrainedModel):
    """Decoder from token ids to the hidden states after the last norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            MegapolyDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = MegapolyRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MegapolyRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        cache=None,
        **kwargs,
    ):
        """Return hidden states; arguments as for transformers' decoders."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either `input_ids` or `inputs_embeds`")
        config = self.config
        if _CACHE == "cache":
            past_key_values = past_key_values if cache is None else cache
        elif cache is not None:
            kwargs["cache"] = cache
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        if "cache_position" in _MASK_ARGUMENTS and kwargs.get("cache_position") is None:
            kwargs["cache_position"] = next_positions(hidden_states, past_key_values)
        if position_ids is None:
            position_ids = next_positions(hidden_states, past_key_values)[None]
        mask = _causal_mask(
            config=config,
            input_embeds=hidden_states,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            cache_position=kwargs.get("cache_position"),
            past_key_values=past_key_values,
            cache=past_key_values,
            position_ids=position_ids,
        )
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions and config._attn_implementation != "eager":
            raise ValueError(
                "attention probabilities need `attn_implementation='eager'`; it is "
                f"{config._attn_implementation}"
            )
        arguments = {
            "position_embeddings": self.rotary_emb(hidden_states, position_ids),
            "attention_mask": mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
            **kwargs,
        }
        states, attentions, router_logits = [], [], []
        for layer in self.layers:
            states.append(hidden_states)
            hidden_states, probs, logits = layer(hidden_states, **arguments)
            attentions.append(probs)
            router_logits.append(logits)
        hidden_states = self.norm(hidden_states)
        return MoeModelOutputWithPast(
            last_hidden_state=hidden_states,
            **{_CACHE: past_key_values if use_cache else None},
            hidden_states=(*states, hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            router_logits=tuple(router_logits) if config.num_experts else None,
        )


def next_positions(hidden_states, cache):
    """Return the positions [s] of hidden states [b, s, h] that follow those in a cache."""
    seen = 0 if cache is None else cache.get_seq_length()
    return torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen


def _causal_mask(**arguments):
    """Make transformers' causal mask; its arguments differ between releases."""
    return create_causal_mask(**{k: v for k, v in arguments.items() if k in _MASK_ARGUMENTS})


class MegapolyForCausalLM(MegapolyPreTrainedModel, GenerationMixin):
    """Language model: logits of the next token, and the loss of labels."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = OUTPUT_TENSOR_PARALLEL_PLAN

    def __init__(self, config):
        super().__init__(config)
        self.model = MegapolyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        """Return the input embedding [vocab, h]."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        """Replace the input embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        """Return the output layer [vocab, h]."""
        return self.lm_head

    def set_output_embeddings(self, value):
        """Replace the output layer."""
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        output_router_logits=None,
        cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Return logits [b, s, vocab] of the next token.

        Args:
            input_ids: [b, s].
            attention_mask: [b, s], 0 at padding.
            position_ids: [b, s] or [1, s]; None: counted from the end of the cache.
            past_key_values: cache of keys and values; ``cache`` in transformers 5.24 and later.
            inputs_embeds: [b, s, h] instead of ``input_ids``.
            labels: [b, s], shifted here; -100 is ignored.
            use_cache: overrides the configuration's.
            output_attentions: return attention probabilities (``eager`` attention only).
            output_hidden_states: return the residual stream before every layer, and the last.
            output_router_logits: return router logits; with labels, add the load-balancing loss.
                Overrides the configuration's.
            cache: see ``past_key_values``. Before 5.24 the cache of continuous batching.
            logits_to_keep: number of last positions to return (0: all), or their indices.
            **kwargs: arguments of attention and loss.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        kept = logits_to_keep
        if isinstance(kept, int):
            kept = slice(-kept, None) if kept else slice(None)
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        if output_router_logits is None:
            output_router_logits = getattr(self.config, "output_router_logits", False)
        loss, balancing = None, None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            if output_router_logits and self.config.num_experts:
                balancing = load_balancing_loss(outputs.router_logits, self.config, attention_mask)
                loss = loss + self.config.router_aux_loss_coef * balancing.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=balancing,
            logits=logits,
            **{_CACHE: getattr(outputs, _CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )


def load_balancing_loss(router_logits, config, attention_mask=None):
    """Return the load-balancing loss, the mean over layers of E / k * sum_e f_e p_e.

    Here f_e is the share of tokens that choose expert e, and p_e its mean probability.

    Args:
        router_logits: [b s, E] of each layer.
        config: configuration of the model.
        attention_mask: [b, s], tokens that count; None, or a mask of another shape: all.
    """
    losses = []
    for logits in router_logits:
        probs = logits.softmax(-1)
        chosen = torch.zeros_like(probs).scatter(
            1, probs.topk(config.num_experts_per_tok).indices, 1.0
        )
        if attention_mask is not None and attention_mask.numel() == len(probs):
            counts = attention_mask.flatten().bool().to(probs.device)
            probs, chosen = probs[counts], chosen[counts]
        losses.append((chosen.mean(0) * probs.mean(0)).sum().to(router_logits[0].device))
    return torch.stack(losses).mean() * config.num_experts / config.num_experts_per_tok
