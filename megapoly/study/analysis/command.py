"""What ``megapoly analyze`` does: compute the parts that are asked for, write and draw them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from megapoly.data.files import write_text
from megapoly.errors import CheckpointError, MegapolyError, UnavailableError
from megapoly.platform import launcher
from megapoly.platform.progress import counting_bar
from megapoly.study.comparison.outcome import chosen_runs

if TYPE_CHECKING:
    from megapoly.config import Config
    from megapoly.study.analysis.activation_statistics import ActivationStatistics
    from megapoly.study.analysis.forward_pass import Findings, Place

PARTS = ("rank", "similarity", "coefficients", "activations")
# Those that run the model.
ON_TEXT = ("similarity", "activations")
DEFAULT_TOKENS = 16384


class AnalysisError(MegapolyError):
    """Something is asked for that nothing would read, or that one process cannot do."""


@dataclass(frozen=True)
class AnalysisRequest:
    """The command line.

    Args:
        checkpoint: an ``iter_*`` folder, or a run, for its newest; None: those of comparisons.
        output: folder to write to; None: ``analysis`` in the run.
        parts: of ``PARTS``.
        tokens: of text, of all validation sets together; None: ``DEFAULT_TOKENS``.
        device: ``cpu`` or ``cuda``; None: a GPU if there is one.
        words: ``--section.field value`` of the checkpoint's configuration.
        command: as it was typed, which is written down.
    """

    checkpoint: Path | None
    output: Path | None = None
    parts: tuple[str, ...] = PARTS
    tokens: int | None = None
    device: str | None = None
    words: tuple[str, ...] = ()
    command: str = ""


def analyze(asked: AnalysisRequest) -> Path:
    """Analyse a checkpoint; write analysis.json and figures.

    Returns:
        The folder written to.

    Raises:
        AnalysisError: the options contradict each other, or the folder has an analysis of parts
            that are not asked for, which this one would replace.
        CheckpointError: there is no checkpoint, or it is damaged.
        ConfigError: an option of the configuration is none, or the run has no validation sets.
        DataError: there is no text to run the model on.
        UnavailableError: matplotlib or the device is missing.
    """
    assert asked.checkpoint is not None
    _check(asked)
    checkpoint, run = _find(asked.checkpoint)
    output = asked.output or (run / "analysis" if run else None)
    if output is None:
        raise AnalysisError(
            f"`{asked.checkpoint}` lies in no run, whose `analysis` folder the output would go "
            "to; name one with --output."
        )
    _check_replaces(output, asked.parts)
    from megapoly.conversion.checkpoint_reader import CheckpointReader
    from megapoly.platform.device import default_device

    reader = CheckpointReader(checkpoint)
    output.mkdir(parents=True, exist_ok=True)
    device = asked.device or default_device()
    analysis = _description(asked, checkpoint, reader.config, reader.run)
    # First: the engine's import must find the process as it is at its start.
    if set(asked.parts) & set(ON_TEXT):
        analysis |= _on_text(asked, checkpoint, reader.config.model.activation, device)
    if "rank" in asked.parts:
        from megapoly.study.analysis.effective_rank import effective_ranks

        with counting_bar("effective rank, matrices", _messages()) as on_progress:
            analysis["effective_rank"] = effective_ranks(reader, device, on_progress)
    if "coefficients" in asked.parts:
        from megapoly.study.analysis.coefficients import coefficient_series

        analysis["coefficients"] = coefficient_series(run, analysis["iteration"])
    _write(output, analysis)
    return output


def of_comparisons(asked: AnalysisRequest, folders: Sequence[Path]) -> list[AnalysisRequest]:
    """What is to analyse of comparisons: of each activation the chosen run of the first seed.

    Args:
        asked: the command line, without a checkpoint.
        folders: of ``megapoly compare``.

    Returns:
        One for each run without an analysis.json of these parts on this text.

    Raises:
        AnalysisError: a folder is no comparison, or one whose grid is not complete.
    """
    runs = []
    for folder in folders:
        chosen = chosen_runs(folder)
        if not chosen:
            raise AnalysisError(
                f"`--comparison` ({folder}) must be the folder of a comparison with its learning "
                "rates chosen; let megapoly compare finish there first."
            )
        runs += [folder / name for name in chosen.values()]
    return [
        replace(asked, checkpoint=run, command=_command(asked, run))
        for run in runs
        if not _is_analysed(run, asked)
    ]


def _command(asked: AnalysisRequest, run: Path) -> str:
    """What analyses one run alike."""
    words = ["--checkpoint", str(run)]
    if set(asked.parts) < set(PARTS):
        words += ["--parts", *asked.parts]
    for option, value in (("--tokens", asked.tokens), ("--device", asked.device)):
        words += [] if value is None else [option, str(value)]
    return shlex.join(["megapoly", "analyze", *words, *asked.words])


def _is_analysed(run: Path, asked: AnalysisRequest) -> bool:
    written = _written(run / "analysis")
    return set(asked.parts) <= set(written["parts"]) and (
        not set(asked.parts) & set(ON_TEXT) or written["asked"] == _on_what(asked)
    )


def _on_what(asked: AnalysisRequest) -> dict[str, Any]:
    """What decides the numbers of the parts that run the model, beside the checkpoint."""
    return {"tokens": asked.tokens or DEFAULT_TOKENS, "options": list(asked.words)}


def _written(output: Path) -> dict[str, Any]:
    """``parts`` and ``asked`` of the analysis in a folder; empty where there is none."""
    try:
        content = json.loads((output / "analysis.json").read_text(encoding="utf-8"))
        return {"parts": list(content["parts"]), "asked": dict(content["asked"])}
    except (OSError, ValueError, KeyError, TypeError):  # damaged, or another's: made anew
        return {"parts": [], "asked": {}}


def _check_replaces(output: Path, parts: Sequence[str]) -> None:
    lost = [part for part in _written(output)["parts"] if part not in parts]
    if lost:
        raise AnalysisError(
            f"`{output}` has an analysis with {', '.join(lost)}, too, which one of "
            f"{', '.join(parts)} would replace; name all in --parts, or another folder in --output."
        )


def _check(asked: AnalysisRequest) -> None:
    num_processes = launcher.world_size()
    if num_processes > 1:
        raise AnalysisError(
            f"A checkpoint is analysed by one process, whatever layout it was saved at; "
            f"{num_processes} were started. Start this program with python, not torchrun."
        )
    if not set(asked.parts) & set(ON_TEXT):
        given = {"--tokens": asked.tokens is not None, " ".join(asked.words): bool(asked.words)}
        for name in (name for name, is_given in given.items() if is_given):
            raise AnalysisError(
                f"`{name}`: nothing reads this without a part that runs the model "
                f"({', '.join(ON_TEXT)}); leave it out"
            )
    for word in asked.words:
        if word.partition("=")[0] == "--training.device":
            raise AnalysisError("`--training.device`: give `--device`, which is for every part")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UnavailableError("The figures need matplotlib: `pip install matplotlib`.") from error
    from megapoly.platform.device import check_device

    if asked.device is not None:
        check_device("--device", asked.device)


def _find(path: Path) -> tuple[Path, Path | None]:
    """The checkpoint, and the run that it lies in."""
    from megapoly.conversion.checkpoint_reader import find_checkpoint

    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError(
            f"`{path}` is no checkpoint: a complete checkpoint `iter_*` has a run.json, a run such "
            "a checkpoint in its `checkpoints`" + ("" if path.exists() else "; nothing is there")
        )
    folder = checkpoint.resolve().parent
    return checkpoint, folder.parent if folder.name == "checkpoints" else None


def _description(
    asked: AnalysisRequest, checkpoint: Path, config: Config, run: dict[str, Any]
) -> dict[str, Any]:
    model = config.model
    return {
        "command": asked.command,
        "checkpoint": str(checkpoint),
        "iteration": run["iteration"],
        "tokens": run.get("consumed_tokens"),
        "activation": model.activation,
        "order": model.activation_order,
        "hidden_size": model.hidden_size,
        "num_layers": model.num_layers,
        "num_experts": model.num_moe_experts,
        "parts": list(asked.parts),
        "asked": _on_what(asked),
        "text": None,
        "effective_rank": None,
        "similarity": None,
        "coefficients": None,
        "curves": [],
        "power_shares": [],
        "activations": [],
    }


def _on_text(
    asked: AnalysisRequest, checkpoint: Path, activation: str, device: str
) -> dict[str, Any]:
    from megapoly.activations import registry
    from megapoly.evaluation.loaded_checkpoint import loaded_checkpoint

    words = [*asked.words, f"--training.device={device}"]
    if registry.get(activation).has_coefficients:
        # Kernels that are compiled for a few thousand tokens would take longer than these.
        words.insert(0, "--model.activation_backend=reference")
    with loaded_checkpoint(checkpoint, words, with_validation=True) as opened:
        from megapoly.study.analysis.forward_pass import run_on_text

        for warning in opened.warnings:
            _messages().print(f"note: {warning}", markup=False, soft_wrap=True)
        with counting_bar("the model on text, tokens", _messages()) as on_progress:
            findings = run_on_text(
                opened.model,
                opened.validation,
                asked.tokens or DEFAULT_TOKENS,
                with_similarity="similarity" in asked.parts,
                with_activations="activations" in asked.parts,
                on_progress=on_progress,
            )
    return _as_json(findings)


def _as_json(findings: Findings) -> dict[str, Any]:
    analysis: dict[str, Any] = {
        "text": {"sets": findings.sets, "tokens": sum(each["tokens"] for each in findings.sets)}
    }
    if findings.similarity is not None:
        names = [f"{each['name']} ({', '.join(each['fingerprints'])})" for each in findings.sets]
        analysis["similarity"] = {"text": "; ".join(names)} | findings.similarity.result()
    filled = {place: each for place, each in findings.activations.items() if not each.is_empty}
    analysis["curves"] = list(_entries(filled, lambda each: each.curve()))
    analysis["activations"] = list(_entries(filled, lambda each: each.statistics()))
    analysis["power_shares"] = [
        entry
        for entry in _entries(filled, lambda each: {"shares": each.power_shares()})
        if entry["shares"] is not None
    ]
    return analysis


def _entries(
    found: dict[Place, ActivationStatistics],
    describe: Callable[[ActivationStatistics], dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """In the order of layers, kinds and experts."""
    for place in sorted(found, key=lambda place: (place[0], place[1], place[2] or 0)):
        layer, kind, expert = place
        yield {"layer": layer, "kind": kind, "expert": expert} | describe(found[place])


def _write(output: Path, analysis: dict[str, Any]) -> None:
    from megapoly.study.analysis.figures import draw_all
    from megapoly.study.figure_style import png

    for name, figure in draw_all([analysis]).items():
        (output / f"{name}.png").write_bytes(png(figure))
    # The last file: a folder that has it is complete.
    write_text(output / "analysis.json", json.dumps(analysis, allow_nan=False) + "\n")


def _messages() -> Console:
    return Console(stderr=True)
