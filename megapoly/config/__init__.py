"""Configuration: schema, recipes and command line, resolved values, rules."""

from megapoly.config.parsing import load_recipe, load_yaml, to_yaml
from megapoly.config.resolve import ffn_width, padded_vocab_size
from megapoly.config.schema import Config, ModelConfig

__all__ = [
    "Config",
    "ModelConfig",
    "ffn_width",
    "load_recipe",
    "load_yaml",
    "padded_vocab_size",
    "to_yaml",
]
