"""The order in which samples are visited."""

from __future__ import annotations

import numpy as np


class EpochOrder:
    """A new permutation of the samples in every epoch.

        sample i  ->  permutation(seed, i // N)[i % N]

    It depends on nothing else: not on the length of training, the batch size or the layout.
    ``numpy.random.RandomState`` is used because numpy guarantees its stream for ever; a run resumed
    under another numpy goes on in the same order.

    Args:
        num_samples: N, samples in one epoch.
        seed: in [0, 2**32).
    """

    def __init__(self, num_samples: int, seed: int):
        assert num_samples > 0
        self.num_samples = num_samples
        self.seed = seed
        self._permutations: dict[int, np.ndarray] = {}

    def __getitem__(self, index: int) -> int:
        """Return which of the N samples stands at place ``index`` of the endless sequence."""
        epoch, place = divmod(index, self.num_samples)
        return int(self._permutation(epoch)[place])

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            # A batch may lie across the border of two epochs: keep the one before.
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            permutation = np.random.RandomState([self.seed, epoch]).permutation(self.num_samples)
            narrow = self.num_samples <= np.iinfo(np.uint32).max
            self._permutations[epoch] = permutation.astype(np.uint32 if narrow else np.int64)
        return self._permutations[epoch]
