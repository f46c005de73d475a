"""The pre-training job: what ``megapoly train`` runs on every process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from megapoly.config import Config, to_yaml
from megapoly.config.parsing import parse
from megapoly.config.resolve import tokens_per_step
from megapoly.config.this_job import check_and_resolve
from megapoly.errors import (
    ConfigError,
    DataError,
    LaunchError,
    MegapolyError,
    PeerError,
)
from megapoly.platform import extras, launcher
from megapoly.platform.files import free_space, write_text
from megapoly.platform.logs import configure_logging
from megapoly.platform.output import train_on_without_output
from megapoly.platform.processes import die_with_parent

if TYPE_CHECKING:
    from megapoly.data.corpus import Corpus
    from megapoly.training.hooks import Hook
    from megapoly.training.rank_zero_first import RankZeroFirst
    from megapoly.training.reporter import Reporter
    from megapoly.training.run_status.recorder import StatusRecorder
    from megapoly.training.state import TrainState
    from megapoly.training.stop import StopRequest

DEFAULT_RECIPE = "moe_tiny"


def main(argv: Sequence[str], *, default_recipe: str | Path = DEFAULT_RECIPE, program: str) -> int:
    """Train as the command line says.

    Args:
        argv: arguments after the program's name.
        default_recipe: name or path of the recipe if ``argv`` has no ``--config``.
        program: name to show in the help.

    Once it trains, SIGINT, SIGTERM and SIGHUP request it to stop, and have no effect after that, up
    to the end of the process: the caller is to end it.

    Returns:
        Exit status: 0 when the run is complete or was requested to stop, 1 after another error, 2
        when the configuration, the data or a checkpoint cannot be used,
        :data:`~megapoly.platform.launcher.DIVERGED` when the loss is not finite or spikes end the
        run (one process of each host says why), :data:`~megapoly.platform.launcher.LOST_PEER` or
        ``MEGAPOLY_RESTART_STATUS`` when another process was lost. A run that hangs ends with
        :data:`~megapoly.platform.launcher.HUNG`.
    """
    if launcher.is_torchrun():
        die_with_parent()
    try:
        launcher.check(with_address=False)
    except LaunchError as error:
        print(error, file=sys.stderr)
        return 2
    is_first_of_host = launcher.local_rank() == 0
    configure_logging(is_rank_zero=launcher.rank() == 0)
    try:
        config = configure(argv, default_recipe=default_recipe, program=program)
        train_on_without_output()
        complete = pretrain(config, ends_process=True)
    except MegapolyError as error:
        # Once for each host: a file may be missing on one of them alone. A process alone may lack
        # a device, and the second one says when the first never came.
        first, second = is_first_of_host, launcher.local_rank() == 1
        of_one_process = not isinstance(error, ConfigError | PeerError)
        if not error.is_shown:
            if first:
                print(error, file=sys.stderr)
            elif of_one_process or (second and isinstance(error, PeerError)):
                print(f"rank {launcher.rank()}: {error}", file=sys.stderr)
        status = launcher.exit_status(error)
        # Under `megapoly launch` that decides whether to be started again.
        is_last_word = launcher.STATUS_FILE not in os.environ and launcher.means_restart(status)
        return launcher.restart_status(status) if is_last_word else status
    except BaseException as error:
        if getattr(error, "is_shown", False):  # by `shown_once`, with its stack trace
            return 1
        raise
    if is_first_of_host:
        launcher.tell_status(launcher.COMPLETE if complete else launcher.STOPPED)
    return 0


def configure(argv: Sequence[str], *, default_recipe: str | Path, program: str) -> Config:
    """Return the resolved configuration of this job, checked against every rule.

    ``--help``, ``--print-config`` and ``--dry-run`` print something instead, and exit; for the last
    two only rank 0 prints.

    Args:
        argv: see :func:`megapoly.config.parsing.parse`.
        default_recipe: name or path of the recipe if ``argv`` has no ``--config``.
        program: name to show in the help.

    Raises:
        ConfigError: everything that cannot be parsed, or else every broken rule and a tokenizer
            whose file exists and cannot be used.
        SystemExit: after ``--help``, ``--print-config`` or ``--dry-run``; with the exit status.
    """
    arguments = parse(argv, default_recipe=default_recipe, program=program)
    extras.require("Training", "train", extras.EXTRAS["train"])
    if arguments.dry_run is not None:
        from megapoly.preflight.planning.dry_run_command import run_command

        raise SystemExit(run_command(arguments.config, arguments.dry_run))
    # Here and not above: --help and a wrong command line answer without waiting for torch.
    from megapoly.data.tokenizer import tokenizer_vocab_size

    vocab_size, problems = None, []
    try:
        vocab_size = tokenizer_vocab_size(arguments.config.data.tokenizer)
    except DataError as error:
        problems.append(str(error))
    resolved = check_and_resolve(
        arguments.config, tokenizer_vocab_size=vocab_size, problems=problems
    )
    if arguments.print_config:
        if launcher.rank() == 0:
            print(to_yaml(resolved), end="")
        raise SystemExit(0)
    return resolved


def pretrain(config: Config, *, ends_process: bool = False) -> bool:
    """Run one job from a resolved configuration.

    Args:
        config: resolved.
        ends_process: whether the process ends after this; see
            :class:`~megapoly.training.stop.StopRequest`.

    Returns:
        Whether the run is complete; False if it was requested to stop before its last step.

    Raises:
        ConfigError: ``run_dir`` cannot be made or written to.
        LockError: another job trains in ``run_dir``.
    """
    if not launcher.is_launched():  # otherwise later, to tell the other processes
        _make(Path(config.run_dir))
    from megapoly.training.watchdog.heartbeat import watched

    with watched(config):
        return _train(config, ends_process=ends_process)


def _train(config: Config, *, ends_process: bool) -> bool:
    """Run the job from its start to its end; see :func:`pretrain`."""
    from megapoly.platform.device import select_platform

    platform = select_platform(config.training.device)
    # After the platform: these import the engine, which must find it set up.
    import torch.distributed as dist

    from megapoly.training.common_folder import check_common_folder
    from megapoly.training.distributed import is_rank_zero, model_groups, process_group
    from megapoly.training.failures import shown_once
    from megapoly.training.load_checkpoint import restore
    from megapoly.training.loop import train
    from megapoly.training.rank_zero_first import RankZeroFirst
    from megapoly.training.reporter import Reporter
    from megapoly.training.resume_notes import resume_notes
    from megapoly.training.run_status.recorder import recorded
    from megapoly.training.same_config import check_same_config
    from megapoly.training.save_notes import save_notes
    from megapoly.training.starts import note_start
    from megapoly.training.state import build_state
    from megapoly.training.stop import StopRequest
    from megapoly.training.stored_checkpoints import copy_from_stores
    from megapoly.training.watchdog import heartbeat

    with ExitStack() as held, process_group(config, platform) as store, shown_once(store):
        heartbeat.name_job(store)
        heartbeat.begin("opening of the data")
        with RankZeroFirst.of_job(store, config) as rank_zero_first:
            check_same_config(config, rank_zero_first)
            recorder = None
            if is_rank_zero():
                held.enter_context(_run_folder(config))
                recorder = held.enter_context(recorded(config))
            check_common_folder(config, rank_zero_first)
            note_start(config.run_dir, rank_zero_first)
            corpus = _open_data(config, rank_zero_first)
            copied = copy_from_stores(config, rank_zero_first)
        heartbeat.begin("building of the model")
        with model_groups(config):
            state = build_state(config, platform, corpus)
            heartbeat.begin("loading of the checkpoint")
            loaded = restore(state, copied)
            heartbeat.begin("start of the training")
            num_devices = dist.get_world_size()
            with Reporter(state, num_devices=num_devices, enabled=is_rank_zero()) as reporter:
                reporter.message(_summary(config, platform.describe(), num_devices))
                for line in _data_lines(config, corpus):
                    reporter.message(line)
                reporter.begin()
                if is_rank_zero():
                    _write_config(config, reporter)
                if loaded is not None:
                    at = f"at step {state.iteration}" if state.iteration else "its weights alone"
                    reporter.message(f"loaded {loaded}, {at}")
                    for line in resume_notes(state, loaded, num_processes=num_devices):
                        reporter.message(line)
                for line in save_notes(config, state.iteration, state.train_iters):
                    reporter.message(line)
                # Until the groups are destroyed: a request then must not look like a failure.
                stop = held.enter_context(StopRequest(ends_process=ends_process))
                train(state, reporter, build_hooks(state, reporter, stop, recorder), stop)
    return state.iteration >= state.train_iters


def _open_data(config: Config, rank_zero_first: RankZeroFirst) -> Corpus:
    """Return the data of the run, which must be the same on all ranks; collective."""
    from megapoly.data.corpus import load_corpus
    from megapoly.data.fingerprint import fingerprint_of_sets
    from megapoly.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.data.tokenizer)
    corpus = load_corpus(config, tokenizer=tokenizer, first=rank_zero_first.run)
    rank_zero_first.check_same("training data", corpus.fingerprint)
    rank_zero_first.check_same("validation data", fingerprint_of_sets(corpus.validation))
    if (questions := config.training.eval_tasks_data) is not None:
        from megapoly.evaluation.local_tasks import fingerprint_of_questions

        found = fingerprint_of_questions(Path(questions))
        rank_zero_first.check_same("set of questions", found)
    return corpus


def _make(folder: Path) -> None:
    """Make a folder if it does not exist, and check that files can be made in it."""
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn the system's reason why a folder cannot be written into a sentence."""
    try:
        yield
    except OSError as error:
        problem = (
            f"`run_dir` ({folder}) cannot be written: {error.strerror}; {free_space(folder)}; "
            "make room or choose another folder"
        )
        raise ConfigError([problem]) from error


@contextmanager
def _run_folder(config: Config) -> Iterator[None]:
    """Lock the folder for this job, and delete what a killed one left there before all else."""
    from megapoly.checkpoints.run_folder import checkpoints_folder, delete_unfinished
    from megapoly.training.run_lock import sole_job

    run_dir = Path(config.run_dir)
    _make(run_dir)
    with ExitStack() as held:
        with _explained(run_dir):
            held.enter_context(sole_job(run_dir))
            delete_unfinished(run_dir)
        if config.checkpoint.save:
            _make(checkpoints_folder(run_dir))
        yield


def _write_config(config: Config, reporter: Reporter) -> None:
    try:
        write_text(Path(config.run_dir) / "config.yaml", to_yaml(config))
    except DataError as error:  # each checkpoint has its own copy
        reporter.message(f"warning: {error}")


def build_hooks(
    state: TrainState, reporter: Reporter, stop: StopRequest, recorder: StatusRecorder | None
) -> list[Hook]:
    """Return what this run does around its steps, in this order; collective.

    Args:
        state: the run, restored.
        reporter: of its progress.
        stop: requests to stop it.
        recorder: of its status; on rank 0 alone.
    """
    import torch.distributed as dist

    from megapoly.training.distributed import is_rank_zero
    from megapoly.training.hooks import CheckpointHook, TelemetryHook, ValidationHook
    from megapoly.training.profiling import ProfileHook
    from megapoly.training.room import RoomHook
    from megapoly.training.run_status.hook import StatusHook
    from megapoly.training.starts import AdvanceHook
    from megapoly.training.stragglers import StragglerHook

    logging = state.config.logging
    checkpoints = CheckpointHook(state, reporter.message)
    hooks: list[Hook] = [AdvanceHook(checkpoints)]
    if recorder is not None:
        hooks.append(StatusHook(state, reporter, checkpoints, recorder))
    if logging.profile:  # before the others, so that the trace of a step ends with the step
        hooks.append(ProfileHook(state, reporter.message))
    if dist.get_world_size() > 1:
        hooks.append(StragglerHook(state, reporter.message))
    hooks.append(ValidationHook(state))
    if state.config.training.eval_tasks is not None:
        from megapoly.evaluation.task_scores import TaskHook

        hooks.append(TaskHook(state, checkpoints, stop))
    hooks.append(TelemetryHook(state))
    if logging.tensorboard and is_rank_zero():
        from megapoly.training.tensorboard import TensorBoardHook

        hooks.append(TensorBoardHook(state, reporter.message))
    hooks.append(checkpoints)
    if (url := state.config.checkpoint.upload) is not None and is_rank_zero():
        from megapoly.training.upload import UploadHook

        hooks.append(UploadHook(url, checkpoints, reporter.message))
    if state.config.checkpoint.save:
        hooks.append(RoomHook(state, reporter.message))
    return hooks


def _data_lines(config: Config, corpus: Corpus) -> list[str]:
    """Return lines about the sources of the run, and notes about their files."""
    assert config.training.train_iters is not None, "resolved"
    run_tokens = config.training.train_iters * tokens_per_step(config)
    return corpus.train.summary(run_tokens) + [f"note: {text}" for text in corpus.warnings]


def _summary(config: Config, device: str, num_processes: int) -> str:
    model, parallel = config.model, config.parallel
    kind = f"MoE, {model.num_moe_experts} experts" if model.num_moe_experts else "dense"
    chunks = parallel.virtual_pipeline_model_parallel_size
    layout = (
        f"tensor {parallel.tensor_model_parallel_size}, "
        f"pipeline {parallel.pipeline_model_parallel_size}"
        + (f" in {chunks} chunks, " if chunks else ", ")
        + f"expert {parallel.expert_model_parallel_size}"
        + (f", context {parallel.context_parallel_size}" if parallel.cp_comm_type else "")
    )
    return (
        f"{kind}, {model.num_layers} layers, {model.activation}; {num_processes} x {device}; "
        f"{layout}; {config.run_dir}"
    )


if __name__ == "__main__":  # saving a checkpoint starts a process that imports this file again
    sys.exit(main(sys.argv[1:], program="megapoly.pretrain"))
