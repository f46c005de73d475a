"""Rules on the machine and on the checkpoint that a run starts from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megapoly.config.options import short
from megapoly.config.rules.facts import Facts, Rule, value_of
from megapoly.platform.files import is_file, is_folder, why_missing
from megapoly.platform.stores import is_url, why_not_opened


def device_exists(facts: Facts) -> Iterator[str]:
    """CUDA is available when it is requested."""
    if facts.config.training.device == "cuda" and not facts.machine.cuda:
        yield (
            "`training.device` (cuda) needs a CUDA device and PyTorch built for it, and this "
            "process sees none; set cpu, or auto to use CUDA only if it is available"
        )


def transformer_engine_is_usable(facts: Facts) -> Iterator[str]:
    """Transformer Engine is installed, and runs on CUDA only."""
    if not facts.config.model.transformer_engine:
        return
    remedy = "leave it null to use it where it can be used"
    if facts.device == "cpu":
        yield f"`model.transformer_engine` (True) needs `training.device` cuda, not cpu; {remedy}"
    elif not facts.machine.transformer_engine:
        yield (
            "`model.transformer_engine` (True) needs Transformer Engine, which is not installed; "
            f"`pip install 'megapoly[gpu]'`, or {remedy}"
        )


def hang_is_seen_before_collectives_fail(facts: Facts) -> Iterator[str]:
    """A rank is silent for less time than a collective may wait for it."""
    parallel = facts.config.parallel
    given, minutes = parallel.hang_timeout_s, parallel.distributed_timeout_minutes
    if given is not None and given > 0.8 * 60 * minutes > 0 and facts.world_size > 1:
        yield (
            f"`parallel.hang_timeout_s` ({given:g}) must be at most 80 % of "
            f"`parallel.distributed_timeout_minutes` ({minutes:g}), {0.8 * 60 * minutes:g} s, "
            "for after that time collectives end the job without naming a rank; lower the first "
            "or raise the second"
        )


def loading_is_possible(facts: Facts) -> Iterator[str]:
    """Options on what to load from a checkpoint need a checkpoint."""
    checkpoint = facts.config.checkpoint
    if checkpoint.load is None and checkpoint.load_weights_only:
        yield (
            "`checkpoint.load_weights_only` (True) needs `checkpoint.load` (null); name a "
            "checkpoint, or set it to false"
        )
    starts_from_nothing = checkpoint.load is None and not checkpoint.resume
    for name in ("accept_other_data", "accept_other_batch"):
        if getattr(checkpoint, name) and starts_from_nothing:
            yield (
                f"`checkpoint.{name}` (True) has no effect with `checkpoint.resume` (False) "
                "and `checkpoint.load` (null), which start a run from nothing; remove it"
            )


def upload_is_possible(facts: Facts) -> Iterator[str]:
    """Checkpoints that are copied to a store are saved, and stay until they are copied."""
    checkpoint = facts.config.checkpoint
    if checkpoint.upload is None:
        return
    upload = f"`checkpoint.upload` ({short(checkpoint.upload)})"
    if not is_url(checkpoint.upload):
        yield f"{upload} must be a URL, such as s3://bucket/run"
    elif problem := why_not_opened(checkpoint.upload):
        yield f"{upload}: {problem}; install it, or choose another store"
    if not checkpoint.save:
        yield f"{upload} has no effect with `checkpoint.save` (False); remove it, or save"
    elif checkpoint.keep == 1:
        yield (
            f"{upload} needs a `checkpoint.keep` other than 1: the next checkpoint deletes the "
            "one that is being copied; 2 is the lowest"
        )


def checkpoint_exists(facts: Facts) -> Iterator[str]:
    """The checkpoint to start from exists; one in a store is looked for when the run starts."""
    load = facts.config.checkpoint.load
    if load is not None and is_url(load):
        if problem := why_not_opened(load):
            yield f"`checkpoint.load` ({short(load)}): {problem}; install it, or give a folder"
        return
    if load is not None and not is_folder(load):
        why = why_missing(load) or "is not a folder"
        yield (
            f"`checkpoint.load` ({short(load)}) {why}; give a folder such as "
            "RUN_DIR/checkpoints/iter_0000100"
        )


def folders_can_be_made(facts: Facts) -> Iterator[str]:
    """What a run writes to is a folder, or can become one."""
    for key in ("run_dir", "data.cache_dir"):
        folder = value_of(facts.config, key)
        if folder is not None and is_url(folder):
            remedy = "choose a folder"
            if key == "run_dir":
                remedy += (
                    f", and set `checkpoint.upload` to {short(folder)}: checkpoints are copied "
                    "there, and a run with an empty folder resumes from there"
                )
            yield f"`{key}` ({short(folder)}) must be a folder and not a URL; {remedy}"
        elif folder is not None and (why := _why_no_folder(Path(folder))):
            yield f"`{key}` ({short(folder)}) {why}; choose another folder"


def _why_no_folder(folder: Path) -> str:
    """Return why a folder can neither be used nor made; empty if nothing prevents it."""
    why = why_missing(folder)
    if why.startswith("cannot"):
        return why
    existing = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), None)
    if existing is None or is_folder(existing):
        return ""
    what = "is not a folder" if is_file(existing) else "is a link to nothing, or no folder"
    return what if existing == folder else f"cannot be made: {short(existing)} {what}"


RULES: tuple[Rule, ...] = (
    device_exists,
    transformer_engine_is_usable,
    hang_is_seen_before_collectives_fail,
    loading_is_possible,
    upload_is_possible,
    checkpoint_exists,
    folders_can_be_made,
)
