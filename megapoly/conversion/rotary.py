"""Read the rotary positions of a ``config.json``; name whatever the models here do not compute.

transformers 4 has them in ``rope_theta`` and ``rope_scaling``, transformers 5 in
``rope_parameters``. A file can have all three. transformers 5 then takes ``rope_scaling`` before
``rope_parameters``, and transformers 4 does not read the latter
(``modeling_rope_utils.py``, ``convert_rope_params_to_dict``). So every field that is set must ask
for the plain embedding, whichever would win.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megapoly.errors import CheckpointError

DEFAULT_BASE = 10_000.0
_FIELDS = ("rope_parameters", "rope_scaling")
_PLAIN = {
    "rope_type": ("default",),
    "type": ("default",),
    "partial_rotary_factor": (1, 1.0),
}
# Fields beside these that make attention depend on positions in another way, if they are set.
_OTHER = (
    "alibi",
    "attention_chunk_size",
    "attn_temperature_tuning",
    "global_rope_theta",
    "local_rope_theta",
    "no_rope_layer_interval",
    "rope_interleaved",
    "rope_local_base_freq",
)


def rotary_base(config: Mapping[str, Any], source: str) -> int:
    """Return the base (theta) of the rotary frequencies.

    Args:
        config: content of the file.
        source: name of the file, for messages.

    Raises:
        CheckpointError: the fields disagree, or the base is not a whole number.
    """
    given: dict[str, Any] = {
        f"{field}.rope_theta": _dict(config, field).get("rope_theta")
        for field in _FIELDS
        if _dict(config, field).get("rope_theta") is not None
    }
    if config.get("rope_theta") is not None:
        given["rope_theta"] = config["rope_theta"]
    bases = {float(value) for value in given.values()} or {DEFAULT_BASE}
    if len(bases) > 1:
        listed = ", ".join(f"`{name}` {value}" for name, value in given.items())
        raise CheckpointError(
            f"The bases of the rotary positions in {source} must agree; they are {listed}. "
            "Releases of transformers read different ones; keep the one that the model was trained "
            "with."
        )
    (base,) = bases
    if base != int(base):
        raise CheckpointError(f"`rope_theta` in {source} must be a whole number; it is {base}.")
    return int(base)


def unsupported_positions(config: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    """Return the fields that ask for other positions than the plain embedding, with their values.

    Args:
        config: content of a ``config.json``.
        max_positions: longest sequence that the model takes.
    """
    found: dict[str, Any] = {}
    for field in _FIELDS:
        if config.get(field) and not isinstance(config[field], Mapping):
            found[field] = config[field]
        for name, value in _dict(config, field).items():
            # Parameters of a scaling, or a dict for each type of layer.
            if name != "rope_theta" and value is not None and value not in _PLAIN.get(name, ()):
                found[f"{field}.{name}"] = value
    if config.get("partial_rotary_factor") not in (None, *_PLAIN["partial_rotary_factor"]):
        found["partial_rotary_factor"] = config["partial_rotary_factor"]
    found |= {name: config[name] for name in _OTHER if config.get(name)}
    if config.get("original_max_position_embeddings") not in (None, max_positions):
        found["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    window = config.get("sliding_window")
    if window and window < max_positions and config.get("use_sliding_window", True):
        found["sliding_window"] = window
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        found["layer_types"] = sorted(set(config["layer_types"]))
    if not all(config.get("no_rope_layers") or ()):  # 1: the layer has rotary positions
        found["no_rope_layers"] = config["no_rope_layers"]
    return found


def _dict(config: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    value = config.get(field)
    return value if isinstance(value, Mapping) else {}
