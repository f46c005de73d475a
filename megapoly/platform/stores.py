"""Object stores: ``s3://``, ``gs://`` and every other URL that fsspec opens."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from megapoly.errors import MegapolyError, UnavailableError
from megapoly.platform.extras import EXTRAS, with_remedy
from megapoly.platform.locks import at_most, locked

# Clients of stores try a server that is silent again and again, for many minutes.
FIRST_ANSWER_S = 60.0
LOCK_LIMIT_S = 3600.0
# What fsspec's packages call the version of a file.
_VERSIONS = ("generation", "ETag", "etag", "mtime", "last_modified", "LastModified", "created")
_answering: set[str] = set()  # buckets that have answered this process


def is_url(place: str | Path) -> bool:
    """Return whether a place is in a store, and not a file or folder."""
    return "://" in str(place)


def why_not_opened(url: str) -> str:
    """Return why no installed package opens a URL, as a sentence; empty if one does.

    The package is not imported, and the store not asked.
    """
    # Here and not above: importing fsspec takes a quarter of a second, and most runs need none.
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0].split("::")[0]
    if protocol not in known_implementations:
        return f"fsspec knows no stores of `{protocol}://`"
    module = known_implementations[protocol]["class"].partition(".")[0]
    if importlib.util.find_spec(module) is not None:
        return ""
    absent = {extra: [module] for extra, modules in EXTRAS.items() if module in modules}
    return f"`{protocol}://` needs " + (
        with_remedy(absent) if absent else f"{module}: pip install {module}"
    )


def open_store(url: str, kind: type[MegapolyError]) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path of the URL in it.

    The first URL of a bucket is asked for, so that later calls find the store reachable.

    Args:
        url: of a file or folder, which need not exist.
        kind: of the error.

    Raises:
        UnavailableError: the package for this kind of store is not installed.
        MegapolyError: of ``kind``; the store refuses, or does not answer within 60 s.
    """
    if problem := why_not_opened(url):
        raise UnavailableError(f"{url}: {problem}")
    import fsspec

    with store_errors(url, kind):
        store, path = fsspec.url_to_fs(url)
        store.invalidate_cache()  # listings of earlier calls
        bucket = "/".join(url.split("/")[:3])
        if bucket not in _answering:
            _answer(url, kind, lambda: store.exists(path))
            _answering.add(bucket)
    return store, path.rstrip("/")


def cache_folder() -> Path:
    """Return the folder for copies: ``megapoly`` in ``XDG_CACHE_HOME``, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megapoly"


@contextlib.contextmanager
def sole_process(folder: Path, kind: type[MegapolyError]) -> Iterator[None]:
    """Hold the lock of a folder for copies; wait at most an hour for another process that does.

    Raises:
        MegapolyError: of ``kind``; the other process holds it for longer.
    """
    path = folder / ".lock"

    def refusal(file: IO[str]) -> MegapolyError:
        return kind(
            f"another process has copied from a store for {LOCK_LIMIT_S:g} s and holds {path}; "
            "wait until it ends, or stop it"
        )

    with contextlib.ExitStack() as held:
        # A file system without locks, or that takes none: a copy is complete or not there.
        with contextlib.suppress(OSError):
            held.enter_context(locked(path, at_most(LOCK_LIMIT_S, refusal)))
        yield


def path_below(folder: Path, url: str) -> Path:
    """Return the path in a folder that stands for a URL: ``FOLDER/s3/bucket/run``."""
    scheme, _, place = url.partition("://")
    parts = [part for part in PurePosixPath(place).parts if part not in ("/", "..")]
    return folder.joinpath(scheme, *parts)


def file_version(info: dict[str, Any]) -> str:
    """Return what changes when a file in a store is replaced, besides its size.

    Args:
        info: of the file, from fsspec's ``info``.
    """
    return next((f"{key} {info[key]}" for key in _VERSIONS if info.get(key)), "")


@contextlib.contextmanager
def store_errors(url: str, kind: type[MegapolyError]) -> Iterator[None]:
    """Turn what a store raises into a sentence with the URL; each kind has its own exceptions.

    Args:
        url: of the file or folder that the context uses.
        kind: of the error.
    """
    try:
        yield
    except kind as error:
        text = str(error)
        raise kind(text if url in text else f"{url}: {text}") from error
    except MegapolyError:
        raise
    except ImportError as error:
        raise UnavailableError(
            f"{url} needs a package of fsspec for its kind of store: {error}"
        ) from error
    except Exception as error:
        raise kind(f"{url}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    name, text = type(error).__name__, f"{type(error).__name__}: {error}"
    if isinstance(error, FileNotFoundError):
        return f"is not in the store ({error}); correct the URL"
    if "Credential" in name or "Auth" in name:
        return f"the store needs credentials ({text}); set those that its package reads"
    if isinstance(error, PermissionError):
        return f"the store refuses ({text}); give credentials that may read and write there"
    if "Endpoint" in name or isinstance(error, ConnectionError | TimeoutError):
        return f"the store cannot be reached ({text}); try again, or correct the address"
    return text


def _answer(url: str, kind: type[MegapolyError], ask: Callable[[], object]) -> None:
    """Call a function that asks a store; wait for it for a limited time."""
    errors: list[Exception] = []

    def call() -> None:
        try:
            ask()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(FIRST_ANSWER_S)
    if thread.is_alive():
        raise kind(
            f"{url}: the store does not answer within {FIRST_ANSWER_S:g} s; try again, or correct "
            "the address and the proxy"
        )
    if errors:
        raise errors[0]
