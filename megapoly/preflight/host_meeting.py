"""The launchers of a job's hosts meet before torchrun starts, which would wait without a word."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass

import torch.distributed as dist

from megapoly.errors import PeerError
from megapoly.platform import launcher
from megapoly.platform.meeting import (
    answers,
    open_store,
    wait,
    wait_for_all,
    wait_for_server,
)


@dataclass(frozen=True)
class HostMeeting:
    """The meeting of the launchers at the store of the first host.

    Args:
        host: name or address of the first host.
        port: of the store.
        option: of the command line that has the address.
        number: of this host, from 0.
        num_hosts: of the job.
    """

    host: str
    port: int
    option: str
    number: int
    num_hosts: int

    def join(self, limit_s: float) -> dist.Store:
        """Return the store when the launchers of all hosts have joined it.

        A launcher that was started again, while others of the job that it belonged to have not
        ended, finds its number taken. It waits until the first of them has ended and been started
        again, too.

        Args:
            limit_s: longest wait.

        Raises:
            PeerError: launchers are missing, or another one has this number, for longer than that.
        """
        deadline = time.monotonic() + limit_s
        while True:
            store = self._open(deadline - time.monotonic())
            key = f"host/{self.number}"
            if store.add(f"{key}/launchers", 1) == 1:
                store.set(key, socket.gethostname())
                self._wait_for_all(store, limit_s, deadline - time.monotonic())
                return store
            holder = store.get(key).decode()
            del store
            self._wait_for_end(holder, limit_s, deadline - time.monotonic())

    def _open(self, remaining_s: float) -> dist.Store:
        if self.number > 0:
            who = "the launcher of host 0"
            wait_for_server(self.host, self.port, who, self.option, max(0.0, remaining_s))
        where = f"`{self.option}` ({self.host}:{self.port})"
        store = open_store(
            self.host, self.port, where, serves=self.number == 0, limit_s=max(1.0, remaining_s)
        )
        return dist.PrefixStore("megapoly", store)

    def _wait_for_end(self, holder: str, limit_s: float, remaining_s: float) -> None:
        """Wait until the job has ended whose launcher on ``holder`` has this host's number."""
        what = (
            f"the job of another launcher with `--node-rank` {self.number}, on {holder}, to end at "
            f"{self.host}:{self.port}"
        )
        if not wait(lambda: not answers(self.host, self.port), what, remaining_s, note_after_s=0.0):
            raise PeerError(
                f"another launcher has `--node-rank` {self.number}, on {holder}, and its job at "
                f"{self.host}:{self.port} has not ended in {limit_s:g} s; give each host of "
                f"`--nnodes` ({self.num_hosts}) a rank of its own, and each job another port. "
                f"{launcher.JOIN_TIMEOUT} is the limit"
            )

    def _wait_for_all(self, store: dist.Store, limit_s: float, remaining_s: float) -> None:
        try:
            absent = wait_for_all(
                store, self.number, self.num_hosts, "host", remaining_s, note_after_s=2.0
            )
        except dist.DistNetworkError as error:
            raise PeerError(
                f"host {self.number} waited for the other hosts, and the launcher of host 0 ended; "
                "see its own message for the reason"
            ) from error
        if absent:
            raise PeerError(
                f"host {self.number} waited {limit_s:g} s for the {self.num_hosts} hosts of "
                f"`--nnodes`, and host {absent} did not join; see why `megapoly launch` did not "
                f"start there, or correct `--nnodes`. {launcher.JOIN_TIMEOUT} is the limit"
            )


class WaitingNotes:
    """Lines that say what torchrun waits for, where it meets other hosts by itself.

    Args:
        for_what: as in "waits for WHAT".
        limit_s: longest wait.
    """

    def __init__(self, for_what: str, limit_s: float) -> None:
        self._is_over = threading.Event()
        arguments = (self._is_over.is_set, for_what, limit_s)
        kwargs = {"note_after_s": 0.0}
        threading.Thread(target=wait, args=arguments, kwargs=kwargs, daemon=True).start()

    def end(self) -> None:
        """Write no more lines."""
        self._is_over.set()
