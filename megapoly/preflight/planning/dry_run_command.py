"""The option ``--dry-run``: make a dry run and print its result as a table."""

from __future__ import annotations

import logging
from difflib import get_close_matches

from megapoly.config.parsing import DryRunOptions
from megapoly.config.schema import Config
from megapoly.errors import ConfigError
from megapoly.platform import launcher
from megapoly.platform.gpus import GPU, GPUS
from megapoly.platform.machine import Machine


def run_command(config: Config, options: DryRunOptions) -> int:
    """Build a job's ranks and print what they hold; of several processes only rank 0 does.

    Args:
        config: as parsed.
        options: options of the dry run.

    Returns:
        Exit status: 0 if everything adds up, 2 if not.

    Raises:
        MegapolyError: the job cannot be built.
    """
    if launcher.rank() != 0:
        return 0
    gpu = _gpu(options.gpu)
    # Modules log about this machine, and the job is for another one.
    logging.getLogger("megapoly").setLevel(logging.WARNING)
    from megapoly.platform.device import select_platform

    select_platform("cpu")
    from rich.console import Console

    from megapoly.preflight.planning.dry_run import dry_run
    from megapoly.preflight.planning.dry_run_table import show

    machine = Machine(cuda=True, compute_capability=gpu.compute_capability)
    found = dry_run(config, _world_size(options), machine)
    show(found, gpu, Console())
    return 2 if found.problems else 0


def _gpu(name: str) -> GPU:
    if name not in GPUS:
        nearest = get_close_matches(name, GPUS, n=1)
        hint = f"; the nearest is {nearest[0]}" if nearest else ""
        raise ConfigError([f"`--gpu` ({name}) is not one of {', '.join(GPUS)}{hint}"])
    return GPUS[name]


def _world_size(options: DryRunOptions) -> int:
    """Return the requested size, or the size of the current job."""
    if options.world_size is not None:
        return options.world_size
    return launcher.world_size()
