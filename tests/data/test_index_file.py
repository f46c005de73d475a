import io

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megapoly.data.index_file import read_index, token_dtype, write_index


def chunked(values: list[int], size: int):
    return lambda: [np.array(values[i : i + size]) for i in range(0, len(values), size)]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("documents", [[], [[3]], [[5, 1], [], [7], [], [2, 2, 2]], [[4]] * 50])
@pytest.mark.parametrize("chunk", [1, 7])
def test_bytes_and_content_are_those_of_the_engine(tmp_path, dtype, documents, chunk):
    builder = IndexedDatasetBuilder(str(tmp_path / "engine.bin"), dtype=dtype)
    for lengths in documents:
        builder.add_document(np.zeros(sum(lengths)), lengths)
    builder.finalize(str(tmp_path / "engine.idx"))

    stream = io.BytesIO()
    lengths = [length for document in documents for length in document]
    write_index(
        stream,
        np.dtype(dtype),
        num_sequences=len(lengths),
        num_documents=len(documents),
        lengths=chunked(lengths, chunk),
        sequences_per_document=chunked([len(document) for document in documents], chunk),
    )
    assert stream.getvalue() == (tmp_path / "engine.idx").read_bytes()

    index = read_index(tmp_path / "engine.idx")
    assert index.dtype == dtype and not index.has_modes
    assert index.lengths.tolist() == lengths
    assert index.offsets.tolist() == builder_offsets(lengths, np.dtype(dtype).itemsize)
    assert np.diff(index.document_bounds).tolist() == [len(document) for document in documents]


def builder_offsets(lengths: list[int], itemsize: int) -> list[int]:
    return [itemsize * sum(lengths[:i]) for i in range(len(lengths))]


@pytest.mark.parametrize("size", [1, 65499, 65500, 70000])
def test_type_of_a_token_is_the_engines(size):
    assert token_dtype(size) == DType.optimal_dtype(size)
