"""Configure the evaluation of a checkpoint from its own configuration and the command line.

Model, data and batch are the checkpoint's. The parallel layout is not, because other processes
evaluate: by default each of them has the whole model. Options that affect only training are
refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megapoly.checkpoints.run_folder import run_of
from megapoly.config.parsing import load_yaml, override
from megapoly.config.schema import (
    CheckpointConfig,
    Config,
    ParallelConfig,
    TrainingConfig,
)
from megapoly.config.this_job import check_and_resolve
from megapoly.data.tokenizer import tokenizer_vocab_size
from megapoly.errors import CheckpointError

# Options that affect an evaluation and may differ from the checkpoint's.
EVALUATION_OPTIONS = (
    "model.activation_backend",
    "model.activation_deterministic",
    "model.make_vocab_size_divisible_by",
    "model.moe_router_dtype",
    "model.moe_token_dispatcher_type",
    "model.moe_grouped_gemm",
    "model.transformer_engine",
    "model.apply_rope_fusion",
    "model.moe_permute_fusion",
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.virtual_pipeline_model_parallel_size",
    "parallel.context_parallel_size",
    "parallel.cp_comm_type",
    "parallel.expert_model_parallel_size",
    "parallel.expert_tensor_parallel_size",
    "parallel.sequence_parallel",
    "parallel.distributed_timeout_minutes",
    "data.validation",
    "data.tokenizer",
    "data.cache_dir",
    "data.eod_mask_loss",
    "training.seq_length",
    "training.micro_batch_size",
    "training.global_batch_size",
    "training.bf16",
    "training.device",
    "training.eval_iters",
)


def configure_evaluation(
    checkpoint: Path, overrides: Sequence[str] = (), *, needs_validation: bool = False
) -> Config:
    """Configure the evaluation of a checkpoint by this job.

    ``training.device`` is ``auto`` unless set. ``run_dir`` is the folder that contains
    the checkpoint, even if it was moved; ``data.cache_dir`` follows unless the run had set it.

    Args:
        checkpoint: ``RUN_DIR/checkpoints/iter_0000100``.
        overrides: command-line arguments ``--section.field value``.
        needs_validation: validation sets are evaluated; otherwise the files of the run's sets
            need not exist.

    Returns:
        The resolved configuration, checked against every rule.

    Raises:
        CheckpointError: the checkpoint is not complete.
        ConfigError: what cannot be parsed, or else every broken rule.
        DataError: the tokenizer's file exists and cannot be used.
    """
    if not (checkpoint / "run.json").is_file():
        raise CheckpointError(
            f"{checkpoint} is not a complete checkpoint (it has no run.json); give the path of an "
            "`iter_*` folder."
        )
    saved = load_yaml(checkpoint / "config.yaml")
    config = _evaluation_config(saved, checkpoint)
    if not needs_validation:
        config.data.validation = None
    names = override(config, overrides)
    problems = [
        f"`{name}` has no effect when a checkpoint is evaluated; leave it out"
        for name in names
        if name not in EVALUATION_OPTIONS
    ]
    if "data.validation" in names and not needs_validation:
        problems.append("`data.validation` has no effect without `--perplexity`; leave it out")
    if needs_validation and saved.data.blend is not None and config.data.validation is None:
        problems.append(
            f"`data.validation` is null: the run of {checkpoint} had its own training text and no "
            "validation sets; give some, such as `--data.validation '{wiki: tokens/wiki}'`"
        )
    vocab_size = tokenizer_vocab_size(config.data.tokenizer)
    return check_and_resolve(config, tokenizer_vocab_size=vocab_size, problems=problems)


def _evaluation_config(saved: Config, checkpoint: Path) -> Config:
    """Take from a run's configuration what an evaluation needs; the rest keeps valid defaults."""
    run_dir = run_of(checkpoint) or checkpoint.resolve().parent
    timeout, old = saved.parallel.distributed_timeout_minutes, saved.training
    is_own_cache = saved.data.cache_dir == str(Path(saved.run_dir) / "cache")
    return Config(
        run_dir=str(run_dir),
        # Kernels depend on the machine that evaluates, and the text may be longer.
        model=dataclasses.replace(
            saved.model,
            transformer_engine=None,
            apply_rope_fusion=None,
            moe_permute_fusion=None,
            max_position_embeddings=None,
        ),
        parallel=ParallelConfig(distributed_timeout_minutes=timeout),
        data=dataclasses.replace(
            saved.data, blend=None, cache_dir=None if is_own_cache else saved.data.cache_dir
        ),
        training=TrainingConfig(
            train_iters=1,
            seq_length=old.seq_length,
            micro_batch_size=old.micro_batch_size,
            global_batch_size=old.global_batch_size,
            seed=old.seed,
            bf16=old.bf16,
            eval_iters=old.eval_iters,
        ),
        checkpoint=CheckpointConfig(save=False),
    )
