"""Write the tensors of a checkpoint: each rank its share, in its process or in one beside it.

The engine plans who writes what and writes the entries of a file. How a rank's file is written and
what becomes of its results is here: the engine's own way starts two processes a file and a manager,
waits for ever when one of them is killed, and knows no reason.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import queue
import socket
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from megapoly.checkpoints.seal import read_back_crc
from megapoly.errors import CheckpointError
from megapoly.platform.processes import die_with_parent


class ShardFiles:
    """The files of one checkpoint at a time, ``__RANK_0.distcp``.

    Replicas are spread over the data-parallel ranks by the engine, as evenly as their sizes allow.
    Tensors must keep their names and shapes from one checkpoint to the next.
    """

    def __init__(self) -> None:
        self._strategy = _OneFileOfEachRank()
        self._spread = FullyParallelSaveStrategyWrapper(
            self._strategy,
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            do_cache_distribution=True,
        )

    def plan(self, tensors: ShardedStateDict, folder: Path) -> AsyncRequest:
        """Return what writes this rank's file, here or in another process; collective."""
        return self._spread.async_save(tensors, str(folder))

    def gather(self) -> list[Written | str] | None:
        """Return what each rank has written, or why it failed, on rank 0.

        Collective, after all ranks have written.
        """
        planned, is_first = self._strategy.planned, dist.get_rank() == 0
        # A rank may have nothing to write.
        own = planned.results.get() if planned.writer.write_buckets else Written()
        gathered: list[Any] | None = [None] * dist.get_world_size() if is_first else None
        dist.gather_object(own, gathered)
        return gathered

    def write_metadata(self, written: list[Written]) -> None:
        """Write ``.metadata``, on rank 0.

        Args:
            written: by all ranks.

        Raises:
            OSError: it cannot be written.
        """
        planned = self._strategy.planned
        planned.writer.finish(planned.metadata, [each.entries for each in written])


@dataclass
class Written:
    """What a rank has written.

    Args:
        entries: of the engine, for ``.metadata``.
        files: size and CRC-32 of each file, by name.
        host: name of its host.
    """

    entries: list[WriteResult] = field(default_factory=list)
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    host: str = field(default_factory=socket.gethostname)


class _Planned:
    """A checkpoint that is planned: what to write on this rank, and where the results go."""

    def __init__(self, writer: FileSystemWriterAsync, metadata: Metadata | None) -> None:
        self.writer, self.metadata, self.results = writer, metadata, _Results()


class _OneFileOfEachRank(TorchDistSaveShardedStrategy):
    """The engine's strategy, with one process at most and without its finalization."""

    planned: _Planned

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)

    def _get_save_and_finalize_callbacks(
        self, writer: FileSystemWriterAsync, save_state_dict_ret: tuple[Any, Metadata | None, Any]
    ) -> AsyncRequest:
        """Return the request; torch_dist's `async_save` calls it (strategies/torch.py:770)."""
        self.planned = _Planned(writer, save_state_dict_ret[1])
        _, copy_to_host, _ = writer.get_save_function_and_args()
        if not writer.write_buckets:
            return AsyncRequest(None, (), [])
        write = functools.partial(_write, [writer.transforms])
        arguments = (os.getpid(), writer.write_buckets, self.planned.results)
        return AsyncRequest(write, arguments, [], preload_fn=copy_to_host)


class _Results:
    """One object from a process to the one that forked it, which may look when the first has ended.

    A pipe would make a process wait that has more to say than the pipe holds.
    """

    def __init__(self) -> None:
        self._file: io.BufferedRandom = (
            open(os.memfd_create("results"), "w+b")  # noqa: SIM115
            if hasattr(os, "memfd_create")
            else tempfile.TemporaryFile()
        )

    def put(self, result: Written | str) -> None:
        pickle.dump(result, self._file)
        self._file.flush()

    def get(self) -> Written | str:
        """Return what was put, or the reason that there is nothing."""
        with self._file:
            self._file.seek(0)
            try:
                return pickle.load(self._file)
            except EOFError:
                return (
                    "the process that wrote the checkpoint was killed; the system kills one when "
                    "memory runs out"
                )


def _write(transforms: list[Any], rank_process: int, buckets: list[Any], results: _Results) -> None:
    """Write this rank's file, read it back, and leave the results, or the reason of a failure.

    Args:
        transforms: of the content, which the engine's function takes.
        rank_process: id of the rank's process; another one ends with it.
        buckets: path, name and content of each file, in memory of the host.
        results: where they go.
    """
    if os.getpid() != rank_process:
        die_with_parent(rank_process)
    written = Written()
    try:
        for bucket in buckets:
            entries = _write_file(transforms, bucket)
            places = [(each.storage_data.offset, each.storage_data.length) for each in entries]
            written.entries += entries
            written.files[bucket[1]] = read_back_crc(Path(bucket[0]), places)
    except Exception as error:  # torch.save has its own
        results.put(_reason(error))
    else:
        results.put(written)


def _write_file(transforms: list[Any], bucket: Any) -> list[WriteResult]:
    # The engine's queues, inside one process: it counts this file as done.
    done: queue.Queue[int] = queue.Queue()
    done.put(0)
    result: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, result, done, use_fsync=True)
    _, entries = result.get()
    if isinstance(entries, Exception):
        raise entries
    return entries


def _reason(error: BaseException) -> str:
    """Return why a file could not be written; torch repeats the system's error in other words."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is None and not isinstance(error, CheckpointError):
        return f"{type(error).__name__}: {error}"
    return str(cause or error)
