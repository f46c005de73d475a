import gzip
import hashlib
import io
import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from rich.console import Console
from test_columnar import write_arrow
from token_data import pair_bytes, read_documents, usual_loop, write_jsonl

from megapoly.data.manifest import read_manifest
from megapoly.data.preprocess import columnar, jsonl
from megapoly.data.preprocess.options import PreprocessOptions
from megapoly.data.preprocess.shards import ShardWriter
from megapoly.data.preprocess.summary import show_summary
from megapoly.data.tokenizer import BUILTIN_TOKENIZER
from megapoly.errors import DataError


@pytest.fixture(autouse=True)
def small_reads(monkeypatch):
    monkeypatch.setattr(jsonl, "READ_BYTES", 4096)


@pytest.fixture
def expected(tmp_path, texts):
    usual_loop(texts, tmp_path / "usual")
    return pair_bytes(tmp_path / "usual")


def write_inputs(folder, texts, format_):
    """Write the texts to three files of a format, one of them with a single text."""
    parts = [texts[:50], texts[50:51], texts[51:]]
    for i, part in enumerate(parts):
        path = folder / f"part-{i}.{format_}"
        if format_ == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": part}), path, row_group_size=9)
        elif format_ == "arrow":
            write_arrow(path, pyarrow.table({"text": part}))
        else:
            content = write_jsonl(folder / "plain", part).read_bytes()
            compress = {"jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}
            pieces = [content[i : i + 3000] for i in range(0, len(content), 3000)]
            path.write_bytes(b"".join(map(compress.get(format_, bytes), pieces)))
    return folder / f"part-*.{format_}"


@pytest.mark.parametrize("format_", ["jsonl", "json", "jsonl.gz", "jsonl.zst", "parquet", "arrow"])
def test_bytes_are_those_of_the_usual_loop(run, tmp_path, texts, expected, format_):
    result = run(write_inputs(tmp_path, texts, format_), chunk_bytes=10_000)
    assert pair_bytes(tmp_path / "out_text_document") == expected
    documents = [len(texts[:50]), 1, len(texts[51:])]
    assert [source.documents for source in result.manifest.sources] == documents
    assert sorted(path.name for path in tmp_path.glob("out*")) == [
        "out.manifest.json",
        "out_text_document.bin",
        "out_text_document.idx",
    ]


def test_text_files_are_documents(run, tmp_path, texts):
    for i, text in enumerate(texts):
        (tmp_path / f"{i:03}.txt").write_bytes(text.encode())
    usual_loop(texts, tmp_path / "usual")
    run(tmp_path / "*.txt")
    assert pair_bytes(tmp_path / "out_text_document") == pair_bytes(tmp_path / "usual")


@pytest.mark.parametrize("options", [
    {"part_bytes": 777}, {"part_bytes": 1 << 30}, {"tokenizer_backend": "tokenizers"},
])  # fmt: skip
def test_bytes_do_not_depend_on_how_the_work_is_done(run, tmp_path, texts, expected, options):
    run(write_jsonl(tmp_path / "a.jsonl", texts), **options)
    assert pair_bytes(tmp_path / "out_text_document") == expected


@pytest.mark.parametrize("append_eod", [False, True])
def test_empty_documents_as_in_megatrons_tool(run, tmp_path, append_eod):
    texts = ["", "a", "", "", "b c", ""]
    write_jsonl(tmp_path / "a.jsonl", texts)
    usual_loop(texts, tmp_path / "usual", append_eod=append_eod)
    run(tmp_path / "a.jsonl", keep_empty=True, append_eod=append_eod)
    assert pair_bytes(tmp_path / "out_text_document") == pair_bytes(tmp_path / "usual")
    assert [bool(d) for d in read_documents(tmp_path / "out_text_document")] == [*map(bool, texts)]


def test_a_pair_for_each_key(run, tmp_path, texts):
    lines = [json.dumps({"title": t[:9] or "x", "text": t}) + "\n" for t in texts]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    result = run(tmp_path / "a.jsonl", json_keys=("text", "title"))
    assert [pair.name for pair in result.manifest.pairs] == [
        "out_text_document",
        "out_title_document",
    ]
    for key, part in (("text", texts), ("title", [text[:9] for text in texts])):
        usual_loop(part, tmp_path / "usual")
        assert pair_bytes(tmp_path / f"out_{key}_document") == pair_bytes(tmp_path / "usual")


def test_the_manifest_describes_bytes_and_sources(run, tmp_path, texts):
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    run(path)
    manifest = read_manifest(tmp_path / "out.manifest.json")
    (pair,), (source,) = manifest.pairs, manifest.sources
    documents = read_documents(tmp_path / "out_text_document")
    lengths = sorted(map(len, documents))
    for name in ("bin", "idx"):
        content = (tmp_path / f"out_text_document.{name}").read_bytes()
        assert getattr(pair, f"{name}_sha256") == hashlib.sha256(content).hexdigest()
        assert getattr(pair, f"{name}_bytes") == len(content)
    assert pair.documents == pair.sequences == len(texts)
    assert pair.tokens == sum(lengths)
    assert pair.highest_token_id == max(map(max, documents))
    assert pair.eod_inside == sum(document[:-1].count(0) for document in documents) > 0
    assert pair.tokens_per_document["p50"] == lengths[(len(lengths) - 1) // 2]
    assert pair.tokens_per_document["mean"] == pytest.approx(np.mean(lengths))
    assert (source.path, source.format, source.size_bytes) == (
        str(path),
        "jsonl",
        path.stat().st_size,
    )
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    tokenizer_hash = hashlib.sha256(BUILTIN_TOKENIZER.read_bytes()).hexdigest()
    assert manifest.tokenizer.sha256 == tokenizer_hash
    assert manifest.tokenizer.appends_eod and manifest.tokenizer.vocab_size == 4096
    assert manifest.arguments["input"] == [str(path)]


BAD_LINES = {
    3: (b'{"text": "a\xff"}', "invalid UTF-8"),
    40: (b'{"title": "x"}', "missing key `text`"),
    41: (b'{"text": 7}', "`text` is not a string"),
    70: (b'{"text": ""}', "empty text"),
    90: (b'{"text": "' + b"x" * (1 << 20) + b'"}', "longer than --max-document-mib"),
    95: (b"not json", "not JSON"),
}


@pytest.fixture
def bad_file(tmp_path, texts):
    """Lines from 1, some of them bad, after one good file."""
    lines = write_jsonl(tmp_path / "lines", (texts * 2)[:100]).read_bytes().splitlines()
    good = [line for i, line in enumerate(lines, 1) if i not in BAD_LINES]
    for number, (line, _) in BAD_LINES.items():
        lines[number - 1] = line
    (tmp_path / "good.jsonl").write_bytes(b"\n".join(good))
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.mark.parametrize("number", BAD_LINES)
def test_fail_names_file_line_and_reason(run, tmp_path, bad_file, number):
    lines = bad_file.read_bytes().split(b"\n")
    for other in set(BAD_LINES) - {number}:
        lines[other - 1] = b'{"text": "fine"}'
    bad_file.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=rf"bad.jsonl, line {number}: {BAD_LINES[number][1]}") as e:
        run(bad_file, max_document_mib=1, part_bytes=5000)
    assert "--on-bad-line skip" in str(e.value)
    assert not list(tmp_path.glob("out_text*")) and not (tmp_path / "out.manifest.json").exists()


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize("policy", ["skip", "quarantine"])
def test_bad_lines_are_left_out_and_counted(run, tmp_path, bad_file, policy, compression):
    if compression:
        (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(bad_file.read_bytes()))
    bad_file = tmp_path / f"bad.jsonl{compression}"
    run(tmp_path / "good.jsonl", prefix="good")
    result = run(
        bad_file, on_bad_line=policy, max_document_mib=1, part_bytes=5000, chunk_bytes=4000
    )
    assert pair_bytes(tmp_path / "out_text_document") == pair_bytes(tmp_path / "good_text_document")
    rejected = result.manifest.rejected
    assert (rejected.policy, rejected.total) == (policy, 6)
    assert rejected.by_reason == dict.fromkeys([reason for _, reason in BAD_LINES.values()], 1)
    assert [(e["source"], e["line"]) for e in rejected.examples] == [
        (str(bad_file), number) for number in BAD_LINES
    ]
    assert result.manifest.sources[0].rejected == 6
    quarantine = tmp_path / "out.quarantine.jsonl"
    assert quarantine.exists() == (policy == "quarantine")
    if quarantine.exists():
        entries = [json.loads(line) for line in quarantine.read_text().splitlines()]
        assert [entry["line"] for entry in entries] == list(BAD_LINES)
        assert [entry["bytes"] for entry in entries] == [
            len(line) for line, _ in BAD_LINES.values()
        ]
        assert entries[1]["content"] == '{"title": "x"}'
        assert entries[0]["content_base64"] and "content" not in entries[4]


def test_the_rest_of_a_truncated_file_is_one_bad_line(run, tmp_path, texts):
    content = gzip.compress(write_jsonl(tmp_path / "lines", texts).read_bytes())
    (tmp_path / "a.jsonl.gz").write_bytes(content[: len(content) // 2])
    write_jsonl(tmp_path / "b.jsonl", texts)
    with pytest.raises(DataError, match=r"a.jsonl.gz, line \d+: truncated gzip"):
        run(tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl")
    result = run(tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl", on_bad_line="skip", restart=True)
    assert result.manifest.rejected.by_reason == {"truncated gzip": 1}
    kept = result.manifest.sources[0].documents
    assert 0 < kept < len(texts)
    usual_loop(texts[:kept] + texts, tmp_path / "usual")
    assert pair_bytes(tmp_path / "out_text_document") == pair_bytes(tmp_path / "usual")


def test_token_files_that_exist_are_not_replaced(run, tmp_path, texts):
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    assert run(path) is not None
    before = pair_bytes(tmp_path / "out_text_document")
    assert run(path) is None  # the same command: nothing to do
    with pytest.raises(DataError, match="out_text_document.bin.*--overwrite"):
        run(path, append_eod=False)
    assert pair_bytes(tmp_path / "out_text_document") == before
    write_jsonl(path, texts[:-1])
    with pytest.raises(DataError, match="--overwrite"):
        run(path)
    assert run(path, overwrite=True) is not None
    assert len(read_documents(tmp_path / "out_text_document")) == len(texts) - 1


def test_another_command_does_not_resume_from_finished_shards(run, tmp_path, texts):
    write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.jsonl").write_text("bad\n")
    inputs = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="b.jsonl, line 1"):
        run(*inputs)
    assert list((tmp_path / "out.shards").glob("*.json"))
    for changes, word in (
        ({"append_eod": False}, r"arguments.*append_eod: True then, False now"),
        ({"tokenizer_backend": "tokenizers"}, "tokenizer_backend .gigatoken then, tokenizers now"),
        ({"part_bytes": 30_000}, "part_bytes"),
    ):
        with pytest.raises(DataError, match=f"differs in: {word}.*--restart"):
            run(*inputs, **changes)
    (tmp_path / "b.jsonl").write_text('{"text": "fixed"}\n')
    with pytest.raises(DataError, match="differs in: sources .2 files then, 2 now.*b.jsonl"):
        run(*inputs)
    run(*inputs, restart=True)
    assert len(read_documents(tmp_path / "out_text_document")) == len(texts) + 1
    assert not (tmp_path / "out.shards").exists()


def test_finished_shards_are_not_made_again(run, tmp_path, texts):
    write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.jsonl").write_text("bad\n")
    inputs = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    with pytest.raises(DataError):
        run(*inputs, part_bytes=5000)
    folder = tmp_path / "out.shards"
    finished = [path.with_suffix(".0.bin") for path in folder.glob("0*.json")]
    times = {path: path.stat().st_mtime_ns for path in finished}
    assert len(finished) > 5
    with pytest.raises(DataError):
        run(*inputs, part_bytes=5000)
    assert times == {path: path.stat().st_mtime_ns for path in finished}


@pytest.mark.parametrize("format_", ["jsonl.gz", "jsonl.zst", "arrow"])
def test_streams_resume_inside_a_file(run, tmp_path, texts, monkeypatch, format_):
    """Stop after every few shards; one file has many."""
    monkeypatch.setattr(columnar, "_ROWS_AT_ONCE", 3)
    usual_loop(texts * 3, tmp_path / "usual")
    write_inputs(tmp_path, texts * 3, format_)

    class Stopped(Exception):
        pass

    finish, left = ShardWriter.finish, [0]

    def finish_some(self, **values):
        shard = finish(self, **values)
        left[0] -= 1
        if left[0] == 0:
            raise Stopped
        return shard

    stops = 0
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", finish_some)
        while True:
            left[0] = 3
            try:
                run(tmp_path / f"part-*.{format_}", chunk_bytes=5_000)
                break
            except Stopped:
                stops += 1
    assert stops > 4
    assert pair_bytes(tmp_path / "out_text_document") == pair_bytes(tmp_path / "usual")


def test_lines_of_a_resumed_stream_have_their_numbers(run, tmp_path, texts):
    lines = write_jsonl(tmp_path / "lines", texts * 3).read_bytes().splitlines(keepends=True)
    lines[200] = b"bad\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
    for _ in range(2):  # the second time shards before it are finished
        with pytest.raises(DataError, match="a.jsonl.gz, line 201: not JSON"):
            run(tmp_path / "a.jsonl.gz", chunk_bytes=5_000)
    assert len(list(tmp_path.glob("out.shards/000000-*.json"))) > 3


def test_shards_that_a_finished_run_left_are_no_shards_of_another(
    run, tmp_path, texts, monkeypatch
):
    """A run is killed while it deletes its folder, whose plan is deleted first."""
    write_jsonl(tmp_path / "a.jsonl", texts)
    with monkeypatch.context() as patch:
        patch.setattr("megapoly.data.preprocess.work_folder.shutil.rmtree", lambda folder: None)
        assert run(tmp_path / "a.jsonl") is not None
    assert list((tmp_path / "out.shards").glob("*.bin"))
    assert run(tmp_path / "a.jsonl") is None
    usual_loop(texts, tmp_path / "usual", append_eod=False)
    run(tmp_path / "a.jsonl", append_eod=False, overwrite=True)
    assert pair_bytes(tmp_path / "out_text_document") == pair_bytes(tmp_path / "usual")


def test_a_key_named_twice_and_a_file_that_goes_away(run, tmp_path, texts, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(DataError, match="text text.*every key once"):
        run(path, json_keys=("text", "text"))
    monkeypatch.setattr(
        "megapoly.data.preprocess.run.sample_texts", lambda *args: path.unlink() or []
    )
    with pytest.raises(DataError, match="a.jsonl` cannot be read or written: No such file"):
        run(path)


def test_a_source_that_changed_at_its_size_is_another(run, tmp_path, texts):
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    run(path)
    os.utime(path)
    assert run(path) is None  # the content decides
    path.write_text(path.read_text().replace("the", "thy"))
    with pytest.raises(DataError, match="--overwrite"):
        run(path)


def test_a_source_that_changes_during_a_run_is_noticed(run, tmp_path, texts, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    monkeypatch.setattr(
        "megapoly.data.preprocess.run.sample_texts", lambda *args: os.utime(path, (1, 1)) or ["a"]
    )
    with pytest.raises(DataError, match="a.jsonl` must not change during a run"):
        run(path)
    assert not list(tmp_path.glob("out_text*"))


def test_another_end_of_document_is_another_run(run, tmp_path, texts):
    content = json.loads(BUILTIN_TOKENIZER.read_text())
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_text(json.dumps(content))
    write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.jsonl").write_text("bad\n")
    inputs, options = (tmp_path / "a.jsonl", tmp_path / "b.jsonl"), {"tokenizer_model": str(model)}
    with pytest.raises(DataError, match="b.jsonl, line 1"):
        run(*inputs, **options)
    (model / "tokenizer_config.json").write_text('{"eos_token": "!"}')
    with pytest.raises(DataError, match="differs in: tokenizer, added_ids"):
        run(*inputs, **options)
    run(inputs[0], prefix="done", **options)
    (model / "tokenizer_config.json").write_text('{"eos_token": "?"}')
    with pytest.raises(DataError, match="--overwrite"):
        run(inputs[0], prefix="done", **options)


def test_keys_with_half_a_surrogate_pair_reach_the_report(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"\\ud800": 1}\n{"text": "x"}\n')
    for policy in ("skip", "quarantine"):
        result = run(tmp_path / "a.jsonl", on_bad_line=policy, prefix=policy)
        assert result.manifest.rejected.total == 1
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    assert (tmp_path / "quarantine.quarantine.jsonl").is_file()
    run(tmp_path / "a.jsonl", prefix="quarantine", overwrite=True)
    assert not (tmp_path / "quarantine.quarantine.jsonl").exists()


def test_tables_without_rows_and_files_by_two_kinds_of_path(run, tmp_path, texts, monkeypatch):
    empty = pyarrow.schema([("text", pyarrow.string())]).empty_table()
    with pyarrow.parquet.ParquetWriter(tmp_path / "empty.parquet", empty.schema):
        pass
    write_jsonl(tmp_path / "a.jsonl", texts[:3])
    monkeypatch.chdir(tmp_path)
    result = run("empty.parquet", tmp_path / "a.jsonl")
    assert [source.documents for source in result.manifest.sources] == [0, 3]
    console = Console(record=True, width=200, file=io.StringIO())
    options = PreprocessOptions(input=("a",), output_prefix=tmp_path / "br[a]ck")
    show_summary(options, result, console)
    text = console.export_text()
    assert "empty.parquet" in text and "br[a]ck.manifest.json" in text


@pytest.mark.parametrize("part_bytes", [16, 20, 4096])
def test_a_byte_order_mark_in_a_part_of_its_own(run, tmp_path, part_bytes):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n')
    run(tmp_path / "a.jsonl", part_bytes=part_bytes)
    assert len(read_documents(tmp_path / "out_text_document")) == 2
