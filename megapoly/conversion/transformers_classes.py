"""Choose the transformers classes that load a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megapoly.conversion.architecture import MODEL_TYPE

# Fields of config.json that only the Auto classes read, and an alias of `dtype`.
_NOT_ARGUMENTS = ("model_type", "auto_map", "torch_dtype")


def megapoly_classes() -> tuple[Any, Any]:
    """Return this package's configuration and model classes for exports."""
    from megapoly.conversion.remote_code.configuration_megapoly import MegapolyConfig
    from megapoly.conversion.remote_code.modeling_megapoly import MegapolyForCausalLM

    return MegapolyConfig, MegapolyForCausalLM


def class_without_remote_code(config: Mapping[str, Any]) -> Any:
    """Return the class that opens a folder without running code in it.

    Args:
        config: content of the folder's ``config.json``.
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
    """Return the configuration and the model class for the content of a ``config.json``.

    Args:
        fields: result of :func:`megapoly.conversion.architecture.hf_config`.
    """
    config_class, model_class = _CLASSES[fields["model_type"]]()
    arguments = {name: value for name, value in fields.items() if name not in _NOT_ARGUMENTS}
    return config_class(**arguments), model_class
