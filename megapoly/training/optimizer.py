"""The engine's optimizer and learning-rate schedule from the configuration."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import cast

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from megapoly.config import Config


def build_optimizer(config: Config, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Build AdamW over this rank's parameters.

    Activation coefficients do not decay, norms only with ``optimizer.decay_norms``. Norms are the
    only other vectors: there are no biases.
    """
    optimizer = config.optimizer
    engine = OptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=config.training.bf16,
        params_dtype=torch.bfloat16 if config.training.bf16 else torch.float32,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    is_vector = ParamPredicate(name="is_vector", fn=lambda parameter: parameter.dim() == 1)
    undecayed = [ParamKey(name="*.activation_func.*")]
    undecayed += [] if optimizer.decay_norms else [ParamKey(predicate=is_vector)]
    result = get_megatron_optimizer(
        engine, chunks, config_overrides={key: ParamGroupOverride(wd_mult=0.0) for key in undecayed}
    )
    _count_expert_gradients_once(result)
    return result


def _count_expert_gradients_once(optimizer: MegatronOptimizer) -> None:
    """Tell the optimizers of experts which ranks hold the same parameter.

    The gradient norm counts a parameter that is not sharded only on the first rank of ``tp_group``
    (tensor_parallel/layers.py:89). For experts that must be the expert-tensor-parallel group, but
    optimizer/__init__.py:469 sets the tensor-parallel one, whose ranks may have other experts.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if any(group["is_expert_parallel"] for group in part.param_groups):
            part.tp_group = parallel_state.get_expert_tensor_parallel_group()


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Hand the accumulated gradients to the optimizer and return their global norm; collective.

    With :func:`apply_gradients` this is the engine's ``step`` (optimizer/optimizer.py:1308), in two
    parts: what lies between them may leave the second one out, and changes nothing then.
    """
    overflowed = optimizer.prepare_grads()
    return math.inf if overflowed else float(optimizer.get_grad_norm())


@torch.no_grad()
def apply_gradients(optimizer: MegatronOptimizer, norm: float) -> None:
    """Clip the gradients by their norm and update the parameters; collective.

    Args:
        optimizer: of the engine, after :func:`gradient_norm`.
        norm: its result.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = [] if part.is_stub_optimizer else part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()


def build_scheduler(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Build the learning-rate schedule: linear warm-up, then ``lr_decay_style``.

    It counts samples, as Megatron-LM's does: the configuration's steps are of its
    ``training.global_batch_size``, earlier steps may have had another.
    """
    settings, batch = config.optimizer, config.training.global_batch_size
    assert settings.lr_warmup_iters is not None and settings.lr_decay_iters is not None
    wsd_decay = settings.lr_wsd_decay_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr_warmup_init,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters * batch,
        lr_decay_steps=settings.lr_decay_iters * batch,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=settings.lr_decay_iters * batch,
        wd_incr_style="constant",
        # For `load_state_dict`, which is not used: a run that resumes has its configuration's
        # schedule, at its position (`TrainState.start_from`).
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=None if wsd_decay is None else wsd_decay * batch,
        lr_wsd_decay_style=settings.lr_wsd_decay_style,
    )


def learning_rate_at(config: Config, consumed_samples: int) -> float:
    """Return the learning rate of the step that begins after a number of samples."""
    # The part of an optimizer that the engine's scheduler uses.
    group: dict[str, float] = {}
    optimizer = SimpleNamespace(param_groups=[group])
    scheduler = build_scheduler(config, cast(MegatronOptimizer, optimizer))
    scheduler.step(increment=consumed_samples)
    return group["lr"]


def train_samples(config: Config) -> int:
    """Return the number of samples of the whole run."""
    assert config.training.train_iters is not None, "resolved"
    return config.training.train_iters * config.training.global_batch_size
