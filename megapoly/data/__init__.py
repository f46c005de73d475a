"""Text to batches: tokenizer, token files, order and loaders.

``samples``, ``loader`` and ``corpus`` import Megatron-Core's datasets; the other modules need
neither torch nor the engine.
"""
