"""At the start of a job: one process builds files, the others wait for them.

Ranks wait on the job's key-value store and not in a collective: with a store they can say what they
wait for, for how long, and why it failed.
"""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar

import torch.distributed as dist

from megapoly.config import Config
from megapoly.errors import DataError, LostPeerError, MegapolyError, PeerError
from megapoly.platform import launcher
from megapoly.platform.locks import locked
from megapoly.training.watchdog import heartbeat

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Time between two checks of the store: short at first, later a second, which works for a thousand
# ranks. Store.wait would print two lines of C++ for each slice of the wait (torch 2.13).
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 1.0
# Rank 0 often serves the store: it stays this long for other ranks to read why it failed.
_FAREWELL_S = 10.0


class RankZeroFirst:
    """Lets one process for each disk build files before the others open them.

    A context manager. Its body calls :meth:`run` and the other methods on all ranks in the same
    order. When the body raises on one rank, the others raise with its message; ranks that wait
    raise at once. The context ends on all ranks together.

    In :meth:`run` rank 0 is first. The first process of every other host follows: on a shared disk
    it finds the files, otherwise it builds them. The other processes of a host are last. A lock in
    ``cache_dir`` keeps two processes from building there at the same time: of hosts that share a
    disk which rank 0 does not have, or of other jobs.

    Args:
        store: of the job.
        rank: of this process.
        world_size: processes of the job.
        local_rank: number of this process on its host; the ranks of a host are consecutive.
        cache_dir: where files are built.
        timeout_s: longest wait for one thing, or from one :meth:`advance` to the next.
        log_every_s: time between lines that say what a rank waits for; one process of each host
            logs them.
    """

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        local_rank: int,
        cache_dir: Path,
        timeout_s: float,
        log_every_s: float = 60.0,
    ):
        self._store = store
        self.rank, self._world_size = rank, world_size
        self._builder_of_host = rank - local_rank  # rank of its first process
        self._cache_dir = cache_dir
        self.timeout_s, self._log_every_s = timeout_s, log_every_s
        self._num_stages = 0

    @classmethod
    def of_job(cls, store: dist.Store, config: Config) -> RankZeroFirst:
        """Build from torchrun's environment and the limits of a resolved configuration."""
        return cls(
            store,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            local_rank=launcher.local_rank(),
            cache_dir=Path(config.data.cache_dir or Path(config.run_dir) / "cache"),
            timeout_s=60 * config.parallel.distributed_timeout_minutes,
        )

    def __enter__(self) -> RankZeroFirst:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._leave(error)
            return
        try:
            self._wait_for_all()
        except PeerError as found:
            self._leave(found)
            raise
        self._leave(None)

    def run(self, what: str, build: Callable[[], T], find: Callable[[], T] | None = None) -> T:
        """Call a function on every rank: first on those that build, then on the others.

        Args:
            what: what the function does, as in "waits for rank 0 to WHAT".
            build: builds the files if they do not exist, and opens them.
            find: for the others, opens what the first process of their host has built; None: as
                ``build``.

        Raises:
            PeerError: another rank failed, or was not ready in time.
        """
        stage, self._num_stages = self._num_stages, self._num_stages + 1
        if self.rank == 0:
            self._store.set("now", what)
        else:
            self._wait(lambda: self._is_set(f"done/{stage}/0"), f"rank 0 to {what}")
        if self.rank == self._builder_of_host:
            with self._lock(what):
                result = build()
            self._store.set(f"done/{stage}/{self.rank}", "")
            return result
        done = f"done/{stage}/{self._builder_of_host}"
        self._wait(lambda: self._is_set(done), f"rank {self._builder_of_host} to {what}")
        return (find or build)()

    def advance(self, what: str) -> None:
        """Say that this process, which builds, has come further; the others then wait longer.

        Args:
            what: what it begins, such as the name of a file.
        """
        self._store.add("advances", 1)
        logger.debug("rank %d begins %s", self.rank, what)

    def check_same(self, what: str, value: str) -> None:
        """Check that a value is the same as on rank 0.

        Args:
            what: what the value describes.
            value: a short text.

        Raises:
            DataError: it differs from rank 0's.
            PeerError: see :meth:`run`.
        """
        key = f"same/{what}"
        if self.rank == 0:
            self._store.set(key, value)
            return
        self._wait(lambda: self._is_set(key), f"rank 0 to open its {what}")
        theirs = self._store.get(key).decode()
        if theirs != value:
            raise DataError(
                f"All ranks must read the same {what}; on rank {self.rank} it has fingerprint "
                f"{value}, on rank 0 {theirs}. Copy the files of rank 0's host to this one."
            )

    def told(self, what: str, decide: Callable[[], str]) -> str:
        """Return on every rank what a function returns on rank 0.

        For what files decide: hosts need not see the same ones, nor at the same time.

        Args:
            what: what the function does, as in "waits for rank 0 to WHAT".
            decide: called on rank 0.

        Raises:
            PeerError: see :meth:`run`.
        """
        stage, self._num_stages = self._num_stages, self._num_stages + 1
        key = f"told/{stage}"
        if self.rank == 0:
            self._store.set("now", what)
            self._store.set(key, decide())
        else:
            self._wait(lambda: self._is_set(key), f"rank 0 to {what}")
        return self._store.get(key).decode()

    def ask_hosts(
        self, what: str, question: Callable[[], str], answer: Callable[[str], str]
    ) -> list[str]:
        """Ask the first process of every other host something about its files; all at once.

        Args:
            what: what rank 0 does, as in "waits for rank 0 to WHAT".
            question: called on rank 0.
            answer: called on the first process of every other host with what rank 0 asks, and must
                not take longer than the limit of a wait.

        Returns:
            On rank 0 the answers that are not empty, in the order in which they came.

        Raises:
            PeerError: see :meth:`run`.
        """
        asked = self.told(what, question)
        topic = f"asked/{self._num_stages}"
        if self.rank not in (0, self._builder_of_host):
            self._store.add(topic, 1)
            return []
        if self.rank != 0:
            if text := answer(asked):
                number = self._store.add(f"{topic}/answers", 1)
                self._store.set(f"{topic}/{number}", text)
            self._store.add(topic, 1)
            return []
        num_others = self._world_size - 1
        self._wait(lambda: self._store.add(topic, 0) >= num_others, "the answers of all hosts")
        num_answers = self._store.add(f"{topic}/answers", 0)
        return [self._store.get(f"{topic}/{i + 1}").decode() for i in range(num_answers)]

    def _wait(self, is_done: Callable[[], bool], for_what: str) -> None:
        begin, pause = time.monotonic(), _SHORTEST_PAUSE_S
        next_line, limit = self._log_every_s, self.timeout_s
        try:
            advances = self._store.add("advances", 0)
            while not is_done():
                heartbeat.beat()  # the rank that it waits for is watched
                self._raise_failure_of_others()
                waited = time.monotonic() - begin
                if waited > limit:
                    before, advances = advances, self._store.add("advances", 0)
                    if advances == before:
                        raise LostPeerError(self._timeout_message(waited, for_what))
                    limit = waited + self.timeout_s
                if waited > next_line:
                    next_line += self._log_every_s
                    self._log(waited, for_what)
                time.sleep(pause)
                pause = min(_LONGEST_PAUSE_S, 1.5 * pause)
        except dist.DistNetworkError as error:
            raise LostPeerError(
                f"rank {self.rank} waited for {for_what}, and the process that serves the job's "
                "store ended; see that process's own message for the reason."
            ) from error

    def _timeout_message(self, waited: float, for_what: str) -> str:
        return (
            f"rank {self.rank} waited {waited:.0f} s for {for_what}, longer than "
            f"`parallel.distributed_timeout_minutes` ({self.timeout_s / 60:g}) allows; rank 0 was "
            f"last to {self._now()}. If it is still working, raise the option; what is built until "
            "then is kept."
        )

    def _log(self, waited: float, for_what: str) -> None:
        # On the host of rank 0, which does not wait, rank 1 logs.
        if self.rank in (self._builder_of_host, 1):
            logger.warning(
                "rank %d waits for %s: %.0f s so far, at most %.0f s (rank 0 is to %s)",
                self.rank,
                for_what,
                waited,
                self.timeout_s,
                self._now(),
            )

    def _now(self) -> str:
        """Return what rank 0 began last."""
        return self._store.get("now").decode() if self._is_set("now") else "begin"

    def _is_set(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def _wait_for_all(self) -> None:
        """Wait until every rank is here."""
        self._store.set(f"ready/{self.rank}", "")
        self._store.add("ready", 1)
        if self.rank == 0:
            self._store.set("now", "wait for all ranks to open the data")
        self._wait(
            lambda: self._store.add("ready", 0) >= self._world_size,
            "all ranks to open the data",
        )

    def _raise_failure_of_others(self) -> None:
        if self._is_set("failure"):
            error = PeerError(self._store.get("failure").decode())
            error.exit_status = int(self._store.get("failure status"))
            raise error

    def _leave(self, error: BaseException | None) -> None:
        """Tell the other ranks about an error, if any; on rank 0 wait until they have read it."""
        with contextlib.suppress(dist.DistNetworkError):  # the store may be gone
            if error is not None and not self._is_set("failure"):
                self._tell(error)
            if self.rank != 0:
                self._store.add("left", 1)
            else:
                wait_for_peers(self._store, "left", self._world_size, timeout_s=_FAREWELL_S)

    def _tell(self, error: BaseException) -> None:
        brief = traceback.format_exception_only(error)
        text = str(error) if isinstance(error, MegapolyError) else "".join(brief).strip()
        if self._store.add("failures", 1) == 1:
            self._store.set("failure status", str(launcher.exit_status(error)))
            self._store.set("failure", f"rank {self.rank}: {text}")
            # The first process of a host reports errors, but it may hang and never read this one.
            if self.rank != self._builder_of_host:
                logger.error("rank %d: %s", self.rank, text)

    @contextlib.contextmanager
    def _lock(self, what: str) -> Iterator[None]:
        """Hold the lock of ``cache_dir``; the kernel releases it when its holder ends.

        A disk that has no locks or is read-only is used without: files are complete or not there.
        """

        def wait(file: IO[str], takes: Callable[[], bool]) -> None:
            self._wait(takes, f"another process that builds in {self._cache_dir}, to {what}")

        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):
                held.enter_context(locked(self._cache_dir / ".lock", wait))
            yield


def wait_for_peers(store: dist.Store, key: str, num_ranks: int, *, timeout_s: float) -> None:
    """Count this rank in the store, and wait until ``num_ranks`` ranks are counted.

    For ranks that are about to end: rank 0 may serve the store, and a launcher ends all processes
    as soon as one has ended with an error, before the others have reported theirs.

    Args:
        store: of the job; it may be gone.
        key: of the counter.
        num_ranks: ranks to wait for, including this one.
        timeout_s: longest wait.
    """
    deadline = time.monotonic() + timeout_s
    with contextlib.suppress(dist.DistNetworkError):
        store.add(key, 1)
        while store.add(key, 0) < num_ranks and time.monotonic() < deadline:
            time.sleep(_SHORTEST_PAUSE_S)
