"""Packages that only some commands need, and the extras that install them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping

from megapoly.errors import UnavailableError

# What pip calls them, where that is not the name that is imported.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "lm_eval": "lm-eval",
    "markdown_it": "markdown-it-py",
    "megatron.core": "megatron-core",
    "opentelemetry.exporter.otlp.proto.http": "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry.sdk": "opentelemetry-sdk",
    "prometheus_client": "prometheus-client",
}
# Names that are imported, by the extra of megapoly that installs them.
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "train": ("megatron.core", "psutil", "tensorboard", "tokenizers"),
    "hf": ("accelerate", "safetensors", "transformers", "tokenizers"),
    "eval": ("datasets", "lm_eval", "tokenizers"),
    "data": ("gigatoken", "orjson", "pyarrow", "tokenizers", "zstandard"),
    "report": ("jinja2", "markdown_it", "matplotlib", "PIL", "scipy"),
    "s3": ("s3fs",),
    "watch": (
        "prometheus_client",
        "opentelemetry.sdk",
        "opentelemetry.exporter.otlp.proto.http",
    ),
}


def missing(modules: Iterable[str]) -> list[str]:
    """Return the modules that are not installed; import none."""
    return [module for module in modules if not _is_installed(module)]


def require(purpose: str, extra: str, modules: Iterable[str]) -> None:
    """Check that modules of an extra are installed, without importing them.

    Args:
        purpose: what needs them, as the beginning of a sentence: ``A report``.
        extra: that installs them.
        modules: as they are imported.

    Raises:
        UnavailableError: some are missing.
    """
    absent = missing(modules)
    if absent:
        raise unavailable(purpose, extra, absent)


def unavailable(purpose: str, extra: str, modules: Iterable[str]) -> UnavailableError:
    """Return the error that :func:`require` raises, for modules that cannot be imported."""
    return UnavailableError(f"{purpose} needs {with_remedy({extra: modules})}")


def with_remedy(absent: Mapping[str, Iterable[str]]) -> str:
    """Return the names of missing packages and the command that installs them.

    Args:
        absent: missing modules by extra.
    """
    modules = dict.fromkeys(module for group in absent.values() for module in group)
    *names, last = (DISTRIBUTIONS.get(module, module) for module in modules)
    listed = f"{', '.join(names)} and {last}" if names else last
    return f"{listed}: pip install 'megapoly[{','.join(absent)}]'"


def extra_of(module: str, preferred: Iterable[str] = ()) -> tuple[str, str] | None:
    """Return an extra that installs a module, and the module's name in :data:`EXTRAS`.

    Args:
        module: as a ``ModuleNotFoundError`` names it: ``megatron`` for ``megatron.core``.
        preferred: extras to look in first.

    Returns:
        None if no extra has the module.
    """
    for extra in (*preferred, *EXTRAS):
        for known in EXTRAS[extra]:
            if known == module or known.startswith(f"{module}."):
                return extra, known
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent, such as megatron
        return False
