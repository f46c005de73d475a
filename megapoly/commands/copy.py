"""Copy a checkpoint to an object store, or from one, verified.

    megapoly copy runs/moe_tiny s3://bucket/moe_tiny
    megapoly copy s3://bucket/moe_tiny runs/moe_tiny

One of SOURCE and TARGET is a folder, the other a URL of fsspec: s3://, gs://, az://, file:// and
others, whose packages (s3fs, gcsfs, adlfs) are installed separately and read their usual settings.
SOURCE is a run, whose newest checkpoint is copied, or a checkpoint `iter_*`; TARGET is a run. In a
store a run has the same names as in a folder: URL/checkpoints/iter_0000100.

Every byte is verified by run.json, before copying to a store and after copying from one; run.json
is written last. A checkpoint that the store has already is not copied again.

The exit status is 0 if TARGET has the checkpoint; 2 otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megapoly.config.command_line import Parser
from megapoly.errors import CheckpointError, MegapolyError


def main(argv: Sequence[str] | None = None) -> int:
    """Copy a checkpoint; the module describes the exit status."""
    options = build_parser().parse_args(argv)
    try:
        print(_copy(options.source, options.target))
    except MegapolyError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("copy", __doc__)
    parser.add_argument("source", metavar="SOURCE", help="run or checkpoint, folder or URL")
    parser.add_argument("target", metavar="TARGET", help="run, URL or folder")
    return parser


def _copy(source: str, target: str) -> Path | str:
    from megapoly.checkpoints.object_store import download, upload
    from megapoly.platform.stores import is_url

    if is_url(source) == is_url(target):
        raise CheckpointError(
            f"one of SOURCE ({source}) and TARGET ({target}) must be a URL, such as "
            "s3://bucket/run, and the other a folder"
        )
    with Console(stderr=True).status("") as status:

        def show(file: str) -> None:
            status.update(f"copying {file}")

        if is_url(source):
            return download(source, Path(target), show)
        return upload(_checkpoint(Path(source)), target, show)


def _checkpoint(path: Path) -> Path:
    from megapoly.checkpoints.choose import is_checkpoint, newest_whole

    found = path if is_checkpoint(path) else newest_whole(path)
    if found is None:
        raise CheckpointError(
            f"{path} has no checkpoint: give an `iter_*` folder, or a run with such folders"
        )
    return found
