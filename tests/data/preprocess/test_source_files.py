import json
import os

import pytest

from megapoly.data.preprocess.source_files import find_source_files
from megapoly.errors import DataError


@pytest.fixture
def folder(tmp_path):
    for name in (
        "b.jsonl",
        "a.json.gz",
        "sub/c.parquet",
        "sub/.hidden.jsonl",
        "README.md",
        "d.TXT",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    return tmp_path


def names(sources, folder):
    return [(str(s.path.relative_to(folder)), s.format, s.size_bytes) for s in sources]


def test_folders_patterns_and_files_in_the_order_named(folder):
    found = find_source_files([f"{folder}/sub", f"{folder}/*.json*", str(folder / "d.TXT")])
    assert names(found, folder) == [
        ("sub/c.parquet", "parquet", 13),
        ("a.json.gz", "jsonl.gz", 9),
        ("b.jsonl", "jsonl", 7),
        ("d.TXT", "txt", 5),
    ]
    assert [n[0] for n in names(find_source_files([str(folder)]), folder)] == [
        "a.json.gz",
        "b.jsonl",
        "d.TXT",
        "sub/c.parquet",
    ]


def test_settings_beside_text_are_left_out_of_a_folder(folder, caplog):
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" not in [s.path.name for s in find_source_files([str(folder)])]
    assert "1 files that end with .json are left out (tokenizer.json" in caplog.text
    found = find_source_files([f"{folder}/*.json"])
    assert names(found, folder) == [("tokenizer.json", "jsonl", 2)]


def test_a_saved_dataset_is_its_arrow_files_in_its_order(folder):
    (folder / "dataset_info.json").write_text("{}")
    entries = [{"filename": f"data-{i}.arrow"} for i in (2, 10, 1)]
    for entry in entries:
        (folder / entry["filename"]).write_text("x")
    (folder / "state.json").write_text(json.dumps({"_data_files": entries}))
    found = names(find_source_files([str(folder)]), folder)
    assert found == [(entry["filename"], "arrow", 1) for entry in entries]

    selection = {"_data_files": entries, "_indices_files": [{"filename": "i.arrow"}]}
    (folder / "state.json").write_text(json.dumps(selection))
    with pytest.raises(DataError, match="indices mapping.*flatten_indices"):
        find_source_files([str(folder)])
    for name in ("../private.arrow", "/etc/passwd", "sub/a.arrow", ".."):
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(DataError, match="must name files beside it; it names"):
            find_source_files([str(folder)])
    for content in ('{"_data_files": [3]}', "{}", "[" * 200_000):
        (folder / "state.json").write_text(content)
        with pytest.raises(DataError, match=r"state.json` must"):
            find_source_files([str(folder)])
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match="several splits.*/train, .*/test"):
        find_source_files([str(folder)])


def test_what_cannot_be_input_is_refused(folder):
    with pytest.raises(DataError, match="`.*nothing-[*]` matches none"):
        find_source_files([f"{folder}/nothing-*"])
    with pytest.raises(DataError, match="README.md` must end with one of .jsonl"):
        find_source_files([str(folder / "README.md")])
    with pytest.raises(DataError, match="b.jsonl` is named twice, also as `"):
        (folder / "link.jsonl").symlink_to(folder / "b.jsonl")
        find_source_files([str(folder / "link.jsonl"), str(folder / "b.jsonl")])
    (folder / "dangling.jsonl").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.jsonl")
    for name in ("dangling.jsonl", "pipe.jsonl"):
        with pytest.raises(DataError, match=f"{name}` must be a file"):
            find_source_files([str(folder / name)])
    (folder / "empty").mkdir()
    with pytest.raises(
        DataError, match="empty` holds no file that ends with one of .jsonl, .ndjson"
    ):
        find_source_files([str(folder / "empty")])
