"""From text to batches: tokenizer, token files, blends, sample order and loaders.

``samples``, ``blend``, ``loader`` and ``corpus`` import Megatron-Core's datasets; the other modules
need neither torch nor the engine.
"""
