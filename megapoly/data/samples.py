"""Samples of a fixed length, cut from token files by the engine's ``GPTDataset``."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from torch import Tensor
from torch.utils.data import Dataset

from megapoly.data.cache_files import built_once
from megapoly.data.token_file_checks import outside_vocabulary
from megapoly.data.token_files import TokenFile
from megapoly.data.tokenizer import Tokenizer
from megapoly.errors import DataError
from megapoly.platform.files import renamed_when_complete


class PackedDataset(GPTDataset):
    """One epoch of one token file.

    The documents are concatenated and cut into samples of ``seq_length`` tokens. The labels of a
    sample are its tokens shifted by one, so the last label of a sample is the first token of the
    next. For training, the documents are shuffled once, by the seed, and the labels after the last
    full sample, fewer than ``seq_length``, are dropped. For validation, the documents keep their
    order, and the last sample is padded with tokens whose ``loss_mask`` is zero. The first token of
    the file is never a label.

    Source: megatron/core/datasets/gpt_dataset.py (0.16.1), whose index this class builds itself:

    - the engine's order depends on the number of epochs, ours comes from
      :class:`megapoly.data.sample_order.EpochOrder`;
    - the engine builds an index on rank 0 only, so hosts that do not share a disk have none, and it
      finds an old index again after the token file was replaced, because the key has only the path;
    - helpers.cpp:178 counts validation samples in fp32, wrong above 16 million tokens.
    """

    def __init__(self, token_file: TokenFile, config: GPTDatasetConfig, split: Split):
        tokens = IndexedDataset(token_file.prefix)
        documents = np.arange(token_file.num_sequences, dtype=np.int32)
        super().__init__(tokens, token_file.fingerprint, documents, None, split, config)
        # gpt_dataset.py:229 zeroes the cached mask in place when the first sample read is a padded
        # one; every later sample would then be masked.
        self.masks_and_position_ids_are_cacheable = False

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, range]:
        """Return document order, bounds of the samples, and sample order (ascending)."""
        folder = Path(self.config.path_to_cache) / "samples" / self.unique_description_hash
        paths = [folder / "documents.npy", folder / "bounds.npy"]
        built_once(paths, folder / "sums.json", lambda: self._build_index(paths))
        documents, bounds = (np.load(path, mmap_mode="r") for path in paths)
        return documents, bounds, range(len(bounds) - 1)

    def _build_index(self, paths: list[Path]) -> None:
        documents = self.indices
        if self.index_split == Split.train:
            documents = np.random.RandomState(self.config.random_seed).permutation(documents)
        bounds = sample_bounds(
            self.dataset.sequence_lengths[documents],
            self.config.sequence_length,
            keep_partial=self.index_split == Split.valid,
        )
        _save_arrays(dict(zip(paths, (documents, bounds), strict=True)))


class SamplePool(Dataset[dict[str, Tensor]]):
    """The samples of several token files, one file after the other.

    Args:
        datasets: samples of each file.
        token_files: the files.
        vocab_size: size of the model's vocabulary.
    """

    def __init__(
        self, datasets: Sequence[PackedDataset], token_files: Sequence[TokenFile], vocab_size: int
    ):
        self.datasets = list(datasets)
        self.token_files = list(token_files)
        self.vocab_size = vocab_size
        self._starts = [0, *accumulate(len(dataset) for dataset in datasets)]

    def __len__(self) -> int:
        """Return the number of samples in one epoch."""
        return self._starts[-1]

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all files."""
        return sum(token_file.num_tokens for token_file in self.token_files)

    def __getitem__(self, index: int | None) -> dict[str, Tensor]:
        """Return one sample.

        Args:
            index: index of the sample; None: a sample that pads a batch, its ``loss_mask`` is zero.

        Returns:
            ``tokens``, ``labels``, ``position_ids``: [seq_length] int64; ``loss_mask``:
            [seq_length] fp32.

        Raises:
            DataError: a token id is outside the vocabulary.
        """
        sample: dict[str, Tensor]
        if index is None:
            sample = self.datasets[0][None]
            return sample
        file = bisect_right(self._starts, index) - 1
        sample = self.datasets[file][index - self._starts[file]]
        ids = [sample["tokens"], sample["labels"]]
        extremes = min(int(x.min()) for x in ids), max(int(x.max()) for x in ids)
        problem = outside_vocabulary(self.token_files[file], extremes, self.vocab_size)
        if problem is not None:
            raise DataError(problem)
        return sample


def open_pool(
    token_files: Sequence[TokenFile],
    split: Split,
    *,
    seq_length: int,
    seed: int,
    tokenizer: Tokenizer,
    vocab_size: int,
    eod_mask_loss: bool,
    cache_dir: str | Path,
) -> SamplePool:
    """Cut token files into samples for training or validation; see :class:`PackedDataset`.

    Args:
        token_files: checked by :func:`megapoly.data.token_file_checks.check_token_files`.
        split: ``Split.train`` or ``Split.valid``.
        seq_length: tokens in a sample.
        seed: seed of the document order, for training.
        tokenizer: tokenizer that made the files.
        vocab_size: size of the model's vocabulary.
        eod_mask_loss: mask the loss of labels that follow an end-of-document token.
        cache_dir: folder for sample indices.
    """
    # Without a blend the engine sets `mock`, which has no effect on what is used here.
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        path_to_cache=str(cache_dir),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=eod_mask_loss,
        create_attention_mask=False,
    )
    datasets = [PackedDataset(token_file, config, split) for token_file in token_files]
    return SamplePool(datasets, token_files, vocab_size)


def sample_bounds(lengths: np.ndarray, seq_length: int, *, keep_partial: bool) -> np.ndarray:
    """Compute where each sample begins in a sequence of documents.

    Sample k holds the tokens from bound k to bound k + 1, both included; the last token is only a
    label.

    Args:
        lengths: tokens of each document, in the order of reading.
        seq_length: tokens in a sample.
        keep_partial: whether the labels after the last full sample form one more sample.

    Returns:
        [samples + 1, 2]: index of the document, token inside it; the engine's ``sample_index``.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    num_labels = int(ends[-1]) - 1
    num_samples = -(-num_labels // seq_length) if keep_partial else num_labels // seq_length
    first = np.minimum(np.arange(num_samples + 1, dtype=np.int64) * seq_length, num_labels)
    document = np.searchsorted(ends, first, side="right")
    bounds = np.stack([document, first - (ends - lengths)[document]], axis=1)
    return bounds.astype(np.int32 if bounds.max() <= np.iinfo(np.int32).max else np.int64)


def _save_arrays(arrays: dict[Path, np.ndarray]) -> None:
    """Write ``.npy`` files; all of them are complete before the first is renamed."""
    with renamed_when_complete(*arrays) as temporary:
        for path, array in zip(temporary, arrays.values(), strict=True):
            with path.open("wb") as stream:
                np.save(stream, array)
