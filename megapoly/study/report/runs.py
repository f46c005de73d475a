"""A run folder as a record: everything that the page shows of it, as plain values.

Training losses are kept as their trailing mean over a twentieth of the run's steps, at no more than
150 points; the value at the last step is the final training loss of the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megapoly.checkpoints.choose import newest_description
from megapoly.config import load_yaml
from megapoly.config.data_sources import MEAN
from megapoly.config.parsing import to_dict
from megapoly.errors import DataError
from megapoly.platform.json_lines import lines
from megapoly.study.report.statistics import thinned, trailing_mean

logger = logging.getLogger(__name__)

# Share of a run's steps over which the trailing mean is taken.
WINDOW = 1 / 20
MOST_POINTS = 150
# Keys that every line of metrics.jsonl has.
_OF_A_STEP = ("iteration", "consumed_samples", "consumed_tokens", "lm_loss", "step_time_s")
# Sections with paths on disk, which do not describe a run.
_PLACES = ("checkpoint", "logging")


@dataclass(frozen=True)
class Run:
    """A training run.

    Args:
        name: of its folder.
        config: the resolved configuration, without places on disk.
        iteration: number of steps made.
        parameters: of the model, including padding of the vocabulary.
        active_parameters: those that one token uses.
        window_steps: steps of the trailing mean.
        training: ``tokens`` and ``loss``; None for a loss that was not finite.
        validation: ``tokens``, and ``loss`` by domain, ``mean`` included.
        tasks: percent at the last evaluation, by task.
        task_errors: standard error of that score over the questions, in percent, where recorded.
        wall_time_s: of the trial, or of its steps alone.
        wall_time_of: ``trial`` or ``steps``.
        data: data of the checkpoint: ``fingerprint``, ``sources``, ``tokenizer`` (SHA-256); None
            without a checkpoint.
        layout: processes of the job, from the checkpoint.
        version: of megapoly.
        comparison: key of the comparison to which it belongs.
        diverged: whether the comparison recorded a loss that was not finite.
        analysis: content of its analysis.json.
        consumed_samples: samples that it trained on; None in a record without them, whose steps
            all have one batch size and sequence length.
    """

    name: str
    config: dict[str, Any]
    iteration: int
    parameters: int
    active_parameters: int
    window_steps: int
    training: dict[str, list[Any]]
    validation: dict[str, Any]
    tasks: dict[str, float]
    task_errors: dict[str, float]
    wall_time_s: float
    wall_time_of: str
    data: dict[str, Any] | None
    layout: dict[str, int] | None
    version: str | None
    comparison: str | None
    diverged: bool
    analysis: dict[str, Any] | None
    consumed_samples: int | None = None

    @property
    def activation(self) -> str:
        """Name in the registry."""
        return str(self.config["model"]["activation"])

    @property
    def lr(self) -> float:
        """Highest learning rate."""
        return float(self.config["optimizer"]["lr"])

    @property
    def seed(self) -> str:
        """Seed of weights and data; runs of one seed have equal initial weights and data order."""
        weights, data = self.config["training"]["seed"], self.config["data"]["seed"]
        return str(weights) if weights == data else f"{weights}/{data}"

    @property
    def steps(self) -> int:
        """Number of steps of the whole run; steps made with another batch size are counted."""
        training = self.config["training"]
        return _num_steps(
            int(training["train_iters"]),
            int(training["global_batch_size"]),
            iteration=self.iteration,
            consumed_samples=self.consumed_samples,
        )

    @property
    def tokens(self) -> int:
        """Number of training tokens of the whole run: those trained on and those that are left."""
        training, trained = self.config["training"], self.training["tokens"]
        left = max(0, self.steps - self.iteration)
        step = int(training["global_batch_size"]) * int(training["seq_length"])
        return (trained[-1] if trained else 0) + left * step

    @property
    def complete(self) -> bool:
        """Whether the run is at its end and the last evaluation, if there are any, is there too."""
        evaluated, trained = self.validation["tokens"], self.training["tokens"]
        at_end = self.iteration >= self.steps
        return at_end and (not evaluated or evaluated[-1] == trained[-1])

    @property
    def training_loss(self) -> float | None:
        """Mean over the last steps; None if it is not finite."""
        return self.training["loss"][-1] if self.training["loss"] else None

    @property
    def domains(self) -> list[str]:
        """Validation sets, without their mean."""
        return [key for key in self.validation["loss"] if key != MEAN]

    def validation_loss(self, domain: str = MEAN) -> float | None:
        """Return the loss at the last evaluation; None if it does not exist or is not finite."""
        losses = self.validation["loss"].get(domain)
        return losses[-1] if losses else None

    def curve(self, *, validation: bool) -> tuple[list[int], list[float | None]]:
        """Return tokens and the mean validation or the training loss; None if it is not finite."""
        kind = self.validation if validation else self.training
        losses = self.validation["loss"].get(MEAN, []) if validation else self.training["loss"]
        return kind["tokens"], losses

    @property
    def key(self) -> str:
        """Key that is equal for a run and a later record of it."""
        text = json.dumps([self.name, self.config], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_record(run: Run) -> dict[str, Any]:
    """Return the run as plain values, for JSON."""
    return asdict(run)


def read_run(folder: Path, *, comparison: str | None = None, trial: Any = None) -> Run:
    """Read a run's folder.

    Args:
        folder: with ``config.yaml`` and ``metrics.jsonl``.
        comparison: key of the comparison to which it belongs.
        trial: its entry in ``comparison.json``.

    Raises:
        MegapolyError: a file cannot be read, or is not a file of a run.
    """
    from megapoly.preflight.planning.parameters import active_parameters, total_parameters

    config = load_yaml(folder / "config.yaml")
    steps = read_metrics(folder / "metrics.jsonl")
    position = newest_description(folder)
    iteration = steps[-1]["iteration"] if steps else 0
    samples = steps[-1]["consumed_samples"] if steps else 0
    total = _num_steps(
        config.training.train_iters or len(steps),
        config.training.global_batch_size,
        iteration=iteration,
        consumed_samples=samples,
    )
    window = max(1, round(total * WINDOW))
    wall_time = (trial or {}).get("wall_time_s")
    return Run(
        name=folder.resolve().name,
        config=_without_places(to_dict(config)),
        iteration=iteration,
        parameters=total_parameters(config),
        active_parameters=active_parameters(config),
        window_steps=window,
        training=_training(steps, window),
        validation=_validation(steps),
        tasks=_last(steps, "task"),
        task_errors=_last(steps, "task_stderr"),
        wall_time_s=round(
            math.fsum(s["step_time_s"] for s in steps) if wall_time is None else wall_time, 1
        ),
        wall_time_of="steps" if wall_time is None else "trial",
        data=_data(position),
        layout=position.get("layout"),
        version=position.get("megapoly_version"),
        comparison=comparison,
        diverged=bool((trial or {}).get("diverged")),
        analysis=_read_json(folder / "analysis" / "analysis.json"),
        consumed_samples=samples,
    )


def _num_steps(
    train_iters: int, batch: int, *, iteration: int, consumed_samples: int | None
) -> int:
    """Return the number of a run's last step.

    A run ends after ``train_iters * batch`` samples. Steps that it made before it was resumed with
    another batch size have other numbers of samples.
    """
    if consumed_samples is None:
        return train_iters
    return iteration + max(0, -(-(train_iters * batch - consumed_samples) // batch))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the steps of a run in order, without a last line that is still being written.

    Lines that are damaged, or lack what every step has, are left out with a warning.

    Raises:
        DataError: the file cannot be read, or no line is a step.
    """
    found: dict[int, dict[str, Any]] = {}
    problems: list[str] = []
    try:
        for line in lines(path):
            problem = _problem_of(line.record)
            if problem is None:
                assert line.record is not None
                found[line.record["iteration"]] = line.record
            elif line.is_whole:
                problems.append(f"line {line.number}, is not a step of a run ({problem})")
    except OSError as error:
        raise DataError(f"`{path}` cannot be read ({error}); give the folder of a run.") from error
    if problems and not found:
        raise DataError(f"`{path}`, {problems[0]}; give the `metrics.jsonl` of megapoly train.")
    if problems:
        more = f"; so are {len(problems) - 1} more lines" if len(problems) > 1 else ""
        logger.warning("%s, %s and is left out%s", path, problems[0], more)
    return [found[iteration] for iteration in sorted(found)]


def _problem_of(record: dict[str, Any] | None) -> str | None:
    """Return why a line is not a step."""
    if record is None:
        return "it is damaged"
    missing = [name for name in _OF_A_STEP if name not in record]
    if missing:
        return f"{', '.join(missing)} missing"
    return None if isinstance(record["iteration"], int) else "its iteration is no whole number"


def _is(key: str, kind: str) -> bool:
    return key.startswith(f"{kind}/")


def _last(steps: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """Return the last finite value of each metric of a kind, by the rest of its name."""
    return {
        key.removeprefix(f"{kind}/"): number
        for step in steps
        for key, value in step.items()
        if _is(key, kind) and (number := _finite(value)) is not None
    }


def _finite(value: float | None) -> float | None:
    return round(value, 6) if value is not None and math.isfinite(value) else None


def _training(steps: list[dict[str, Any]], window: int) -> dict[str, list[Any]]:
    # A skipped step was not trained on; its loss is a spike, or null.
    steps = [step for step in steps if "skipped_steps" not in step]
    means = trailing_mean([step["lm_loss"] for step in steps], window)
    kept = thinned(len(steps), MOST_POINTS)
    return {
        "tokens": [steps[i]["consumed_tokens"] for i in kept],
        "loss": [_finite(means[i]) for i in kept],
    }


def _validation(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Return tokens, and losses by domain; a single domain is also the mean."""
    evaluated = [step for step in steps if any(_is(key, "val") for key in step)]
    evaluated = [evaluated[i] for i in thinned(len(evaluated), MOST_POINTS)]
    keys = [k for k in (evaluated[-1] if evaluated else {}) if _is(k, "val")]
    domains = {key.split("/")[1]: key for key in keys if key.endswith("/loss")}
    losses = {
        domain: [_finite(step.get(key, math.nan)) for step in evaluated]
        for domain, key in domains.items()
    }
    if len(domains) == 1:
        losses[MEAN] = next(iter(losses.values()))
    return {"tokens": [step["consumed_tokens"] for step in evaluated], "loss": losses}


def _data(position: dict[str, Any]) -> dict[str, Any] | None:
    if "data" not in position:
        return None
    data = position["data"]
    sources = [{k: v for k, v in source.items() if k != "path"} for source in data["sources"]]
    return {
        "fingerprint": position["data_fingerprint"],
        "sources": sources,
        "tokenizer": data["tokenizer"],
    }


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if the file does not exist."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"`{path}` is not JSON ({error}); write it again.") from error
    return content if isinstance(content, dict) else None


def source_name(source: dict[str, Any]) -> str:
    """Return the name of a source without the suffixes that megapoly preprocess adds."""
    return str(source["name"]).removesuffix("_document").removesuffix("_text")


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration without folders; of data files only the names remain."""
    kept = {k: v for k, v in config.items() if k != "run_dir" and k not in _PLACES}
    data = {k: v for k, v in config["data"].items() if k != "cache_dir"}
    data["tokenizer"] = _last_part(data["tokenizer"])
    if data["blend"]:
        data["blend"] = [{**source, "path": _last_part(source["path"])} for source in data["blend"]]
    if data["validation"]:
        data["validation"] = {k: _last_part(v) for k, v in data["validation"].items()}
    training = {k: v for k, v in config["training"].items() if k != "eval_tasks_data"}
    return {**kept, "data": data, "training": training}


def _last_part(place: Any) -> Any:
    if isinstance(place, str):
        return Path(place).name
    if isinstance(place, list):
        return [_last_part(part) for part in place]
    if isinstance(place, dict):
        return {**place, "path": _last_part(place["path"])}
    return place
