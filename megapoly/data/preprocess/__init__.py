"""From text to token files: what ``megapoly preprocess`` runs.

Nothing here imports torch or the engine: a worker starts in a fraction of a second.
"""
