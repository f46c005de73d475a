"""Progress bars and lines of the preprocessor."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megapoly.data.preprocess.console_output import print_plain
from megapoly.data.preprocess.source_files import SourceFile
from megapoly.data.preprocess.worker import WorkerProgress

_LINE_EVERY_S = 10.0
_MAX_FILES = 6


@dataclass
class Totals:
    """Counts of this run, without the interrupted run that it resumes.

    Args:
        source_bytes: bytes of the input.
        documents: documents.
        tokens: tokens.
        rejected: rejected lines.
    """

    source_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    rejected: int = 0

    def add(self, message: WorkerProgress) -> None:
        """Add a worker's progress."""
        self.source_bytes += message.source_bytes
        self.documents += message.documents
        self.tokens += message.tokens
        self.rejected += message.rejected


class ProgressDisplay:
    """A bar for the whole input and one for each file in progress; lines without a terminal.

    Args:
        sources: input files.
        finished_bytes: bytes that an interrupted run has processed, for each file.
        console: output.
    """

    def __init__(
        self, sources: Sequence[SourceFile], finished_bytes: Sequence[int], console: Console
    ):
        self.totals = Totals()
        self._sources = sources
        self._done = list(finished_bytes)
        self._finished_before = sum(finished_bytes)
        self._console = console
        self._total = sum(source.size_bytes for source in sources)
        self._start = self._last_line = time.monotonic()
        self._files: dict[int, TaskID] = {}
        # Redrawn by `tick`: a thread for it would still run when workers are forked.
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[counts]}"),
            console=console,
            auto_refresh=False,
            transient=True,
        )

    def __enter__(self) -> ProgressDisplay:
        if self._console.is_terminal:
            self._bars.start()
            self._whole = self._bars.add_task(
                f"{len(self._sources):,} files" if len(self._sources) > 1 else "1 file",
                total=self._total,
                completed=self._finished_before,
                counts="",
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def add(self, message: WorkerProgress) -> None:
        """Count and show the progress of a worker."""
        self.totals.add(message)
        self._done[message.source] += message.source_bytes
        if self._console.is_terminal:
            self._update_bars(message)

    def _update_bars(self, message: WorkerProgress) -> None:
        totals = self.totals
        counts = f"{totals.documents:,} documents, {totals.tokens:,} tokens"
        if totals.rejected:
            counts += f", {totals.rejected:,} rejected"
        self._bars.update(self._whole, advance=message.source_bytes, counts=counts)
        if len(self._sources) == 1:
            return
        source, done = self._sources[message.source], self._done[message.source]
        if message.source not in self._files:
            if len(self._files) >= _MAX_FILES:
                self._bars.remove_task(self._files.pop(next(iter(self._files))))
            name = source.path.name if len(source.path.name) <= 32 else f"…{source.path.name[-31:]}"
            self._files[message.source] = self._bars.add_task(
                f"  {escape(name)}", total=source.size_bytes, counts=""
            )
        self._bars.update(self._files[message.source], completed=done)
        if done >= source.size_bytes:
            self._bars.remove_task(self._files.pop(message.source))

    def report(self, message: WorkerProgress) -> None:
        """Count the progress of a worker, and redraw if it is time."""
        self.add(message)
        self.tick()

    def tick(self) -> None:
        """Redraw the bars; without a terminal, print a line every ten seconds."""
        if self._console.is_terminal:
            self._bars.refresh()
        elif time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._last_line = time.monotonic()
            print_plain(self._console, self._line())

    def _line(self) -> str:
        totals = self.totals
        seconds = time.monotonic() - self._start
        speed = totals.source_bytes / seconds
        done = self._finished_before + totals.source_bytes
        active = [i for i, n in enumerate(self._done) if 0 < n < self._sources[i].size_bytes]
        files = ", ".join(
            f"{self._sources[i].path.name} {self._done[i] / self._sources[i].size_bytes:.0%}"
            for i in active[:_MAX_FILES]
        )
        left = max(0, self._total - done) / speed if speed else float("inf")
        return (
            f"{done / self._total:6.1%} | {totals.documents:,} documents | "
            f"{totals.tokens:,} tokens | {speed / 1e6:.1f} MB/s | ETA {left:,.0f} s"
            + (f" | {totals.rejected:,} rejected" if totals.rejected else "")
            + (f" | {files}" if files else "")
        )
