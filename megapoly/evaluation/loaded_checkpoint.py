"""Load a checkpoint for evaluation on the ranks of this job, at any layout."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megapoly.checkpoints.choose import check_whole
from megapoly.config import Config
from megapoly.errors import CheckpointError, MegapolyError
from megapoly.evaluation.checkpoint_config import configure_evaluation

if TYPE_CHECKING:
    from megapoly.data.samples import SamplePool
    from megapoly.data.tokenizer import Tokenizer
    from megapoly.training.state import ModelState

_FAREWELL_S = 5.0


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint's model on all ranks, its tokenizer and validation sets.

    Args:
        path: folder of the checkpoint.
        iteration: number of steps that it was trained.
        model: this rank's part of the model.
        tokenizer: tokenizer of its training data.
        add_bos: whether its texts begin with BOS, as an import records.
        validation: samples of the validation sets, by name.
        warnings: messages about the files of validation sets.
    """

    path: Path
    iteration: int
    model: ModelState
    tokenizer: Tokenizer
    add_bos: bool
    validation: dict[str, SamplePool] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@contextlib.contextmanager
def loaded_checkpoint(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    with_validation: bool = False,
    check: Callable[[], str] | None = None,
) -> Iterator[LoadedCheckpoint]:
    """Load the model of a checkpoint on all ranks of the job; collective.

    The context creates the process groups and destroys them at its end. Rank and number of
    processes come from torchrun's environment; without it the job is one process.

    Args:
        path: ``RUN_DIR/checkpoints/iter_0000100``.
        overrides: command-line arguments ``--section.field value``, see
            :func:`megapoly.evaluation.checkpoint_config.configure_evaluation`.
        with_validation: also open the validation sets.
        check: called on every rank before the model is loaded; if one rank raises, all raise. It
            returns the fingerprint of what else is read, which must be the same on all.

    Raises:
        CheckpointError: the checkpoint is incomplete, or does not fit the options.
        ConfigError: every broken rule.
        DataError: validation data or tokenizer cannot be used.
        PeerError: another rank failed.
    """
    config = configure_evaluation(path, overrides, needs_validation=with_validation)
    from megapoly.platform.device import select_platform

    platform = select_platform(config.training.device)
    # After the platform: these import the engine, which must find it set up.
    import torch.distributed as dist

    from megapoly.data.corpus import load_validation
    from megapoly.data.fingerprint import fingerprint_of_sets
    from megapoly.data.tokenizer import load_tokenizer
    from megapoly.training.distributed import all_ranks, model_groups, process_group
    from megapoly.training.load_checkpoint import read_position
    from megapoly.training.model_only import load_model
    from megapoly.training.rank_zero_first import RankZeroFirst, wait_for_peers

    position = read_position(path)
    with process_group(config, platform) as store:
        check_whole(path, all_ranks())
        validation: dict[str, SamplePool] = {}
        warnings: list[str] = []
        with RankZeroFirst.of_job(store, config) as rank_zero_first:
            tokenizer = load_tokenizer(config.data.tokenizer)
            _check_tokenizer(tokenizer, position.get("data"), config, path)
            if check is not None:
                rank_zero_first.check_same("set of questions", check())
            if with_validation:
                validation, warnings = load_validation(
                    config, tokenizer=tokenizer, first=rank_zero_first.run
                )
                rank_zero_first.check_same("validation data", fingerprint_of_sets(validation))
        with model_groups(config):
            model = load_model(config, platform, path)
            try:
                yield LoadedCheckpoint(
                    path,
                    position["iteration"],
                    model,
                    tokenizer,
                    position.get("add_bos", False),
                    validation,
                    warnings,
                )
            except MegapolyError:
                # Ranks that fail alike report it before a launcher ends all of them.
                wait_for_peers(store, "failed", dist.get_world_size(), timeout_s=_FAREWELL_S)
                raise


def _check_tokenizer(
    tokenizer: Tokenizer, trained_on: dict[str, object] | None, config: Config, path: Path
) -> None:
    # A checkpoint imported from a Hugging Face folder does not record training text.
    if trained_on is not None and trained_on["tokenizer"] != tokenizer.fingerprint:
        raise CheckpointError(
            f"{path} was trained with another tokenizer (fingerprint {trained_on['tokenizer']}); "
            f"`data.tokenizer` ({config.data.tokenizer}) has fingerprint {tokenizer.fingerprint}. "
            "Give the one that the training text was prepared with."
        )
