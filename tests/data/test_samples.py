from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.utils import Split

from megapoly.data.samples import sample_bounds
from megapoly.data.token_files import write_token_file
from megapoly.errors import DataError


def read_documents(prefix, eod: int) -> list[list[int]]:
    """Read the documents of a token file by hand: split after each end-of-document token."""
    tokens = np.fromfile(f"{prefix}.bin", np.uint16)
    ends = np.flatnonzero(tokens == eod) + 1
    return [part.tolist() for part in np.split(tokens, ends)[:-1]]


def test_training_samples_are_the_shuffled_documents(make_pool, prefix, tokenizer):
    documents = read_documents(prefix, tokenizer.eod)
    order = np.random.RandomState(7).permutation(len(documents))
    assert order.tolist() != sorted(order)
    stream = [token for i in order for token in documents[i]]

    pool = make_pool()

    assert len(pool) == (len(stream) - 1) // 32 > 50
    for k in range(len(pool)):
        assert pool[k]["tokens"].tolist() == stream[32 * k : 32 * (k + 1)]
        assert pool[k]["labels"].tolist() == stream[32 * k + 1 : 32 * (k + 1) + 1]
        assert pool[k]["position_ids"].tolist() == list(range(32))
        assert pool[k]["loss_mask"].tolist() == [1.0] * 32


def test_every_token_but_the_first_is_a_label_once_in_an_epoch(make_pool, prefix, tokenizer):
    documents = read_documents(prefix, tokenizer.eod)
    for seed in (1, 2):
        pool = make_pool(seed=seed)
        visited = [token for k in range(len(pool)) for token in pool[k]["labels"].tolist()]
        order = pool.datasets[0].document_index.tolist()
        assert sorted(order) == list(range(len(documents)))
        stream = [token for i in order for token in documents[i]]
        assert stream[1 : 1 + len(visited)] == visited
        assert len(stream) - 1 - len(visited) < 32  # an incomplete sample is dropped


def test_validation_visits_every_label_once_in_the_order_of_the_file(make_pool, prefix):
    stream = np.fromfile(f"{prefix}.bin", np.uint16).tolist()
    pool = make_pool(Split.valid)
    assert (len(stream) - 1) % 32 != 0
    # From the end: reading the padded sample first must not mask the others.
    samples = [pool[k] for k in reversed(range(len(pool)))][::-1]
    visited = [s["labels"][s["loss_mask"] == 1].tolist() for s in samples]
    assert [len(labels) for labels in visited[:-1]] == [32] * (len(pool) - 1)
    assert sum(visited, []) == stream[1:]
    assert [s["tokens"].tolist() for s in samples[:-1]] == [
        stream[32 * k : 32 * (k + 1)] for k in range(len(pool) - 1)
    ]


def test_validation_does_not_depend_on_the_seed(make_pool):
    one, other = make_pool(Split.valid, seed=1), make_pool(Split.valid, seed=2)
    assert all(torch.equal(one[k]["tokens"], other[k]["tokens"]) for k in range(len(one)))


def test_several_files_stand_one_after_the_other(make_pool, texts, tokenizer, tmp_path, prefix):
    write_token_file(tmp_path / "other", texts[::-2], tokenizer)
    first, second = make_pool(), make_pool(prefixes=[tmp_path / "other"])
    both = make_pool(prefixes=[prefix, tmp_path / "other"])
    assert len(both) == len(first) + len(second)
    expected = [first[k] for k in range(len(first))] + [second[k] for k in range(len(second))]
    for k, sample in enumerate(expected):
        assert torch.equal(both[k]["tokens"], sample["tokens"])
    with pytest.raises(IndexError):
        both[len(both)]


def test_eod_mask_loss_leaves_out_what_follows_a_document(make_pool, tokenizer):
    plain, masked = make_pool(), make_pool(eod_mask_loss=True)
    num_masked = 0
    for k in range(len(masked)):
        after_document = masked[k]["tokens"] == tokenizer.eod
        assert torch.equal(masked[k]["loss_mask"], (~after_document).float())
        assert torch.equal(masked[k]["labels"], plain[k]["labels"])
        num_masked += int(after_document.sum())
    assert num_masked > 5


def test_a_filling_sample_has_no_loss(make_pool):
    sample = make_pool()[None]
    assert sample["tokens"].shape == (32,)
    assert sample["loss_mask"].tolist() == [0.0] * 32


@pytest.mark.parametrize(("split", "needed"), [(Split.train, 33), (Split.valid, 2)])
def test_the_least_tokens_make_one_sample(make_pool, tokenizer, tmp_path, split, needed):
    text = tokenizer.decode([tokenizer.encode(" whale")[0]] * (needed - 1))
    write_token_file(tmp_path / "enough", [text], tokenizer)
    assert len(make_pool(split, prefixes=[tmp_path / "enough"])) == 1


def test_negative_ids_are_refused(make_pool, prefix, tmp_path):
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    index[17] = 3  # the type code of int16
    (tmp_path / "signed.idx").write_bytes(index)
    tokens = np.fromfile(f"{prefix}.bin", np.int16)
    tokens[:] = -2
    tokens.tofile(tmp_path / "signed.bin")
    pool = make_pool(prefixes=[tmp_path / "signed"])
    with pytest.raises(DataError, match=r"must not be negative; .*signed.bin` holds -2 \(int16\)"):
        pool[0]


def test_ids_beyond_the_vocabulary_are_refused(make_pool):
    pool = make_pool(vocab_size=300)
    with pytest.raises(DataError, match=r"vocabulary \(300\).*text.bin` holds \d+"):
        pool[0]


def test_index_is_kept_and_rebuilt_for_another_file(make_pool, texts, tokenizer, tmp_path):
    prefix = tmp_path / "text"
    write_token_file(prefix, texts, tokenizer)
    before = make_pool(prefixes=[prefix])
    indices = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    assert len(indices) == 2
    make_pool(prefixes=[prefix])
    assert indices == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.npy")}

    write_token_file(prefix, texts[:4], tokenizer)
    after = make_pool(prefixes=[prefix])
    assert len(after) < len(before)
    assert after[len(after) - 1]["tokens"].max() > 0


@pytest.mark.parametrize("seq_length", [1, 2, 7, 64])
def test_bounds_are_those_of_the_engine(seq_length):
    random = np.random.RandomState(seq_length)
    for _ in range(20):
        lengths = random.randint(1, 40, size=random.randint(3, 30)).astype(np.int32)
        order = random.permutation(len(lengths)).astype(np.int32)
        num_tokens = int(lengths.sum())
        expected = helpers.build_sample_idx(lengths, order, seq_length, 1, num_tokens, True, True)
        bounds = sample_bounds(lengths[order], seq_length, keep_partial=False)
        assert np.array_equal(bounds, expected)
        partial = sample_bounds(lengths[order], seq_length, keep_partial=True)
        assert len(partial) - 1 == -(-(num_tokens - 1) // seq_length)
        assert np.array_equal(partial[: len(bounds)], bounds)
