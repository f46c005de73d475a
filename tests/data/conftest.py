from pathlib import Path

import pytest
from megatron.core.datasets.utils import Split

from megapoly.data.builtin import builtin_documents
from megapoly.data.samples import SamplePool, open_pool
from megapoly.data.token_files import open_token_file, write_token_file
from megapoly.data.tokenizer import Tokenizer, load_tokenizer

SEQ_LENGTH = 32


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(None)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Nine real texts of uneven length, one of them much shorter than a sample."""
    sizes = (900, 40, 1500, 2100, 7, 1200, 333, 2500, 801)
    return [d.text[:size] for d, size in zip(builtin_documents()[::40], sizes, strict=False)]


@pytest.fixture(scope="session")
def prefix(tmp_path_factory, texts, tokenizer) -> Path:
    prefix = tmp_path_factory.mktemp("tokens") / "text"
    write_token_file(prefix, texts, tokenizer)
    return prefix


@pytest.fixture
def make_pool(prefix, tokenizer, tmp_path):
    """Call ``open_pool`` on the small file, with defaults for what a test does not set."""

    def make(split: Split = Split.train, **changes) -> SamplePool:
        arguments = {
            "prefixes": [prefix],
            "seq_length": SEQ_LENGTH,
            "seed": 7,
            "tokenizer": tokenizer,
            "vocab_size": tokenizer.vocab_size,
            "eod_mask_loss": False,
            "cache_dir": tmp_path / "cache",
        }
        arguments |= changes
        token_files = [open_token_file(prefix) for prefix in arguments.pop("prefixes")]
        return open_pool(token_files, split=split, **arguments)

    return make
