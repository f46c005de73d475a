"""From text to token files: the implementation of ``megapoly preprocess``.

Nothing here imports torch or the engine, so that a worker starts in a fraction of a second.
"""
