"""Floating-point operations of a model and the peak of a device, for TFLOP/s and MFU.

Model FLOPs are the operations that the model needs, whatever else a run computes: only matrix
products, two operations for each multiply-add, the forward pass once and the backward pass twice
that. They count

- the ``vocab_size`` rows of the output layer, without the rows that pad it, which are not part of
  the model;
- only the experts that a token is routed to;
- the causal half of attention's two [s, s] products, s/2 keys a token ((s + 1)/2 would be exact).
  Megatron-LM also counts half (it counted all of them before), and a flash-attention kernel
  computes no more; PaLM (Appendix B: 12 L h s a token), nanoGPT and torchtitan count all s keys.
  Half is the stricter choice: otherwise a kernel that skips the upper half is credited with it, and
  MFU grows with s by itself. For figures of that kind count ``attention_scores`` twice;
- no recomputation (:func:`recomputed_flops_per_token`), which belongs to hardware FLOPs.

They do not count norms, softmax, rotary embedding, optimizer and activations.
In the forward pass PolyNorm of order 3 has about 14 operations for each element of the FFN width
(2 for the powers, 6 for their mean squares, 6 for the sum). The matrices around it have 4 h: it is
below 0.2 % of the FFN from h = 2048 on.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Literal

from megapoly import activations
from megapoly.config import Config, ffn_width
from megapoly.config.resolve import kv_channels, moe_ffn_hidden_size, num_query_groups
from megapoly.platform.gpus import gpu_of_device

Precision = Literal["bf16", "fp8"]

# The backward pass has two products for each of the forward pass: the gradients of the input and of
# the weight, or of both factors.
_PASSES = 3


@dataclass(frozen=True)
class ForwardFlops:
    """Operations of the forward pass of one token, of all layers together; integers.

    Args:
        attention_projections: queries, keys, values, output.
        attention_scores: q k^T and its product with the values, the causal half.
        ffn: of a dense model.
        experts: the ``moe_router_topk`` that a token is routed to.
        router: scores of all experts.
        shared_expert: the one that every token goes through.
        output_layer: logits of ``vocab_size`` tokens.
    """

    attention_projections: int
    attention_scores: int
    ffn: int
    experts: int
    router: int
    shared_expert: int
    output_layer: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(astuple(self))

    @property
    def layers(self) -> int:
        """Sum of the parts of the layers: all but the output layer."""
        return self.total - self.output_layer


@dataclass(frozen=True)
class Peak:
    """Peak speed of a device, of which MFU is a fraction.

    Args:
        flops: operations a second of one device.
        source: where the figure is from; shown after it.
    """

    flops: float
    source: str


def forward_flops_per_token(config: Config) -> ForwardFlops:
    """Return the operations of one token's forward pass, by part.

        attention_projections = 2 L h d (2 a + 2 g)
        attention_scores      = 2 L (2 a d) s / 2
        ffn, an expert        = 2 L h f m
        router                = 2 L h E
        output_layer          = 2 h V

    with L layers, a heads of width d, g key/value heads, f columns of the activation, m = 2
    matrices (3: gated), E experts and V = ``vocab_size``.

    Args:
        config: resolved, or one that has ``vocab_size``.
    """
    model = config.model
    assert model.vocab_size is not None, "resolve first"
    query = model.num_attention_heads * kv_channels(model)
    key_value = 2 * num_query_groups(model) * kv_channels(model)
    matrices = 3 if activations.get(model.activation).gated else 2

    def of_layers(multiply_adds: int) -> int:
        return 2 * model.num_layers * multiply_adds

    def ffn(size: int) -> int:
        return of_layers(matrices * model.hidden_size * ffn_width(model, size))

    experts = model.num_moe_experts or 0
    return ForwardFlops(
        attention_projections=of_layers(model.hidden_size * (2 * query + key_value)),
        attention_scores=of_layers(query * config.training.seq_length),
        ffn=0 if experts else ffn(model.ffn_hidden_size),
        experts=model.moe_router_topk * ffn(moe_ffn_hidden_size(model)) if experts else 0,
        router=of_layers(model.hidden_size * experts),
        shared_expert=ffn(model.moe_shared_expert_intermediate_size or 0) if experts else 0,
        output_layer=2 * model.hidden_size * model.vocab_size,
    )


def training_flops_per_token(config: Config) -> int:
    """Return the model FLOPs to train on one token: 3 times the forward pass.

    Args:
        config: as of :func:`forward_flops_per_token`.
    """
    return _PASSES * forward_flops_per_token(config).total


def recomputed_flops_per_token(config: Config) -> int:
    """Return the operations of the forward pass that ``parallel.recompute_*`` repeats.

    Model FLOPs plus these are hardware FLOPs. What a kernel recomputes internally (flash attention
    in its backward pass) is not included.

    Args:
        config: as of :func:`forward_flops_per_token`.
    """
    forward, parallel = forward_flops_per_token(config), config.parallel
    if parallel.recompute_granularity is None:
        return 0
    if parallel.recompute_granularity == "full":
        num_layers = config.model.num_layers
        if parallel.recompute_method == "uniform":
            return forward.layers
        assert parallel.recompute_num_layers is not None, "a rule requires it"
        # This number of layers in each chunk of each stage.
        chunks = parallel.pipeline_model_parallel_size * (
            parallel.virtual_pipeline_model_parallel_size or 1
        )
        recomputed = min(parallel.recompute_num_layers * chunks, num_layers)
        return forward.layers // num_layers * recomputed
    of_module = {
        "core_attn": forward.attention_scores,
        "mlp": forward.ffn,
        "moe": forward.router + forward.experts + forward.shared_expert,
    }
    return sum(of_module[module] for module in set(parallel.recompute_modules))


def device_peak(config: Config, device_name: str, *, precision: Precision = "bf16") -> Peak | None:
    """Return the peak of one device: ``logging.peak_tflops``, else the data sheet's, else None.

    MFU is a fraction of the bf16 peak whatever the precision of the run. In FP8 only the linear
    layers are faster; with one denominator the MFUs of a run in bf16 and one in FP8 compare as
    their speeds do. MFU may then exceed 1.

    Args:
        config: of the run.
        device_name: from ``torch.cuda.get_device_name``, or the name of a CPU.
        precision: of the data sheet's peak.
    """
    if config.logging.peak_tflops is not None:
        return Peak(config.logging.peak_tflops * 1e12, "`logging.peak_tflops`")
    gpu = gpu_of_device(device_name)
    flops = None if gpu is None else gpu.fp8_flops if precision == "fp8" else gpu.bf16_flops
    return None if flops is None else Peak(flops, f"{precision}, data sheet of {device_name}")
