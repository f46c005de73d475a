from contextlib import contextmanager

import pytest
import torch

from megapoly.config.schema import Config, DataConfig, ModelConfig, TrainingConfig
from megapoly.data import builtin
from megapoly.data.builtin import builtin_documents
from megapoly.data.corpus import load_corpus
from megapoly.data.token_files import write_token_file
from megapoly.errors import DataError


@pytest.fixture
def make_config(prefix, tmp_path):
    def make(seq_length: int = 32, **data) -> Config:
        data = {"train_data_path": [str(prefix)]} | data
        training = TrainingConfig(seq_length=seq_length)
        return Config(run_dir=str(tmp_path), data=DataConfig(**data), training=training)

    return make


def test_builtin_books(make_config, tokenizer, tmp_path, monkeypatch):
    documents = builtin_documents()[:25]
    monkeypatch.setattr(builtin, "builtin_documents", lambda: documents)
    corpus = load_corpus(make_config(train_data_path=None), tokenizer=tokenizer)
    assert list(corpus.validation) == ["books"]
    assert len(corpus.train) > len(corpus.validation["books"]) > 0
    held_out = next(d.text for d in documents if d.split == "validation")
    first = corpus.validation["books"][0]["tokens"].tolist()
    assert held_out.startswith(tokenizer.decode(first))
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


def test_own_files(make_config, tokenizer, prefix, tmp_path):
    assert load_corpus(make_config(), tokenizer=tokenizer).validation == {}
    named = {"a": [str(prefix)], "b": [str(prefix), str(prefix)]}
    config = make_config(valid_data_path=named, cache_dir=str(tmp_path / "elsewhere"))
    corpus = load_corpus(config, tokenizer=tokenizer)
    assert len(corpus.validation["b"]) == 2 * len(corpus.validation["a"]) > 0
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "elsewhere"}


@pytest.mark.parametrize("data", [{"train_data_path": []}, {"valid_data_path": {"a": []}}])
def test_empty_lists_are_refused(make_config, tokenizer, data):
    with pytest.raises(DataError, match="must name at least one token file"):
        load_corpus(make_config(**data), tokenizer=tokenizer)


def test_the_model_may_know_more_or_fewer_ids_than_the_tokenizer(make_config, tokenizer):
    config = make_config()
    config.model = ModelConfig(vocab_size=5000)
    assert load_corpus(config, tokenizer=tokenizer).train.vocab_size == 5000


def test_everything_is_written_by_the_process_that_goes_first(make_config, tokenizer, tmp_path):
    seen = []

    @contextmanager
    def first():
        seen.append(sorted(tmp_path.rglob("*.npy")))
        yield
        seen.append(sorted(tmp_path.rglob("*.npy")))

    one = load_corpus(make_config(), tokenizer=tokenizer, builder_first=first)
    two = load_corpus(make_config(), tokenizer=tokenizer, builder_first=first)
    assert [len(files) for files in seen] == [0, 2, 2, 2]
    assert one.fingerprint == two.fingerprint
    assert torch.equal(one.train[3]["tokens"], two.train[3]["tokens"])


def test_fingerprint_changes_with_whatever_changes_the_samples(
    make_config, tokenizer, tmp_path, texts, prefix, monkeypatch
):
    other = str(tmp_path / "other")
    write_token_file(other, [texts[0].replace("e", "a"), *texts[1:]], tokenizer)
    changes = [
        {},
        {"seed": 99},
        {"seq_length": 16},
        {"train_data_path": [other]},
        {"train_data_path": [str(prefix), other]},
        {"train_data_path": [other, str(prefix)]},
    ]
    prints = [load_corpus(make_config(**c), tokenizer=tokenizer).fingerprint for c in changes]
    assert len(set(prints)) == len(changes)
    same = make_config(eod_mask_loss=True, valid_data_path={"a": [other]}, num_workers=3)
    assert load_corpus(same, tokenizer=tokenizer).fingerprint == prints[0]
    monkeypatch.setattr(tokenizer, "fingerprint", "another")
    assert load_corpus(make_config(), tokenizer=tokenizer).fingerprint not in prints
