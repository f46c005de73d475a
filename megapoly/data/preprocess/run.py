"""One run of the preprocessor, from input files to the manifest."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from megapoly.data.manifest import Manifest, PairRecord, SourceRecord, manifest_path, read_manifest
from megapoly.data.preprocess.assemble import FinishedWork, assemble
from megapoly.data.preprocess.backend_check import choose_backend
from megapoly.data.preprocess.console_output import print_plain
from megapoly.data.preprocess.input_parts import InputPart, split_into_parts
from megapoly.data.preprocess.input_sample import sample_texts
from megapoly.data.preprocess.options import PreprocessOptions
from megapoly.data.preprocess.pool import WorkerPool
from megapoly.data.preprocess.progress import ProgressDisplay, Totals
from megapoly.data.preprocess.shards import ShardFolder
from megapoly.data.preprocess.source_files import SourceFile, find_source_files
from megapoly.data.preprocess.text_extraction import RecordRules
from megapoly.data.preprocess.tokenization import Backend, ReferenceBackend, TokenizerSettings
from megapoly.data.preprocess.tokenization import load_settings as load_tokenizer_settings
from megapoly.data.preprocess.work_folder import (
    locked,
    open_work_folder,
    plan_of,
    plan_path,
    remove_work_folder,
)
from megapoly.data.preprocess.worker import Task, Worker, WorkerConfig
from megapoly.data.token_files import pair_paths, sha256_of
from megapoly.errors import DataError
from megapoly.platform.progress import bytes_bar


@dataclass(frozen=True)
class PreprocessInputs:
    """Inputs of a run.

    Args:
        sources: input files.
        settings: tokenizer settings.
        rules: rules for a valid record.
    """

    sources: list[SourceFile]
    settings: TokenizerSettings
    rules: RecordRules


@dataclass(frozen=True)
class PreprocessResult:
    """Result of a run.

    Args:
        manifest: the manifest as written.
        tokens: number of tokens of each source.
        totals: counts of this run, without the interrupted run that it resumed.
        seconds: wall time.
        cpu_seconds: CPU time of all processes.
    """

    manifest: Manifest
    tokens: list[int]
    totals: Totals
    seconds: float
    cpu_seconds: float


def read_inputs(options: PreprocessOptions) -> PreprocessInputs:
    """Find the files and load the tokenizer.

    Raises:
        DataError: files do not exist, the tokenizer cannot be used, or a key is named twice.
    """
    if len(set(options.json_keys)) < len(options.json_keys):
        raise DataError(
            f"`--json-keys` ({' '.join(options.json_keys)}) must name every key once: each has "
            "its own pair of files."
        )
    if any("/" in key for key in options.json_keys) or not options.output_prefix.name:
        raise DataError(
            f"`--output-prefix` ({options.output_prefix}) and `--json-keys` "
            f"({' '.join(options.json_keys)}) make file names: the prefix must end with a name, "
            "and a key must not contain `/`."
        )
    sources = find_source_files(options.input)
    settings = load_tokenizer_settings(
        options.tokenizer_model,
        type_=options.tokenizer_type,
        append_eod=options.append_eod,
        include_special_tokens=options.include_special_tokens,
        split_special_tokens=options.split_special_tokens,
        vocab_file=options.vocab_file,
        merge_file=options.merge_file,
    )
    rules = RecordRules(
        options.json_keys, options.keep_empty, int(options.max_document_mib * 2**20)
    )
    return PreprocessInputs(sources, settings, rules)


def preprocess(options: PreprocessOptions, console: Console) -> PreprocessResult | None:
    """Turn text into token files.

    Finished parts of the input are kept in ``PREFIX.shards`` until the token files are complete, so
    that the same command resumes an interrupted run. The bytes do not depend on the number of
    workers.

    Args:
        options: options of the command.
        console: output for progress.

    Returns:
        The result; None if the token files of this command are already complete.

    Raises:
        DataError: the input, tokenizer or disk cannot be used, or the output exists.
        UnavailableError: a package is missing.
    """
    start = time.monotonic()
    inputs = read_inputs(options)
    may_be_complete = not options.overwrite and not options.restart
    if not options.shard_folder.is_dir() and may_be_complete and _is_complete(options, inputs):
        return None
    if not may_be_complete or not _is_complete(options, inputs):
        _check_outputs(options)
    with locked(options.shard_folder):
        if may_be_complete and _is_complete(options, inputs):  # another run has just finished it
            remove_work_folder(options.shard_folder)
            return None
        sample = sample_texts(inputs.sources, inputs.rules)
        backend, reference = choose_backend(inputs.settings, options.tokenizer_backend, sample)
        print_plain(console, f"tokenizer backend: {backend.name}")
        plan = plan_of(options, inputs.sources, inputs.settings, backend.kind)
        continued = open_work_folder(options.shard_folder, plan, restart=options.restart)
        input_bytes = sum(source.size_bytes for source in inputs.sources)
        parts = split_into_parts(inputs.sources, options.part_bytes_of(input_bytes))
        totals = _make_shards(options, inputs, parts, (backend, reference), console, continued)
        work = FinishedWork(options, inputs.sources, inputs.settings, backend.name, parts)
        print_plain(console, f"joining shards to {work.bin_bytes / 1e6:,.1f} MB")
        with bytes_bar("joining", work.bin_bytes, console, transient=True) as advance:
            manifest, tokens = assemble(work, advance=advance)
        remove_work_folder(options.shard_folder)
    return PreprocessResult(manifest, tokens, totals, time.monotonic() - start, _cpu_seconds())


def _make_shards(
    options: PreprocessOptions,
    inputs: PreprocessInputs,
    parts: Sequence[InputPart],
    backends: tuple[Backend, ReferenceBackend],
    console: Console,
    continued: bool,
) -> Totals:
    folder = ShardFolder(options.shard_folder, options.json_keys)
    shards = {part.index: folder.finished(part.index) for part in parts} if continued else {}
    is_done = {index: bool(found) and found[-1].is_last for index, found in shards.items()}
    remaining = [part for part in parts if not is_done.get(part.index)]
    if continued:
        print_plain(
            console,
            f"resuming: {len(parts) - len(remaining):,} of {len(parts):,} parts are finished",
        )
    config = WorkerConfig(
        sources=tuple(inputs.sources),
        settings=inputs.settings,
        rules=inputs.rules,
        backend=backends[0].kind,
        on_bad_line=options.on_bad_line,
        check_every=options.check_every,
        chunk_bytes=options.chunk_bytes,
        folder=options.shard_folder,
    )
    tasks = _tasks(parts, remaining)
    done_bytes = _bytes_by_source(inputs.sources, [p for p in parts if is_done.get(p.index)])
    display = ProgressDisplay(inputs.sources, done_bytes, console)
    num_workers = min(options.workers, len(tasks))
    if num_workers <= 1:
        worker = Worker(config, *backends)
        with display:
            for task in tasks:
                worker.do(task, display.report)
    else:
        with WorkerPool(config, num_workers, *backends) as pool, display:
            pool.run(tasks, display.add, tick=display.tick)
    return display.totals


def _tasks(parts: Sequence[InputPart], remaining: Sequence[InputPart]) -> list[Task]:
    """Return first the files to hash, which several parts read, since the largest takes longest."""
    read_whole = {source for part in parts for source in part.whole_sources}
    shared = {file_range.source for part in parts for file_range in part.ranges} - read_whole
    return [*sorted(shared), *remaining]


def _bytes_by_source(sources: Sequence[SourceFile], parts: Sequence[InputPart]) -> list[int]:
    """Return the approximate number of bytes of each file in some parts."""
    ranges = Counter(file_range.source for part in parts for file_range in part.ranges)
    sizes = [0] * len(sources)
    for part in parts:
        for file_range in part.ranges:
            source = sources[file_range.source]
            if source.format == "jsonl":
                sizes[file_range.source] += file_range.end - file_range.start
            elif file_range.source in part.whole_sources:
                sizes[file_range.source] = source.size_bytes
            else:
                sizes[file_range.source] += part.size_bytes // ranges[file_range.source]
    return sizes


def _is_complete(options: PreprocessOptions, inputs: PreprocessInputs) -> bool:
    """Return whether the token files are what this command would write."""
    path = manifest_path(options.output_prefix)
    if not path.is_file() or plan_path(options.shard_folder).is_file():
        return False
    manifest = read_manifest(path)
    backend = manifest.tokenizer.backend if manifest.tokenizer else ""
    return (
        manifest.arguments == options.arguments()
        and manifest.tokenizer == inputs.settings.record(backend)
        and len(manifest.sources) == len(inputs.sources)
        and all(map(_is_same_source, manifest.sources, inputs.sources))
        and all(_has_size(options, record) for record in manifest.pairs)
    )


def _is_same_source(record: SourceRecord, source: SourceFile) -> bool:
    """Return whether a file is the manifest's; if the times differ, compare the content."""
    if (record.path, record.size_bytes) != (str(source.path), source.size_bytes):
        return False
    return record.modified_ns == source.modified_ns or record.sha256 == sha256_of(source.path)


def _has_size(options: PreprocessOptions, record: PairRecord) -> bool:
    paths = pair_paths(options.output_prefix.with_name(record.name))
    sizes = [path.stat().st_size if path.is_file() else -1 for path in paths]
    return sizes == [record.bin_bytes, record.idx_bytes]


def _check_outputs(options: PreprocessOptions) -> None:
    """Raise an error instead of replacing the token files of another command."""
    if options.overwrite or plan_path(options.shard_folder).is_file():
        return
    paths = [manifest_path(options.output_prefix)]
    paths += [path for key in options.json_keys for path in pair_paths(options.pair_prefix(key))]
    existing = [str(path) for path in paths if path.exists()]
    if existing:
        raise DataError(
            f"`--output-prefix` must not name token files that exist: {', '.join(existing)}, made "
            "by another command or from other input. Choose another prefix, or replace them with "
            "--overwrite."
        )


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of all child processes that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
