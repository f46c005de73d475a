import argparse

import matplotlib.image
import numpy as np
import pytest
from token_data import read_documents, write_jsonl

from megapoly.data.index_file import read_index
from megapoly.data.preprocess import inspect_pair
from megapoly.data.preprocess.inspect_pair import read_documents as read_beginnings
from megapoly.data.preprocess.length_histogram import histogram_lines, length_histogram
from megapoly.data.preprocess.length_statistics import LengthStatistics
from megapoly.data.tokenizer import BUILTIN_TOKENIZER
from megapoly.errors import DataError


@pytest.fixture
def pair(run, tmp_path, texts):
    run(write_jsonl(tmp_path / "a.jsonl", ["", *texts[:40], ""]), keep_empty=True)
    return tmp_path / "out_text_document"


@pytest.mark.parametrize("max_tokens", [5, 100_000])
def test_documents_are_those_that_the_engine_reads(pair, max_tokens):
    index = read_index(pair.with_name("out_text_document.idx"))
    expected = read_documents(pair)
    numbers = [3, 0, -1, 41, -42, 20]
    found = read_beginnings(pair, index, numbers, max_tokens)
    assert [document.number for document in found] == [3, 0, 41, 41, 0, 20]
    for document, number in zip(found, numbers, strict=True):
        assert document.ids == expected[number][:max_tokens]
        assert document.num_tokens == len(expected[number])
    assert found[0].offset_bytes == 2 * sum(map(len, expected[:3]))
    for number in (42, -43):
        with pytest.raises(DataError, match=rf"{number}.*one of the 42.*0 to 41, or -1 to -42"):
            read_beginnings(pair, index, [number], 1)


def test_negative_ids_are_refused(pair):
    bin_path, idx_path = (pair.with_name(f"{pair.name}.{ending}") for ending in ("bin", "idx"))
    header = bytearray(idx_path.read_bytes())
    header[17] = 3  # the type code of int16
    idx_path.write_bytes(header)
    ids = np.fromfile(bin_path, np.int16)
    ids[2] = -7
    ids.tofile(bin_path)
    with pytest.raises(DataError, match=r"document.bin` holds -7 \(int16\)"):
        read_beginnings(pair, read_index(idx_path), [1], 9)


def run_command(capsys, *args) -> str:
    parser = argparse.ArgumentParser()
    inspect_pair.add_arguments(parser)
    assert inspect_pair.run(parser.parse_args(list(map(str, args)))) == 0
    return capsys.readouterr().out


def test_the_command_decodes(pair, texts, capsys):
    output = run_command(capsys, pair, "--document", 1, "--max-tokens", 10_000, "--ids")
    assert "document 1 of 42" in output and texts[0] + "<|endoftext|>" in output
    assert " ".join(map(str, read_documents(pair)[1])) in output
    manifest = pair.with_name("out.manifest.json")
    manifest.write_text(manifest.read_text().replace(str(BUILTIN_TOKENIZER), "/nowhere"))
    with pytest.raises(DataError, match="Name the tokenizer that made it"):
        run_command(capsys, pair, "--document", 1)
    output = run_command(capsys, pair, "--tokenizer-model", BUILTIN_TOKENIZER, "--document", 1)
    assert texts[0][:20] in output


def test_a_document_at_random_can_be_repeated(pair, capsys):
    shown = [run_command(capsys, pair, "--random", seed) for seed in (3, 3, *range(9))]
    assert shown[0] == shown[1] == shown[5]
    assert len(set(shown)) > 5


def test_what_has_no_document_or_several_pairs(run, tmp_path, capsys):
    write_jsonl(tmp_path / "e.jsonl", [])
    run(tmp_path / "e.jsonl", prefix="empty", tokenizer_backend="tokenizers")
    with pytest.raises(DataError, match="empty_text_document` must have at least one document"):
        run_command(capsys, tmp_path / "empty")
    write_jsonl(tmp_path / "k.jsonl", ["a"], title="b")
    run(tmp_path / "k.jsonl", prefix="keys", json_keys=("text", "title"))
    with pytest.raises(DataError, match="several pairs; name one of .*text.*title"):
        run_command(capsys, tmp_path / "keys")


def test_the_picture(pair, tmp_path, capsys):
    output = run_command(capsys, pair, "--histogram", tmp_path / "lengths.png")
    assert "wrote " in output and "of the tokens" in output
    assert run_command(capsys, pair, "--histogram", "-") == output[: output.index("wrote ")]
    picture = matplotlib.image.imread(tmp_path / "lengths.png")
    assert (
        picture.shape[0] > 400 and len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 9
    )


@pytest.mark.parametrize("bins_per_octave", [1, 2])
def test_bins_hold_every_document_and_token(bins_per_octave):
    random = np.random.default_rng(0)
    lengths = np.concatenate([[0, 1, 2, 3, 4, 1 << 21], random.integers(0, 5000, 500)])
    statistics = LengthStatistics()
    statistics.add(lengths)
    bins = length_histogram(statistics, bins_per_octave=bins_per_octave)
    for i, (low, high) in enumerate(zip(bins.edges[:-1], bins.edges[1:], strict=True)):
        inside = lengths[(lengths >= low) & (lengths < high)]
        assert (bins.documents[i], bins.tokens[i]) == (len(inside), inside.sum())
    assert bins.documents.sum() == len(lengths)
    if bins_per_octave == 1:
        assert bins.edges.tolist() == [0, *(2**i for i in range(23))]


def test_lines_show_bins_in_proportion():
    statistics = LengthStatistics()
    statistics.add(np.array([1] * 4 + [2, 3]))
    *_, one, two = histogram_lines(statistics)
    assert one.split() == ["1", "█" * 40, "4", "44.4%"]
    assert two.split() == ["2", "to", "3", "█" * 20, "2", "55.6%"]
