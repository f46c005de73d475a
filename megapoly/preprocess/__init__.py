"""From text to token files: what ``tools/preprocess_data.py`` runs.

Nothing here imports torch or the engine: a worker starts in a fraction of a second.
"""
