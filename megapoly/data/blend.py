"""The training samples of a run: several sources in fixed shares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor
from torch.utils.data import Dataset

from megapoly.data.sample_order import BlendOrder
from megapoly.data.samples import SamplePool


@dataclass(frozen=True)
class TrainingSource:
    """One source of a blend, opened.

    Args:
        name: name shown to the user.
        path: prefix or pattern from the configuration.
        share: exact share of the training samples.
        pool: samples of its token files.
    """

    name: str
    path: str
    share: Fraction
    pool: SamplePool

    @property
    def num_tokens(self) -> int:
        """Number of tokens in its files."""
        return self.pool.num_tokens

    @property
    def fingerprint(self) -> str:
        """16 digits that change with the content of its files, not with their location."""
        files = [token_file.fingerprint for token_file in self.pool.token_files]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


class Blend(Dataset[dict[str, Tensor]]):
    """Samples of several sources; the key of a sample is its source and its index in that source.

    Args:
        sources: in the order of the configuration, on which the sample order depends.
    """

    def __init__(self, sources: Sequence[TrainingSource]):
        self.sources = list(sources)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """Return a sample as :meth:`SamplePool.__getitem__` does.

        Args:
            key: index of the source, index of the sample in it.
        """
        source, index = key
        return self.sources[source].pool[index]

    def order(self, seed: int) -> BlendOrder:
        """Return the endless sequence of samples that a run with this seed trains on."""
        sizes = [len(source.pool) for source in self.sources]
        return BlendOrder(sizes, [source.share for source in self.sources], seed)

    def summary(self, run_tokens: int) -> list[str]:
        """Return the lines of a table: share and size of each source, and how often a run reads it.

        Args:
            run_tokens: tokens that the run trains on in total.
        """
        rows = [("data", "share", "tokens", "epochs of this run")]
        for source in self.sources:
            epochs = float(source.share) * run_tokens / source.num_tokens
            rows.append(
                (
                    source.name,
                    f"{float(source.share):.2%}",
                    f"{source.num_tokens:,}",
                    f"{epochs:.2f}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        name, *numbers = (f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:]))
        return ["  ".join([name, *numbers]).format(*row) for row in rows]
