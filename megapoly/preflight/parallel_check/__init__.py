"""Check that a configuration computes the same model at every parallel layout.

Every layout trains the same few steps as one process; losses, gradient norms and all gradients,
assembled from all ranks, are compared. ``megapoly check-parallel`` is the command.
"""
