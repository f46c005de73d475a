"""Text to batches: tokenizer, token files, order and loaders.

``tokenizer`` and ``order`` need neither torch nor the engine; the other modules import
Megatron-Core's datasets.
"""
