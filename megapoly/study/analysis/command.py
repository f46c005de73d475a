"""The work of ``megapoly analyze``: compute the requested parts, write and draw them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from megapoly.checkpoints.local_copy import local_model
from megapoly.checkpoints.run_folder import run_of
from megapoly.errors import CheckpointError, MegapolyError
from megapoly.platform import extras, launcher
from megapoly.platform.files import write_text
from megapoly.platform.progress import counting_bar
from megapoly.platform.stores import is_url
from megapoly.study.comparison.outcome import chosen_runs

if TYPE_CHECKING:
    from megapoly.config import Config
    from megapoly.study.analysis.activation_statistics import ActivationStatistics
    from megapoly.study.analysis.forward_pass import Findings, Place

PARTS = ("rank", "similarity", "coefficients", "activations")
# Parts that run the model.
ON_TEXT = ("similarity", "activations")
DEFAULT_TOKENS = 16384


class AnalysisError(MegapolyError):
    """An option has no effect, or the analysis is not possible in one process."""


@dataclass(frozen=True)
class AnalysisRequest:
    """Options of the command line.

    Args:
        checkpoint: an ``iter_*`` folder, or a run with its newest one, or the URL of one of these;
            None for comparisons.
        output: folder to write to; None: ``analysis`` in the run.
        parts: of ``PARTS``.
        tokens: of text, of all validation sets in total; None: ``DEFAULT_TOKENS``.
        device: ``cpu`` or ``cuda``; None: a GPU if available.
        overrides: ``--section.field value`` for the configuration of the checkpoint.
        command: the command line, which is recorded.
    """

    checkpoint: Path | str | None
    output: Path | None = None
    parts: tuple[str, ...] = PARTS
    tokens: int | None = None
    device: str | None = None
    overrides: tuple[str, ...] = ()
    command: str = ""


def analyze(request: AnalysisRequest) -> Path:
    """Analyse a checkpoint; write analysis.json and figures.

    Returns:
        The folder written to.

    Raises:
        AnalysisError: the options contradict each other, or the folder has an analysis with other
            parts, which this one would replace.
        CheckpointError: there is no checkpoint, or it is damaged.
        ConfigError: an option of the configuration is not valid, or the run has no validation sets.
        DataError: there is no text to run the model on.
        UnavailableError: matplotlib or the device is missing.
    """
    assert request.checkpoint is not None
    _check(request)
    if is_url(request.checkpoint) and request.output is None:
        raise AnalysisError(f"{request.checkpoint} is no folder to write to; add --output DIR")
    checkpoint = _find(local_model(request.checkpoint))
    run = run_of(checkpoint)
    output = request.output or (run / "analysis" if run else None)
    if output is None:
        raise AnalysisError(
            f"`{request.checkpoint}` is not in a run, which would have the output in its folder "
            "`analysis`; give a folder with --output."
        )
    _check_replaces(output, request.parts)
    from megapoly.conversion.checkpoint_reader import CheckpointReader
    from megapoly.platform.device import default_device

    reader = CheckpointReader(checkpoint)
    output.mkdir(parents=True, exist_ok=True)
    device = request.device or default_device()
    analysis = _description(request, checkpoint, reader.config, reader.run)
    # First, because the engine must be imported before anything changes the process.
    if set(request.parts) & set(ON_TEXT):
        analysis |= _on_text(request, checkpoint, reader.config.model.activation, device)
    if "rank" in request.parts:
        from megapoly.study.analysis.effective_rank import effective_ranks

        with counting_bar("effective rank, matrices", _messages()) as on_progress:
            analysis["effective_rank"] = effective_ranks(reader, device, on_progress)
    if "coefficients" in request.parts:
        from megapoly.study.analysis.coefficients import coefficient_series

        analysis["coefficients"] = coefficient_series(run, analysis["iteration"])
    _write(output, analysis)
    return output


def of_comparisons(request: AnalysisRequest, folders: Sequence[Path]) -> list[AnalysisRequest]:
    """Return the analyses that comparisons lack: each activation's chosen run of the first seed.

    Args:
        request: the command line, without a checkpoint.
        folders: of ``megapoly compare``.

    Returns:
        A request for each run without an analysis.json of these parts on this text.

    Raises:
        AnalysisError: a folder is not a comparison, or its grid is not complete.
    """
    runs = []
    for folder in folders:
        chosen = chosen_runs(folder)
        if not chosen:
            raise AnalysisError(
                f"`--comparison` ({folder}) must be the folder of a comparison that has chosen its "
                "learning rates; let megapoly compare finish there first."
            )
        runs += [folder / name for name in chosen.values()]
    return [
        replace(request, checkpoint=run, command=_command(request, run))
        for run in runs
        if not _is_analysed(run, request)
    ]


def _command(request: AnalysisRequest, run: Path) -> str:
    """Return the command that analyses one run with the same options."""
    arguments = ["--model", str(run)]
    if set(request.parts) < set(PARTS):
        arguments += ["--parts", *request.parts]
    for option, value in (("--tokens", request.tokens), ("--device", request.device)):
        arguments += [] if value is None else [option, str(value)]
    return shlex.join(["megapoly", "analyze", *arguments, *request.overrides])


def _is_analysed(run: Path, request: AnalysisRequest) -> bool:
    written = _written(run / "analysis")
    return set(request.parts) <= set(written["parts"]) and (
        not set(request.parts) & set(ON_TEXT) or written["asked"] == _on_what(request)
    )


def _on_what(request: AnalysisRequest) -> dict[str, Any]:
    """Return what determines the numbers of the parts that run the model, except the checkpoint."""
    return {"tokens": request.tokens or DEFAULT_TOKENS, "options": list(request.overrides)}


def _written(output: Path) -> dict[str, Any]:
    """Return ``parts`` and ``asked`` of the analysis in a folder; empty if there is none."""
    try:
        content = json.loads((output / "analysis.json").read_text(encoding="utf-8"))
        return {"parts": list(content["parts"]), "asked": dict(content["asked"])}
    except (OSError, ValueError, KeyError, TypeError):  # damaged, or another file
        return {"parts": [], "asked": {}}


def _check_replaces(output: Path, parts: Sequence[str]) -> None:
    lost = [part for part in _written(output)["parts"] if part not in parts]
    if lost:
        raise AnalysisError(
            f"`{output}` has an analysis that includes {', '.join(lost)}; one of "
            f"{', '.join(parts)} would replace it. Give all parts in --parts, or another folder in "
            "--output."
        )


def _check(request: AnalysisRequest) -> None:
    num_processes = launcher.world_size()
    if num_processes > 1:
        raise AnalysisError(
            "A checkpoint of any layout must be analysed by one process; "
            f"{num_processes} were started. Start this program with python, not torchrun."
        )
    if not set(request.parts) & set(ON_TEXT):
        given = [*([] if request.tokens is None else ["--tokens"]), *request.overrides]
        if given:
            raise AnalysisError(
                f"`{' '.join(given)}` has no effect without a part that runs the model "
                f"({', '.join(ON_TEXT)}); leave it out"
            )
    for override in request.overrides:
        if override.partition("=")[0] == "--training.device":
            raise AnalysisError("`--training.device`: use `--device`, which is for every part")
    extras.require("A figure", "report", ["matplotlib"])
    from megapoly.platform.device import check_device

    if request.device is not None:
        check_device("--device", request.device)


def _find(path: Path) -> Path:
    from megapoly.conversion.checkpoint_reader import find_checkpoint

    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError(
            f"`{path}` is not a checkpoint: a complete checkpoint `iter_*` has a run.json, and a "
            "run has such a checkpoint in its `checkpoints`"
            + ("" if path.exists() else "; the path does not exist")
        )
    return checkpoint


def _description(
    request: AnalysisRequest, checkpoint: Path, config: Config, run: dict[str, Any]
) -> dict[str, Any]:
    model = config.model
    return {
        "command": request.command,
        "checkpoint": str(checkpoint),
        "iteration": run["iteration"],
        "tokens": run.get("consumed_tokens"),
        "activation": model.activation,
        "order": model.activation_order,
        "hidden_size": model.hidden_size,
        "num_layers": model.num_layers,
        "num_experts": model.num_moe_experts,
        "parts": list(request.parts),
        "asked": _on_what(request),
        "text": None,
        "effective_rank": None,
        "similarity": None,
        "coefficients": None,
        "curves": [],
        "power_shares": [],
        "activations": [],
    }


def _on_text(
    request: AnalysisRequest, checkpoint: Path, activation: str, device: str
) -> dict[str, Any]:
    from megapoly.activations import registry
    from megapoly.evaluation.loaded_checkpoint import loaded_checkpoint

    overrides = [*request.overrides, f"--training.device={device}"]
    if registry.get(activation).has_coefficients:
        # Compiling kernels would take longer than a few thousand tokens.
        overrides.insert(0, "--model.activation_backend=reference")
    with loaded_checkpoint(checkpoint, overrides, with_validation=True) as loaded:
        from megapoly.study.analysis.forward_pass import run_on_text

        for warning in loaded.warnings:
            _messages().print(f"note: {warning}", markup=False, soft_wrap=True)
        with counting_bar("the model on text, tokens", _messages()) as on_progress:
            findings = run_on_text(
                loaded.model,
                loaded.validation,
                request.tokens or DEFAULT_TOKENS,
                with_similarity="similarity" in request.parts,
                with_activations="activations" in request.parts,
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
    """Yield entries in the order of layers, kinds and experts."""
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
