import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from megapoly.config.schema import (
    BlendSource,
    Config,
    DataConfig,
    ModelConfig,
    TrainingConfig,
    ValidationSet,
)
from megapoly.data import builtin
from megapoly.data.builtin import builtin_documents
from megapoly.data.corpus import load_corpus
from megapoly.data.sample_order import EpochOrder
from megapoly.data.token_files import write_token_file
from megapoly.errors import DataError


@pytest.fixture
def make_config(prefix, tmp_path):
    def make(seq_length: int = 32, **data) -> Config:
        data = {"blend": [str(prefix)]} | data
        training = TrainingConfig(seq_length=seq_length)
        return Config(run_dir=str(tmp_path), data=DataConfig(**data), training=training)

    return make


def test_builtin_books(make_config, tokenizer, tmp_path, monkeypatch):
    documents = builtin_documents()[:25]
    monkeypatch.setattr(builtin, "builtin_documents", lambda: documents)
    corpus = load_corpus(make_config(blend=None), tokenizer=tokenizer)
    assert list(corpus.validation) == ["books"]
    (source,) = corpus.train.sources
    assert (source.name, source.share) == ("books", 1)
    assert len(source.pool) > len(corpus.validation["books"]) > 0
    held_out = next(d.text for d in documents if d.split == "validation")
    first = corpus.validation["books"][0]["tokens"].tolist()
    assert held_out.startswith(tokenizer.decode(first))
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


def test_own_files(make_config, tokenizer, prefix, tmp_path):
    assert load_corpus(make_config(), tokenizer=tokenizer).validation == {}
    named = {"a": str(prefix), "b": ValidationSet([str(prefix), str(prefix)])}
    config = make_config(validation=named, cache_dir=str(tmp_path / "elsewhere"))
    corpus = load_corpus(config, tokenizer=tokenizer)
    assert len(corpus.validation["b"]) == 2 * len(corpus.validation["a"]) > 0
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "elsewhere"}


@pytest.mark.parametrize("data", [{"blend": []}, {"blend": ["no*"]}, {"validation": {"a": []}}])
def test_empty_lists_are_refused(make_config, tokenizer, data):
    with pytest.raises(DataError, match="must name at least one"):
        load_corpus(make_config(**data), tokenizer=tokenizer)


def test_the_model_may_know_more_or_fewer_ids_than_the_tokenizer(make_config, tokenizer):
    config = make_config()
    config.model = ModelConfig(vocab_size=5000)
    assert load_corpus(config, tokenizer=tokenizer).train.sources[0].pool.vocab_size == 5000


def test_all_files_are_checked_before_the_first_index_is_built(make_config, tokenizer, prefix):
    stages = []

    def first(what, build):
        stages.append(what)
        return build()

    config = make_config(
        blend=[named(prefix, "a"), named(prefix, "b")], validation={"v": str(prefix)}
    )
    load_corpus(config, tokenizer=tokenizer, first=first)
    names = ["`a`", "`b`", "validation set `v`"]
    assert stages == [f"check the token files of {name}" for name in names] + [
        f"build the sample indices of {name}" for name in names
    ]


def test_files_are_written_in_turns_only(make_config, tokenizer, tmp_path):
    written = []

    def first(what, build):
        before = set(tmp_path.rglob("*"))
        try:
            return build()
        finally:
            written.append(len(set(tmp_path.rglob("*")) - before))
            before |= set(tmp_path.rglob("*"))

    one = load_corpus(make_config(), tokenizer=tokenizer, first=first)
    files = set(tmp_path.rglob("*"))
    assert sum(written) == len(files) > 3
    two = load_corpus(make_config(), tokenizer=tokenizer, first=first)
    assert set(tmp_path.rglob("*")) == files
    assert one.fingerprint == two.fingerprint
    assert torch.equal(one.train[0, 3]["tokens"], two.train[0, 3]["tokens"])


def named(prefix, name: str, **amount) -> BlendSource:
    return BlendSource(str(prefix), name=name, **(amount or {"epochs": 1.0}))


@pytest.fixture
def short(tmp_path, texts, tokenizer):
    """Another file, with only the first text."""
    write_token_file(tmp_path / "short", texts[:1], tokenizer)
    return tmp_path / "short"


def test_sources_are_read_for_training_and_sets_for_validation(make_config, tokenizer, prefix):
    config = make_config(validation={"v": str(prefix)})
    corpus = load_corpus(config, tokenizer=tokenizer)
    tokens = np.fromfile(f"{prefix}.bin", np.uint16)
    labels = len(tokens) - 1
    assert labels % 32 != 0  # an incomplete sample is dropped, or padded
    assert len(corpus.train.sources[0].pool) == labels // 32
    assert len(corpus.validation["v"]) == -(-labels // 32)
    assert corpus.validation["v"][0]["tokens"].tolist() == tokens[:32].tolist()
    assert corpus.train[0, 0]["tokens"].tolist() != tokens[:32].tolist()  # documents are shuffled


def test_shares_are_those_of_weights_tokens_and_epochs(make_config, tokenizer, prefix, short):
    sizes = [Path(f"{p}.bin").stat().st_size // 2 for p in (prefix, short)]

    def shares(amounts, **more):
        sources = [named(prefix, "a", **amounts[0]), named(short, "b", **amounts[1])]
        corpus = load_corpus(make_config(blend=sources, **more), tokenizer=tokenizer)
        return [source.share for source in corpus.train.sources]

    assert shares([{"weight": 0.1}, {"weight": 0.2}]) == [Fraction(1, 3), Fraction(2, 3)]
    assert shares([{"tokens": 3000}, {"tokens": 1000}]) == [Fraction(3, 4), Fraction(1, 4)]
    halves = shares([{"epochs": 0.5}, {"epochs": 3.0}])
    total = sizes[0] + 6 * sizes[1]
    assert halves == [Fraction(sizes[0], total), Fraction(6 * sizes[1], total)]
    plain = load_corpus(make_config(blend=[str(prefix), str(short)]), tokenizer=tokenizer)
    assert [s.share for s in plain.train.sources] == [Fraction(n, sum(sizes)) for n in sizes]


def test_a_share_by_epochs_may_be_too_small(make_config, tokenizer, prefix, short):
    sources = [named(prefix, "a"), named(short, "b", epochs=1e-9)]
    with pytest.raises(DataError, match="`b` has a share of 8.8e-11"):
        load_corpus(make_config(blend=sources), tokenizer=tokenizer)


def test_a_blend_reads_each_source_by_itself(make_config, tokenizer, prefix, short):
    """Samples of a blend are those of its sources alone, and a pattern is one source."""
    blend = [named(prefix, "a"), named(short, "b")]
    both = load_corpus(make_config(blend=blend), tokenizer=tokenizer).train
    for i, path in enumerate((prefix, short)):
        alone = load_corpus(make_config(blend=[str(path)]), tokenizer=tokenizer).train
        assert torch.equal(both[i, 2]["tokens"], alone[0, 2]["tokens"])
    shutil.copy(f"{prefix}.bin", short.parent / "shorts.bin")
    shutil.copy(f"{prefix}.idx", short.parent / "shorts.idx")
    (source,) = load_corpus(
        make_config(blend=[f"{short.parent}/short*"]), tokenizer=tokenizer
    ).train.sources
    assert [Path(f.prefix).name for f in source.pool.token_files] == ["short", "shorts"]
    assert source.name == "short*"
    assert len(source.pool) == sum(len(s.pool) for s in both.sources)


def test_a_lone_source_is_read_in_the_order_of_its_epochs(make_config, tokenizer, prefix):
    blend = load_corpus(
        make_config(blend=[named(prefix, "a", weight=7.0)]), tokenizer=tokenizer
    ).train
    size = len(blend.sources[0].pool)
    expected = EpochOrder(size, 1234)
    order = blend.order(1234)
    assert [order[i] for i in range(3 * size)] == [(0, expected[i]) for i in range(3 * size)]


def test_summary_says_how_often_a_run_reads_each_source(make_config, tokenizer, prefix, short):
    blend = [named(prefix, "a", weight=1.0), named(short, "long name", weight=3.0)]
    corpus = load_corpus(make_config(blend=blend), tokenizer=tokenizer)
    sizes = [Path(f"{p}.bin").stat().st_size // 2 for p in (prefix, short)]
    head, *rows = corpus.train.summary(100_000)
    assert head.split() == ["data", "share", "tokens", "epochs", "of", "this", "run"]
    assert rows[0].split() == ["a", "25.00%", f"{sizes[0]:,}", f"{25_000 / sizes[0]:.2f}"]
    assert rows[1].split()[2:] == ["75.00%", f"{sizes[1]:,}", f"{75_000 / sizes[1]:.2f}"]
    assert len({len(line) for line in (head, *rows)}) == 1


def test_fingerprint_changes_with_everything_that_changes_the_samples(
    make_config, tokenizer, tmp_path, texts, prefix, monkeypatch
):
    other = str(tmp_path / "other")
    write_token_file(other, [texts[0].replace("e", "a"), *texts[1:]], tokenizer)
    both = [named(prefix, "a", weight=1.0), named(other, "b", weight=2.0)]
    changes = [
        {},
        {"seed": 99},
        {"seq_length": 16},
        {"blend": [other]},
        {"blend": both},
        {"blend": both[::-1]},
        {"blend": [named(prefix, "a", weight=1.0), named(other, "b", weight=3.0)]},
        {"blend": [f"{tmp_path}/oth*", str(prefix)]},
    ]
    prints = [load_corpus(make_config(**c), tokenizer=tokenizer).fingerprint for c in changes]
    assert len(set(prints)) == len(changes)
    same = make_config(eod_mask_loss=True, validation={"a": [other]}, num_workers=3)
    assert load_corpus(same, tokenizer=tokenizer).fingerprint == prints[0]
    # The same content elsewhere, under another name; proportions that are the same.
    for ending in (".bin", ".idx"):
        shutil.copy(f"{prefix}{ending}", tmp_path / f"moved{ending}")
    moved = [named(tmp_path / "moved", "c", weight=0.5), named(other, "b", weight=1.0)]
    assert load_corpus(make_config(blend=moved), tokenizer=tokenizer).fingerprint == prints[4]
    monkeypatch.setattr(tokenizer, "fingerprint", "another")
    assert load_corpus(make_config(), tokenizer=tokenizer).fingerprint not in prints
