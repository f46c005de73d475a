"""From a configuration to the engine's GPT model: specs, submodules, initial weights."""
