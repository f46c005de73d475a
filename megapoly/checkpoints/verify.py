"""Verify checkpoints: every byte of every file is what was written, by ``run.json``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megapoly.checkpoints.crc32 import crc32, joined
from megapoly.checkpoints.run_file import (
    NAME,
    DamageError,
    is_sealed,
    read_run_file,
    sealed_files,
    why_unreadable,
)

# A thread reads and counts one piece after another, through a buffer that stays in its cache.
_PIECE_BYTES = 16 << 20
_BUFFER_BYTES = 512 << 10
_MAX_THREADS = 8


@dataclass(frozen=True)
class Ranks:
    """The processes that verify a checkpoint together, each a share of its bytes.

    Args:
        rank: number of this process.
        num_ranks: number of processes.
        gather: returns what each process gave, in the order of ranks; collective. What it is given
            consists of lists, strings and numbers.
    """

    rank: int = 0
    num_ranks: int = 1
    gather: Callable[[Any], list[Any]] = lambda own: [own]


ALONE = Ranks()


@dataclass(frozen=True)
class Verdict:
    """What verifying a checkpoint found; the same on all ranks.

    Args:
        damages: names of damaged files, with what is wrong with each.
        is_sealed: whether ``run.json`` has sizes and CRC-32; otherwise nothing else was verified.
        files: names of the files that were verified.
    """

    damages: tuple[tuple[str, str], ...] = ()
    is_sealed: bool = True
    files: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the damages in one line."""
        shown = "; ".join(f"{file} {reason}" for file, reason in self.damages[:3])
        return shown + (f"; and {len(self.damages) - 3} more" if len(self.damages) > 3 else "")


@dataclass(frozen=True)
class _Piece:
    """Some bytes of a file."""

    file: str
    start: int
    num_bytes: int


def verify(
    folder: Path, ranks: Ranks = ALONE, advance: Callable[[int], None] = lambda num_bytes: None
) -> Verdict:
    """Compare the files of a checkpoint with its ``run.json``; collective.

    All ranks together read every byte once.

    Args:
        folder: folder of the checkpoint.
        ranks: the processes that share the work.
        advance: called with the bytes of each part that was read, from several threads.
    """
    files, verdict = _files(folder)
    pieces = _share(files, ranks.rank, ranks.num_ranks)
    counted, damages = _count(folder, files, pieces, advance)
    found = ranks.gather([list(verdict.damages) + damages, counted])
    damaged = {file: reason for of_rank, _ in reversed(found) for file, reason in of_rank}
    crcs = _joined(part for _, of_rank in found for part in of_rank)
    for file, (_, crc) in files.items():
        if file not in damaged and f"{crcs.get(file, 0):08x}" != crc:
            damaged[file] = "is damaged (another CRC-32 than when it was written)"
    return Verdict(tuple(sorted(damaged.items())), verdict.is_sealed, (NAME, *files))


def total_bytes(folder: Path) -> int:
    """Return the bytes that verifying a checkpoint reads, without ``run.json``."""
    return sum(size for size, _ in _files(folder)[0].values())


def _files(folder: Path) -> tuple[dict[str, tuple[int, str]], Verdict]:
    """Return size and CRC-32 of the files to verify, and what ``run.json`` itself shows."""
    try:
        run = read_run_file(folder)
        if not is_sealed(run):
            return {}, Verdict(is_sealed=False)
        return sealed_files(run), Verdict()
    except DamageError as error:
        return {}, Verdict(((error.file, error.reason),))


def _share(files: dict[str, tuple[int, str]], rank: int, num_ranks: int) -> list[_Piece]:
    """Return what a rank reads: a run of bytes, if all files are put in a row."""
    total = sum(size for size, _ in files.values())
    begin, end = (total * each // num_ranks for each in (rank, rank + 1))
    pieces, position = [], 0
    for file, (size, _) in files.items():
        first, last = max(begin, position), min(end, position + size)
        for start in range(first, last, _PIECE_BYTES):
            piece = _Piece(file, start - position, min(_PIECE_BYTES, last - start))
            pieces.append(piece)
        if size == 0 and rank == 0:
            pieces.append(_Piece(file, 0, 0))
        position += size
    return pieces


def _count(
    folder: Path,
    files: dict[str, tuple[int, str]],
    pieces: Sequence[_Piece],
    advance: Callable[[int], None],
) -> tuple[list[tuple[str, int, int, int]], list[tuple[str, str]]]:
    """Return (file, start, length, CRC-32) of this rank's pieces, and damaged files."""

    def count(piece: _Piece) -> int | DamageError:
        try:
            with (folder / piece.file).open("rb", buffering=0) as stream:
                crc = _crc_of_piece(stream, piece, files[piece.file][0])
        except OSError as error:
            return DamageError(piece.file, why_unreadable(error))
        except DamageError as error:
            return error
        advance(piece.num_bytes)
        return crc

    with ThreadPoolExecutor(_num_threads()) as pool:
        results = list(pool.map(count, pieces))
    counted, damages = [], {}
    for piece, result in zip(pieces, results, strict=True):
        if isinstance(result, DamageError):
            damages[result.file] = result.reason
        else:
            counted.append((piece.file, piece.start, piece.num_bytes, result))
    return counted, list(damages.items())


def _crc_of_piece(stream: IO[bytes], piece: _Piece, size: int) -> int:
    found = os.fstat(stream.fileno()).st_size
    if found != size:
        raise DamageError(piece.file, f"has {found:,} bytes, not {size:,}")
    stream.seek(piece.start)
    crc, left = 0, piece.num_bytes
    buffer = memoryview(bytearray(min(_BUFFER_BYTES, left)))
    while left:
        count = stream.readinto(buffer[: min(len(buffer), left)])  # type: ignore[attr-defined]
        if not count:
            raise DamageError(piece.file, "became shorter while it was read")
        crc, left = crc32(buffer[:count], crc), left - count
    return crc


def _joined(parts: Iterator[tuple[str, int, int, int]]) -> dict[str, int]:
    """Return the CRC-32 of each file from those of its parts."""
    crcs: dict[str, int] = {}
    for file, _, num_bytes, crc in sorted(parts, key=lambda part: part[:2]):
        crcs[file] = joined(crcs.get(file, 0), crc, num_bytes)
    return crcs


def _num_threads() -> int:
    """Return the threads of this process: the cores that it may use, at most 8.

    Ranks of one host are usually given cores of their own, or share them; more threads than cores
    cost nothing here.
    """
    return min(_MAX_THREADS, len(os.sched_getaffinity(0)))
