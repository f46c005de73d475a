"""The configuration: one dataclass per section, every field with its meaning, unit and default.

Field names are Megatron's where Megatron has one. A value of ``null`` is resolved before training
(:func:`megapoly.config.resolve.resolve`); ``--print-config`` prints the resolved configuration, and
every run and checkpoint saves it. Rules across fields are in :mod:`megapoly.config.rules`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megapoly.polynomial import DEFAULT_EPS, DEFAULT_ORDER, Backend, Norm


@dataclass
class ModelConfig:
    """Architecture.

    Args:
        num_layers: number of transformer layers.
        hidden_size: width of the residual stream.
        num_attention_heads: number of query heads.
        num_query_groups: number of key/value heads; null: ``num_attention_heads`` (no grouped
            queries).
        kv_channels: width of one head; null: ``hidden_size / num_attention_heads``.
        ffn_hidden_size: width of a dense FFN with an ungated activation; see ``scale_gated_ffn``.
        scale_gated_ffn: use two thirds of every FFN width with gated activations, so that their
            third matrix adds no parameters (8256 -> 5504); false: use the widths as written.
        activation: name in the registry (``megapoly/activations/registry.py``).
        activation_order: highest power r of a polynomial activation (2, 3 or 4).
        activation_coefficients: one set of coefficients for all experts of a layer (``shared``, as
            in the paper) or one for each expert (``per_expert``).
        activation_norm: what divides a power in the PolyNorm family: its root mean square
            (``rms``) or its L2 norm (``l2``, the paper's Eq. 3 as written).
        activation_eps: added to the mean square (``l2``: to the sum of squares).
        activation_backend: implementation of activations with coefficients: plain torch code
            (``reference``), torch.compile (``compiled``, needs a C++ compiler on CPU), CUDA kernels
            (``triton``), or the fastest of these that can run (``auto``).
        activation_deterministic: sum the rows of activations with coefficients in a fixed order:
            the same bits at tensor-parallel sizes 1, 2, 4 and 8, with somewhat larger messages.
        normalization_eps: epsilon of every RMSNorm.
        qk_norm: RMSNorm on queries and keys: ``none``, of each head (``head``), or of the whole
            projection before it is split into heads (``full``, as in OLMoE and the paper's MoE).
        rotary_base: base (theta) of the rotary position embedding.
        max_position_embeddings: longest sequence that an export says the model takes, at least
            ``training.seq_length``; null: ``training.seq_length``. Losses do not depend on it.
        untie_embeddings_and_output_weights: use separate input and output embeddings.
        vocab_size: number of token ids of the model; null: the tokenizer's.
        make_vocab_size_divisible_by: pad embedding and output layer to a multiple of this and of
            ``tensor_model_parallel_size``. Padding changes neither losses nor weights.
        hidden_dropout: dropout of the embeddings and of the outputs of attention and FFN.
        attention_dropout: dropout of attention probabilities.
        init_method: distribution of the initial weights; ``truncated_normal`` is cut at 3 sigma.
        init_method_std: standard deviation of the initial weights.
        scale_residual_init: divide the standard deviation of the two matrices that write to the
            residual stream by sqrt(2 * num_layers).
        num_moe_experts: number of experts per layer; null: a dense model.
        moe_ffn_hidden_size: width of one expert with an ungated activation (see
            ``scale_gated_ffn``); null: ``ffn_hidden_size``.
        moe_shared_expert_intermediate_size: width of the shared expert (as
            ``moe_ffn_hidden_size``); null: no shared expert.
        moe_router_topk: number of experts that each token is routed to.
        moe_router_pre_softmax: softmax before the top-k, without renormalising (as in the paper);
            false: softmax over the chosen k.
        moe_router_dtype: precision of routing; null: the model's.
        moe_aux_loss_coeff: weight of the load-balancing loss of each layer, as in Megatron; the
            losses of the layers are added (0: none).
        moe_z_loss_coeff: weight of the router z-loss of each layer, likewise (0: none).
        moe_token_dispatcher_type: how tokens are sent to their experts.
        moe_grouped_gemm: use one grouped linear layer for all experts of a rank; false: run one
            expert after another. Weights and checkpoints are the same.
        transformer_engine: build layers from Transformer Engine; null: on CUDA if it is installed.
        apply_rope_fusion: apply the rotary embedding with Transformer Engine's kernel; null: as
            ``transformer_engine``.
        moe_permute_fusion: sort tokens by expert, and back, with Transformer Engine's kernels;
            null: as ``transformer_engine``.
    """

    num_layers: int = 4
    hidden_size: int = 256
    num_attention_heads: int = 4
    num_query_groups: int | None = None
    kv_channels: int | None = None
    ffn_hidden_size: int = 1056
    scale_gated_ffn: bool = True
    activation: str = "polynorm"
    activation_order: int = DEFAULT_ORDER
    activation_coefficients: Literal["shared", "per_expert"] = "shared"
    activation_norm: Norm = "rms"
    activation_eps: float = DEFAULT_EPS
    activation_backend: Backend = "auto"
    activation_deterministic: bool = False
    normalization_eps: float = 1e-5
    qk_norm: Literal["none", "head", "full"] = "none"
    rotary_base: int = 10_000
    max_position_embeddings: int | None = None
    untie_embeddings_and_output_weights: bool = True
    vocab_size: int | None = None
    make_vocab_size_divisible_by: int = 128
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_method: Literal["normal", "truncated_normal"] = "normal"
    init_method_std: float = 0.02
    scale_residual_init: bool = True
    num_moe_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    moe_router_topk: int = 2
    moe_router_pre_softmax: bool = True
    moe_router_dtype: Literal["fp32", "fp64"] | None = "fp32"
    moe_aux_loss_coeff: float = 0.01
    moe_z_loss_coeff: float = 0.001
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = "alltoall"
    moe_grouped_gemm: bool = True
    transformer_engine: bool | None = None
    apply_rope_fusion: bool | None = None
    moe_permute_fusion: bool | None = None


@dataclass
class ParallelConfig:
    """How the model and the data are split over the processes.

    Args:
        tensor_model_parallel_size: ranks that share every matrix of attention and dense FFN.
        pipeline_model_parallel_size: ranks that share the layers.
        virtual_pipeline_model_parallel_size: split the layers of a pipeline stage into this many
            interleaved chunks, which shortens the pipeline's idle time; null: one chunk.
        context_parallel_size: ranks that share every sequence.
        cp_comm_type: how ranks that share a sequence attend to all of it: gather the others' keys
            and values (``all_gather``), exchange heads for tokens (``a2a``), or pass keys and
            values around a ring (``p2p``, Transformer Engine); null: ``p2p`` with Transformer
            Engine, else ``all_gather``.
        expert_model_parallel_size: ranks that share the experts.
        expert_tensor_parallel_size: ranks that share one expert's matrices; null:
            ``tensor_model_parallel_size``.
        sequence_parallel: split activations outside the matrix products along the sequence; null:
            if ``tensor_model_parallel_size`` > 1.
        use_distributed_optimizer: shard optimizer state over the data-parallel ranks.
        overlap_grad_reduce: reduce gradients while the backward pass runs.
        overlap_param_gather: gather updated parameters while the forward pass runs; needs
            ``use_distributed_optimizer`` and ``overlap_grad_reduce``.
        recompute_granularity: activations to recompute in the backward pass: of whole layers
            (``full``), or of ``recompute_modules`` (``selective``); null: none.
        recompute_method: layers to recompute with ``full``: every group of ``recompute_num_layers``
            layers (``uniform``), or the first ``recompute_num_layers`` of each stage (``block``).
        recompute_num_layers: number of layers, see ``recompute_method``.
        recompute_modules: modules of a layer to recompute with ``selective``.
        distributed_timeout_minutes: minutes that a collective may wait before the job fails.
        hang_timeout_s: seconds that a rank may stay within one micro-batch of a step. A job that
            hangs longer writes stacks to ``RUN_DIR/diagnostics``, names the rank that is behind
            and ends with status 4. 0: do not watch; null: 60 s or ten times the median step,
            whichever is longer, but at most four fifths of ``distributed_timeout_minutes``, which
            are also the limit at the start, in evaluation and in saving.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    cp_comm_type: Literal["p2p", "all_gather", "a2a"] | None = None
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool | None = None
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int | None = None
    recompute_modules: list[Literal["core_attn", "mlp", "moe"]] = field(
        default_factory=lambda: ["core_attn"]
    )
    distributed_timeout_minutes: float = 10.0
    hang_timeout_s: float | None = None


@dataclass
class BlendSource:
    """One source of training text; exactly one of ``weight``, ``tokens`` and ``epochs``.

    All sources of a blend use the same one of the three, which decides the share p_i of source i:

        weight: p_i = weight_i / sum of weight_j
        tokens: p_i = tokens_i / sum of tokens_j
        epochs: p_i = epochs_i * T_i / sum of epochs_j * T_j,  T_j = tokens in the files of j

    These are proportions; only ``training`` sets the length of the run. A run of as many tokens as
    the sum of ``tokens_j`` reads ``tokens_i`` of source i, a run of the sum of ``epochs_j * T_j``
    passes ``epochs_i`` times over it (to a block, :mod:`megapoly.data.sample_order`), and a
    longer run continues in the same mix.

    Args:
        path: prefix of a Megatron ``.bin``/``.idx`` pair, or a pattern of prefixes such as
            ``data/cc/*_text_document``, whose files are one source, in sorted order. Either may be
            in an object store: ``s3://bucket/cc/*_text_document``.
        weight: share in the training samples, relative to the other sources.
        tokens: tokens to train on, relative to the other sources, such as ``250e9``.
        epochs: passes over the source, relative to the other sources.
        name: name of the source in messages; null: the last part of ``path``.
    """

    path: str
    weight: float | None = None
    tokens: int | None = None
    epochs: float | None = None
    name: str | None = None


@dataclass
class ValidationSet:
    """Token files that are evaluated together, under one name.

    Args:
        path: prefix or pattern of prefixes, as in ``data.blend``, or a list of these.
        weight: weight of the set's loss in ``val/mean``; null: the number of its tokens that were
            evaluated. Either all sets have a weight, or none.
    """

    path: str | list[str]
    weight: float | None = None


@dataclass
class DataConfig:
    """The training text, and the order in which it is read.

    The order and the mix depend on ``seed`` and the sample index alone: an epoch of a
    source visits each of its samples once, and sample i is the same at every parallel layout and
    every length of training.

    Args:
        blend: sources of training text, each a prefix of a Megatron ``.bin``/``.idx`` pair (read as
            ``epochs: 1``) or a mapping such as ``{path: data/cc/*_text_document, weight: 2}``;
            null: the built-in books. A prefix such as ``s3://bucket/cc_text_document`` is copied to
            ``cache_dir`` and verified.
        validation: validation sets by name, each a prefix, a list of prefixes or a mapping such as
            ``{path: data/wiki, weight: 2}``; null: the built-in books' validation part, or none
            when ``blend`` is given.
        tokenizer: a ``tokenizer.json``, or a folder with one or with GPT-2's ``vocab.json`` and
            ``merges.txt``; null: the built-in tokenizer. Files beside it may name the end of a
            document and further tokens.
        cache_dir: folder for token files of the built-in text and of object stores, and for sample
            indices; null: ``RUN_DIR/cache``.
        seed: seed of the order.
        num_workers: number of processes that read ahead on each rank.
        eod_mask_loss: exclude the token that follows an end of document from the loss.
    """

    blend: list[str | BlendSource] | None = None
    validation: dict[str, str | list[str] | ValidationSet] | None = None
    tokenizer: str | None = None
    cache_dir: str | None = None
    seed: int = 1234
    num_workers: int = 0
    eod_mask_loss: bool = False


@dataclass
class OptimizerConfig:
    """AdamW and the learning-rate schedule.

    Args:
        lr: highest learning rate.
        min_lr: learning rate at the end of the schedule.
        lr_decay_style: shape of the schedule after warm-up; ``WSD`` stays at ``lr`` and decays over
            the last ``lr_wsd_decay_iters`` (or ``lr_wsd_decay_tokens``).
        lr_warmup_init: learning rate at which the warm-up begins.
        lr_warmup_iters: steps of linear warm-up from ``lr_warmup_init``; null: none.
        lr_warmup_tokens: length of the warm-up in tokens; at most one of the two.
        lr_decay_iters: steps until ``min_lr`` is reached, warm-up included; null: the whole run (if
            that ends within the warm-up, one step longer than it).
        lr_decay_tokens: length of the decay in tokens; at most one of the two.
        lr_wsd_decay_iters: steps of the decay at the end of ``WSD``.
        lr_wsd_decay_tokens: length of that decay in tokens; at most one of the two.
        lr_wsd_decay_style: shape of that decay.
        weight_decay: decoupled weight decay of matrices; activation coefficients are never decayed.
        decay_norms: decay the weights of norms also.
        adam_beta1: decay rate of the first moment.
        adam_beta2: decay rate of the second moment.
        adam_eps: added to the square root of the second moment.
        clip_grad: largest global gradient norm (0: no clipping).
    """

    lr: float = 1e-3
    min_lr: float = 1e-4
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    lr_warmup_init: float = 0.0
    lr_warmup_iters: int | None = None
    lr_warmup_tokens: int | None = None
    lr_decay_iters: int | None = None
    lr_decay_tokens: int | None = None
    lr_wsd_decay_iters: int | None = None
    lr_wsd_decay_tokens: int | None = None
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    weight_decay: float = 0.1
    decay_norms: bool = False
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass
class TrainingConfig:
    """Length, batch, precision and evaluation.

    Args:
        train_iters: steps to train, counted from the start of the run.
        train_tokens: tokens to train on, rounded up to a step; exactly one of the two.
        seq_length: tokens in one sample.
        micro_batch_size: samples in one forward pass of one rank.
        global_batch_size: samples in one step over all ranks; gradients of several forward passes
            are accumulated.
        calculate_per_token_loss: train on the mean over all unmasked tokens of a step, which does
            not depend on ``micro_batch_size``; false: on the mean over micro-batches of the mean
            of each. Without masked tokens the two are the same; null: as ``data.eod_mask_loss``.
        seed: seed of the initial weights and of dropout; the weights depend on it alone, not on the
            layout. Dropout is drawn separately for every sample and every part of a sequence.
        bf16: compute in bfloat16 with fp32 master weights; false: fp32.
        fp8: multiply the matrices of the layers in FP8, with Transformer Engine; the rest stays in
            bfloat16, also the weights. ``e4m3``: all products in this format, ``hybrid``:
            gradients in e5m2; null: no FP8.
        fp8_recipe: which values share a scaling factor in FP8: a tensor, scaled by its current
            values (``tensorwise``) or by those of earlier steps (``delayed``); blocks of 128 values
            (``blockwise``); blocks of 32 values (``mxfp8``).
        fp8_amax_history_len: number of earlier forward passes that ``delayed`` scales by.
        fp8_amax_compute_algo: scale by the largest of these passes (``max``), or by the last
            (``most_recent``).
        first_last_layers_bf16: keep the first and the last layer in bfloat16; not available with
            ``delayed``.
        gradient_accumulation_fusion: accumulate the weight gradients of a step, in fp32, inside the
            matrix products that compute them; null: on CUDA if apex, whose kernel it needs, is
            installed.
        device: device to train on; ``auto``: CUDA if it is available, else the CPU.
        eval_interval: steps between evaluations (0: none); the last step is also evaluated.
        eval_iters: global batches of one evaluation of each validation set; null: the whole set.
        eval_tasks: benchmark tasks and groups, by their names in LM Evaluation Harness, that are
            evaluated during training (``task/NAME`` in percent, with its standard error as
            ``task_stderr/NAME``); null: none.
        eval_tasks_interval: steps between evaluations of ``eval_tasks`` (0: none); the last step
            is also evaluated.
        eval_tasks_limit: number of questions of each task, from the first; null: all.
        eval_tasks_data: folder with the tasks' questions as JSONL, which needs no network; null:
            the harness downloads them, or reads its cache.
        spike_action: what to do when a loss or the gradient norm of a step is a spike: train on it
            and report it (``report``), leave out the optimizer's step (``skip``), or end the run
            before it (``stop``). A value that is not finite is left out with ``skip``, and ends the
            run otherwise.
        spike_threshold: a value is a spike above median + ``spike_threshold`` * sigma of recent
            steps; sigma is 1.4826 times their median absolute deviation from the median, at least
            0.01 times the median.
        spike_window: number of recent steps to compare with; spikes are found when half of them are
            known.
        spike_max_skips: most steps that ``skip`` leaves out among ``spike_window`` successive
            steps; the next one ends the run.
        skip_batches: steps whose batches are passed over without training, such as
            ``[1200-1210, 1300]``; schedule and position of the data move on. A run that has trained
            on them goes back to its newest checkpoint that has not; null: none.
    """

    train_iters: int | None = None
    train_tokens: int | None = None
    seq_length: int = 256
    micro_batch_size: int = 4
    global_batch_size: int = 8
    calculate_per_token_loss: bool | None = None
    seed: int = 1234
    bf16: bool = False
    fp8: Literal["e4m3", "hybrid"] | None = None
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    fp8_amax_history_len: int = 1024
    fp8_amax_compute_algo: Literal["max", "most_recent"] = "max"
    first_last_layers_bf16: bool = False
    gradient_accumulation_fusion: bool | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    eval_interval: int = 0
    eval_iters: int | None = 10
    eval_tasks: list[str] | None = None
    eval_tasks_interval: int = 0
    eval_tasks_limit: int | None = 200
    eval_tasks_data: str | None = None
    spike_action: Literal["report", "skip", "stop"] = "report"
    spike_threshold: float = 10.0
    spike_window: int = 128
    spike_max_skips: int = 8
    skip_batches: list[int | str] | None = None


@dataclass
class CheckpointConfig:
    """Saving and resuming; checkpoints are ``RUN_DIR/checkpoints/iter_0000100``.

    Args:
        save: save checkpoints (also at the end and on SIGTERM or Ctrl-C).
        save_interval: steps between checkpoints (0: only at the end and when stopped).
        async_save: write checkpoints in the background while the run trains on, except the last;
            false: the run waits.
        keep: number of newest checkpoints to keep (0: all).
        upload: URL of an object store, such as s3://bucket/run, to which complete checkpoints are
            copied while the run trains on. A run whose ``run_dir`` has none resumes from there.
        resume: resume from the newest complete checkpoint of ``run_dir`` if it has one; false:
            refuse a ``run_dir`` that has one.
        load: checkpoint to start from if ``run_dir`` has none: a folder, or the URL of a checkpoint
            or of a run, whose newest one is copied to ``data.cache_dir`` and verified.
        load_weights_only: load only the weights from ``load``, not optimizer, schedule and data
            position.
        accept_other_data: resume from a checkpoint of other training data (sources, shares, seed,
            tokenizer or ``seq_length``), at its step; false: refuse it, and report what differs.
        accept_other_batch: resume from a checkpoint of another ``training.global_batch_size``,
            after the samples that it has consumed; false: refuse it.
    """

    save: bool = True
    save_interval: int = 0
    async_save: bool = True
    keep: int = 2
    upload: str | None = None
    resume: bool = True
    load: str | None = None
    load_weights_only: bool = False
    accept_other_data: bool = False
    accept_other_batch: bool = False


@dataclass
class LoggingConfig:
    """Output of a run.

    Args:
        log_interval: steps between lines of output that is not a terminal, and between TensorBoard
            points; ``metrics.jsonl`` has every step.
        detail_interval: steps between TensorBoard points of expert load and activation coefficients
            (0: none).
        tensorboard: write ``RUN_DIR/tensorboard``.
        export: where metrics of the run are sent while it trains: ``prometheus:/DIR/NAME.prom``, a
            text file for node_exporter's textfile collector, and ``otlp:http://HOST:4318``, an
            OpenTelemetry collector; null: nowhere. ``megapoly status`` needs none.
        peak_tflops: peak of one device, in TFLOP/s, for MFU; null: the bf16 peak of its data sheet,
            found by its name (``megapoly/platform/gpus.py``), and no MFU for other devices.
        profile: write ``RUN_DIR/profile/rank_R.steps_A-B.json.gz``, a trace of torch's profiler for
            Perfetto, and a table of operators, ``.txt``.
        profile_step_start: first step of the trace, as numbered in the log.
        profile_step_end: last step of the trace.
        profile_ranks: ranks that write a trace.
    """

    log_interval: int = 10
    detail_interval: int = 10
    tensorboard: bool = True
    export: list[str] | None = None
    peak_tflops: float | None = None
    profile: bool = False
    profile_step_start: int = 10
    profile_step_end: int = 12
    profile_ranks: list[int] = field(default_factory=lambda: [0])


@dataclass
class Config:
    """A run.

    Args:
        run_dir: folder for everything that the run writes; no URL, see ``checkpoint.upload``.
        model: architecture.
        parallel: layout over the processes.
        data: training text and its order.
        optimizer: AdamW and schedule.
        training: length, batch, precision and evaluation.
        checkpoint: saving and resuming.
        logging: output of the run.
    """

    run_dir: str = "runs/default"
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
