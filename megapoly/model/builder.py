"""Build this rank's part of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megapoly.config import Config, padded_vocab_size
from megapoly.model.initialization import initialize_weights
from megapoly.model.specs import decoder_spec
from megapoly.model.transformer_config import transformer_config
from megapoly.model.vocabulary import exclude_padding
from megapoly.platform.device import Platform


def gpt_model(
    config: Config, engine: TransformerConfig, *, vp_stage: int | None = None
) -> GPTModel:
    """Build the engine's GPT model of this pipeline stage, with weights not yet set.

    Under ``torch.device("meta")`` and an ``engine`` made with ``on_cpu=True`` it takes no memory.

    Args:
        config: resolved.
        engine: the same, translated to the engine's ``TransformerConfig``.
        vp_stage: chunk of an interleaved stage; None without interleaving.
    """
    model = config.model
    assert model.vocab_size is not None
    place: dict[str, Any] = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    gpt = GPTModel(
        config=engine,
        transformer_layer_spec=decoder_spec(model, engine, vp_stage=vp_stage),
        vocab_size=padded_vocab_size(config),
        max_sequence_length=config.training.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(**place),
        post_process=parallel_state.is_pipeline_last_stage(**place),
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        vp_stage=vp_stage,
    )
    if gpt.post_process:
        exclude_padding(gpt.output_layer, model.vocab_size)
    return gpt


def build_model(config: Config, platform: Platform) -> list[DistributedDataParallel]:
    """Build this rank's model on its device, with initial weights, wrapped for data parallelism.

    Args:
        config: resolved; the engine's process groups must exist.
        platform: device of the model.

    Returns:
        The chunks of an interleaved pipeline stage in the order of their layers; one otherwise.
    """
    chunks = build_chunks(config, platform)
    for chunk in chunks:
        initialize_weights(unwrap(chunk), config.model, config.training.seed)
    return [
        DistributedDataParallel(
            chunk.config,
            _data_parallel_config(config),
            chunk,
            # Only the first chunk's gradients can be reduced while others are still computed.
            disable_bucketing=i > 0,
        )
        for i, chunk in enumerate(chunks)
    ]


def build_chunks(config: Config, platform: Platform) -> list[MegatronModule]:
    """Build this rank's model on its device, in its precision, with weights not yet set.

    Args:
        config: resolved; the engine's process groups must exist.
        platform: device of the model.

    Returns:
        Chunks as in :func:`build_model`, without the wrapper for data parallelism.
    """
    # On CPU, Transformer Engine's modules would ignore torch's default device.
    on_cpu = not (platform.is_cuda or config.model.transformer_engine)
    engine = transformer_config(config, on_cpu=on_cpu)
    num_chunks = config.parallel.virtual_pipeline_model_parallel_size
    stages: list[int | None] = [None] if num_chunks is None else list(range(num_chunks))
    chunks = [gpt_model(config, engine, vp_stage=stage).to(platform.device) for stage in stages]
    return [Float16Module(engine, c) for c in chunks] if config.training.bf16 else chunks


def _data_parallel_config(config: Config) -> DistributedDataParallelConfig:
    parallel = config.parallel
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # train_step checks the loss and the gradient norm
    )


def decoder_layers(chunks: Iterable[torch.nn.Module]) -> Iterator[Any]:
    """Yield the transformer layers of this rank."""
    for chunk in chunks:
        yield from unwrap(chunk).decoder.layers


def unwrap(chunk: torch.nn.Module) -> GPTModel:
    """Return the engine's GPT model inside its wrappers."""
    inner: Any = chunk
    while not isinstance(inner, GPTModel):
        inner = inner.module
    return inner
