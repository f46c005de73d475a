"""Does a configuration compute the same model at every parallel layout?

Every layout trains the same few steps as one process; losses, gradient norms and all gradients, put
together from all ranks, are compared. ``megapoly check-parallel`` is the command.
"""
