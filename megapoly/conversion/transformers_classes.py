"""The classes of transformers that a model is opened with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megapoly.conversion.architecture import MODEL_TYPE

# Of a config.json: what only the Auto classes read, and another name of `dtype`.
_NOT_ARGUMENTS = ("model_type", "auto_map", "torch_dtype")


def megapoly_classes() -> tuple[Any, Any]:
    """Configuration and model of exports, as this package has them."""
    from megapoly.conversion.remote_code.configuration_megapoly import MegapolyConfig
    from megapoly.conversion.remote_code.modeling_megapoly import MegapolyForCausalLM

    return MegapolyConfig, MegapolyForCausalLM


def class_without_remote_code(config: Mapping[str, Any]) -> Any:
    """What opens a folder without running code in it: exports by this package's class.

    Args:
        config: content of its ``config.json``.
    """
    from transformers import AutoModelForCausalLM

    return megapoly_classes()[1] if config.get("model_type") == MODEL_TYPE else AutoModelForCausalLM


def _llama() -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaConfig, LlamaForCausalLM


def _olmoe() -> tuple[Any, Any]:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    return OlmoeConfig, OlmoeForCausalLM


_CLASSES = {"llama": _llama, "olmoe": _olmoe, MODEL_TYPE: megapoly_classes}


def config_and_model_class(fields: Mapping[str, Any]) -> tuple[Any, Any]:
    """Configuration, and class of the model, of the content of a ``config.json``.

    Args:
        fields: of :func:`megapoly.conversion.architecture.hf_config`.
    """
    config_class, model_class = _CLASSES[fields["model_type"]]()
    arguments = {name: value for name, value in fields.items() if name not in _NOT_ARGUMENTS}
    return config_class(**arguments), model_class
