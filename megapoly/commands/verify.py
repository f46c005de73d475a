"""Verify checkpoints: every byte of every file is what was written.

    megapoly verify runs/moe_tiny
    megapoly verify runs/moe_tiny/checkpoints/iter_0000100

PATH is a checkpoint `iter_*`, a run, for all of its checkpoints, or an imported checkpoint. Sizes
and CRC-32 of the files are in the checkpoint's run.json. Nothing is changed, and nothing in a
checkpoint is executed. Needs no part of the engine, and no GPU. PATH may be the URL of a run or
checkpoint in an object store, such as s3://bucket/moe_tiny, which is read there and not copied.

There is a line for each checkpoint, and one for each damaged file; with --files one for each file.

The exit status is 0 if all checkpoints are whole; 1 if a file is damaged or missing, or a
checkpoint has no sizes and CRC-32; 2 if PATH has no checkpoint, or its store cannot be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megapoly.config.command_line import Parser, path_or_url, status_of
from megapoly.errors import CheckpointError


def main(argv: Sequence[str] | None = None) -> int:
    """Verify checkpoints; the module describes the exit status."""
    options = build_parser().parse_args(argv)
    return status_of(lambda: _verify_all(options.paths, options.files))


def _verify_all(paths: Sequence[Path | str], show_files: bool) -> int:
    checkpoints = [checkpoint for path in paths for checkpoint in _checkpoints(path)]
    whole = [_verify(checkpoint, show_files) for checkpoint in checkpoints]
    return 0 if all(whole) else 1


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("verify", __doc__)
    parser.add_argument(
        "paths",
        nargs="+",
        type=path_or_url,
        metavar="PATH",
        help="checkpoint, or run with checkpoints; folder or URL",
    )
    parser.add_argument("--files", action="store_true", help="show every file")
    return parser


def _checkpoints(path: Path | str) -> Sequence[Path | str]:
    from megapoly.checkpoints.choose import is_checkpoint
    from megapoly.checkpoints.run_folder import checkpoint_names

    if isinstance(path, str):
        from megapoly.checkpoints.verify_stored import stored_checkpoints

        return stored_checkpoints(path)
    found = [path] if is_checkpoint(path) else checkpoint_names(path)
    if not found:
        raise CheckpointError(
            f"`{path}` has no checkpoint: give an `iter_*` folder, or a run with such folders in "
            "its `checkpoints`" + ("" if path.exists() else "; the path does not exist")
        )
    return found


def _verify(checkpoint: Path | str, show_files: bool) -> bool:
    """Verify a checkpoint and print what was found; return whether it is whole."""
    from megapoly.checkpoints.verify import total_bytes, verify
    from megapoly.platform.progress import bytes_bar

    console = Console(stderr=True)
    if isinstance(checkpoint, str):
        from megapoly.checkpoints.verify_stored import verify_stored

        with console.status(f"verifying {checkpoint}"):
            verdict, size = verify_stored(checkpoint)
    else:
        size = total_bytes(checkpoint)
        with bytes_bar(str(checkpoint), size, console, transient=True) as advance:
            verdict = verify(checkpoint, advance=advance)
    if verdict.damages:
        print(f"{checkpoint}: damaged")
    elif not verdict.is_sealed:
        print(f"{checkpoint}: not verified, its run.json has no sizes and CRC-32 of its files")
    else:
        print(f"{checkpoint}: whole, {len(verdict.files)} files, {size / 1e6:,.1f} MB")
    damages = dict(verdict.damages)
    for name in sorted({*damages, *(verdict.files if show_files else ())}):
        print(f"  {name} {damages.get(name, 'is whole')}")
    return verdict.is_sealed and not verdict.damages
