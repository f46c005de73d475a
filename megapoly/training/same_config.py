"""Check at the start of a job that all ranks have the same configuration.

Each rank reads the recipe and resolves the options on its own host. With another recipe, or other
packages, hosts would take other steps and wait for each other.
"""

from __future__ import annotations

import json
import socket

from megapoly.config import Config
from megapoly.config.options import OPTIONS, short, text_of
from megapoly.config.parsing import to_dict
from megapoly.errors import ConfigError
from megapoly.training.rank_zero_first import RankZeroFirst

# Files may have other paths on each host: their content is compared. Workers may be more or fewer.
_MAY_DIFFER = {
    "run_dir",
    "checkpoint.load",
    "data.blend",
    "data.cache_dir",
    "data.num_workers",
    "data.tokenizer",
    "data.validation",
    "training.eval_tasks_data",
}
_SHOWN = 3


def check_same_config(config: Config, rank_zero_first: RankZeroFirst) -> None:
    """Check that this rank has rank 0's configuration, but for paths of files; collective.

    Args:
        config: resolved.
        rank_zero_first: entered.

    Raises:
        ConfigError: options differ; with their values.
        PeerError: those of another rank differ.
    """
    own = _compared(config)
    first = json.loads(
        rank_zero_first.told("give its configuration", lambda: json.dumps([_host(), own]))
    )
    host, theirs = first
    differing = [
        f"`{name}` is {short(value)} and not {short(theirs.get(name))}"
        for name, value in own.items()
        if theirs.get(name) != value
    ]
    if differing:
        more = f", and {len(differing) - _SHOWN} more differ" if len(differing) > _SHOWN else ""
        raise ConfigError(
            [
                f"all ranks must have the same configuration: on rank {rank_zero_first.rank} on "
                f"{_host()} {', '.join(differing[:_SHOWN])} as on rank 0 on {host}{more}; start "
                "all hosts with the same options, recipe and packages, or give these options"
            ]
        )


def _compared(config: Config) -> dict[str, str]:
    values = to_dict(config)
    compared = {}
    for name in OPTIONS:
        section, _, field = name.rpartition(".")
        if name not in _MAY_DIFFER:
            compared[name] = text_of((values[section] if section else values)[field])
    return compared


def _host() -> str:
    return socket.gethostname()
