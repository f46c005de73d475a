"""A package of the extra ``data`` that is missing is named in one sentence with its remedy."""

import sys

import numpy as np
import pytest
from test_tokenization import settings_of

from megapoly.data.preprocess.columnar import num_row_groups
from megapoly.data.preprocess.jsonl import read_compressed
from megapoly.data.preprocess.length_histogram import write_histogram
from megapoly.data.preprocess.length_statistics import LengthStatistics
from megapoly.data.preprocess.tokenization import GigatokenBackend
from megapoly.errors import UnavailableError


def read_zst(path, rules):
    path.write_bytes(b"")
    return list(read_compressed(path, "jsonl.zst", 0, rules))


USES = {
    "zstandard": read_zst,
    "pyarrow": lambda path, rules: num_row_groups(path),
    "gigatoken": lambda path, rules: GigatokenBackend(settings_of()),
    "matplotlib": lambda path, rules: write_histogram(
        LengthStatistics([np.array([1, 2])]), "title", path
    ),
}


@pytest.mark.parametrize("package", USES)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, rules, package):
    for name in (package, f"{package}.figure"):  # figure: it may be imported already
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnavailableError) as error:
        USES[package](tmp_path / "file", rules)
    message = str(error.value)
    assert message.endswith(f" needs {package}: pip install 'megapoly[data]'")
    assert message.count(". ") == 0 and "\n" not in message
