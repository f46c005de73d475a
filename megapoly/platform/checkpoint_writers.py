"""The processes that write the files of a checkpoint, for one rank."""

from __future__ import annotations

import multiprocessing
import os
import queue
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megapoly.platform.processes import die_with_parent


def write_files(
    transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: Any
) -> None:
    """Write each file in a process of its own and wait for all of them.

    Args:
        transforms: of the files' content.
        use_msc: write by the multi-storage client.
        rank: of this process; not used.
        buckets: path, name and content of each file.
        results: queue that gets one object: a dictionary from the number of a file to what was
            written, or the exception of the first file that failed.
    """
    context = multiprocessing.get_context("fork")
    writers: list[tuple[Any, Connection]] = []
    for bucket in buckets:
        receiver, sender = context.Pipe(duplex=False)
        writer = context.Process(
            target=_write_file, args=(os.getpid(), sender, transforms, use_msc, bucket)
        )
        writer.start()
        sender.close()  # also before the next fork: a writer's end is then that of its pipe
        writers.append((writer, receiver))
    written = [_result(writer, receiver, bucket) for (writer, receiver), bucket
               in zip(writers, buckets, strict=True)]  # fmt: skip
    failures = [result for result in written if isinstance(result, Exception)]
    results.put(failures[0] if failures else dict(enumerate(written)))


def _write_file(
    parent: int, sender: Connection, transforms: list[Any], use_msc: bool, bucket: Any
) -> None:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    die_with_parent(parent)
    # The engine's queues, inside one process: it counts this file as done.
    done: queue.Queue[int] = queue.Queue()
    done.put(0)
    result: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    FileSystemWriterAsync.write_preloaded_data(
        transforms, 0, bucket, result, done, use_fsync=True, use_msc=use_msc
    )
    sender.send(result.get()[1])


def _result(writer: Any, receiver: Connection, bucket: Any) -> Any:
    """Return what a writer has written, or the exception with which it failed."""
    with receiver:
        try:
            result = receiver.recv()
        except EOFError:
            result = None
    writer.join()
    if result is None:
        return OSError(
            f"the process that wrote {Path(bucket[0]).name} ended with {writer.exitcode}; the "
            "system kills a process with -9 when memory runs out"
        )
    return result
