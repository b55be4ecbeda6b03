"""A matrix of trainings: models x datasets x prompts x seeds, and the table of what comes out."""

import csv
import io
import itertools
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import yaml
from pydantic import Field, field_validator, model_validator

from vlsm import storage
from vlsm.config import Settings, load_settings
from vlsm.errors import ConfigError
from vlsm.evaluation.settings import EvaluateSettings
from vlsm.training.settings import TrainSettings

POOLED = "all"  # what a model that is trained on all datasets together is said to be trained on
COLUMNS = ("trained_on", "dataset", "prompt", "prompt_class", "model", "num_seeds", "mean", "sd", "difference")


class SweepRunSettings(Settings):
    """How a sweep is carried out: it may differ when it is resumed."""

    parallel: int | None = Field(None, ge=1, description="trainings at once; one per GPU of the cluster unless told")


class SweepSettings(Settings):
    """Which models are trained on what, and how they are compared."""

    output: str
    datasets: dict[str, str] = Field({}, description="by name; each model is trained on each of them")
    pooled: bool = Field(False, description="each model is trained once, on all datasets together")
    external: dict[str, str] = Field({}, description="datasets of which only the test split is used, for every model")
    models: dict[str, dict[str, Any]] = Field(
        {}, description="by name: settings of jobs.train; `config` names a file of such beside this one"
    )
    prompts: tuple[str, ...] = Field(
        ("p1",), min_length=1, description="p0, p1, text:WORDS, ...: to train with, and to score with"
    )
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="of the trainings")
    train: dict[str, Any] = Field({}, description="settings of jobs.train for all models, where theirs say nothing")
    evaluate: dict[str, Any] = Field({}, description="settings of jobs.evaluate")
    baseline: str | None = Field(None, description="the model that others are compared with; the first unless told")
    start_over: bool = Field(False, description="forget an earlier sweep in OUTPUT; what is trained stays")
    run: SweepRunSettings = SweepRunSettings()

    @field_validator("datasets", "external")
    @classmethod
    def _make_absolute(cls, value: dict[str, str]) -> dict[str, str]:
        return {name: storage.absolute(uri) for name, uri in value.items()}

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("datasets", "models"):
            if not getattr(self, name):
                raise ValueError(f"{name}: there are none")
        if self.baseline is not None and self.baseline not in self.models:
            raise ValueError(f"baseline is {self.baseline}; models are {', '.join(self.models)}")
        for name in ("prompts", "seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name}: one stands there twice")
        return self


@dataclass(frozen=True)
class Trial:
    """One training: its place in the matrix, and its settings."""

    model: str
    dataset: str
    prompt: str
    seed: int
    settings: TrainSettings

    @property
    def name(self) -> str:
        """What the log calls it."""
        return f"{self.model} on {self.dataset}, {self.prompt}, seed {self.seed}"

    @property
    def system(self) -> str:
        """What its evaluation calls it."""
        return f"{self.model}, seed {self.seed}"


@dataclass(frozen=True)
class Cell:
    """The trials that are compared with each other, and the evaluation that does it."""

    trials: tuple[Trial, ...]
    settings: EvaluateSettings


def read_models(models: dict[str, dict[str, Any]], folder: str) -> dict[str, dict[str, Any]]:
    """The models' settings with the content of the files that `config` names, their own before it.

    Args:
        models: as a sweep's settings have them.
        folder: that relative names start from.

    Raises:
        ConfigError: a file cannot be read, or holds no settings.
    """
    found = {}
    for name, own in models.items():
        rest = {key: value for key, value in own.items() if key != "config"}
        if "config" in own:
            path = str(own["config"])
            uri = path if "://" in path or path.startswith("/") else storage.join(folder, path)
            try:
                tree = yaml.safe_load(storage.read_bytes(uri))
            except (OSError, yaml.YAMLError) as error:
                raise ConfigError(f"models: {name}: {uri} cannot be read: {' '.join(str(error).split())}") from error
            if not isinstance(tree, dict):
                raise ConfigError(f"models: {name}: {uri} holds no settings")
            rest = merge(tree, rest)
        found[name] = rest
    return found


def plan_cells(settings: SweepSettings) -> list[Cell]:
    """The whole matrix, cell by cell, in the order of the table.

    Raises:
        ConfigError: the settings of a training or of the evaluation are wrong.
    """
    names = [POOLED] if settings.pooled else list(settings.datasets)
    cells = []
    for dataset, prompt in itertools.product(names, settings.prompts):
        trials = tuple(
            Trial(model, dataset, prompt, seed, _train_settings(settings, model, dataset, prompt, seed))
            for model, seed in itertools.product(settings.models, settings.seeds)
        )
        cells.append(Cell(trials, _evaluate_settings(settings, trials)))
    return cells


def _train_settings(settings: SweepSettings, model: str, dataset: str, prompt: str, seed: int) -> TrainSettings:
    tree = merge(settings.train, settings.models[model])
    tree = merge({"data": {"prompt": prompt}}, tree)
    place = storage.join(settings.output, "trials", *map(_safe, (model, dataset, prompt)), f"seed-{seed}")
    datasets = settings.datasets if settings.pooled else {dataset: settings.datasets[dataset]}
    try:
        return load_settings(TrainSettings, None, [], tree | {"output": place, "datasets": datasets, "seed": seed})
    except ConfigError as error:
        raise ConfigError(f"models: {model}: {error}") from error


def _evaluate_settings(settings: SweepSettings, trials: tuple[Trial, ...]) -> EvaluateSettings:
    first = trials[0]
    systems = {trial.system: [{"checkpoint": storage.join(trial.settings.output, "checkpoint")}] for trial in trials}
    own = settings.datasets if settings.pooled else {first.dataset: settings.datasets[first.dataset]}
    place = storage.join(settings.output, "evaluations", _safe(first.dataset), _safe(first.prompt))
    facts = {"output": place, "datasets": own | settings.external, "systems": systems}
    tree = merge({"prompts": ["p1" if first.prompt == "random" else first.prompt]}, settings.evaluate)
    try:
        return load_settings(EvaluateSettings, None, [], tree | facts)
    except ConfigError as error:
        raise ConfigError(f"evaluate: {error}") from error


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A tree of settings with another put over it, group by group."""
    both = {
        key: merge(base[key], value) if isinstance(value, dict) and isinstance(base[key], dict) else value
        for key, value in over.items()
        if key in base
    }
    return base | over | both


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "none"


def tabulate(rows: Iterable[dict[str, Any]], settings: SweepSettings) -> list[dict[str, Any]]:
    """The table, a row per cell and model, with COLUMNS.

    Args:
        rows: of the evaluations: trained_on, dataset, prompt, prompt_class, model, seed, dice (the mean over images).
        settings: of the sweep.

    Returns:
        Mean and standard deviation over seeds, and the difference to the baseline's mean.
    """
    cells: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in rows:
        place = tuple(str(row[name]) for name in COLUMNS[:4])
        cells.setdefault(place, {}).setdefault(row["model"], []).append(float(row["dice"]))
    baseline = settings.baseline or next(iter(settings.models))
    table = []
    for place, models in cells.items():
        means = {model: statistics.fmean(values) for model, values in models.items()}
        for model, values in models.items():
            spread = statistics.stdev(values) if len(values) > 1 else None
            difference = means[model] - means[baseline] if baseline in means else None
            facts = (model, len(values), means[model], spread, difference)
            table.append(dict(zip(COLUMNS, (*place, *facts), strict=True)))
    return table


def write_csv(table: list[dict[str, Any]]) -> str:
    """The table for programs."""
    sink = io.StringIO()
    writer = csv.DictWriter(sink, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return sink.getvalue()


def write_markdown(table: list[dict[str, Any]], settings: SweepSettings) -> str:
    """The table for people, in per cent, as the paper has it: a line per model, a column per dataset and prompt.

    The best of a column is bold. Upper bounds, whose prompts tell of the mask, stand in a table of their own.
    """
    parts = [f"Dice in per cent: mean and standard deviation over {len(settings.seeds)} seeds, and the difference to "]
    parts[0] += f"{settings.baseline or next(iter(settings.models))}.\n"
    for prompt_class, heading in (("honest", ""), ("upper_bound", "\n## Upper bound: the prompts tell of the mask\n")):
        rows = [row for row in table if row["prompt_class"] == prompt_class]
        if rows:
            parts += [heading, *_grid(rows)] if heading else _grid(rows)
    return "\n".join(parts) + "\n"


def _grid(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys((row["trained_on"], row["dataset"], row["prompt"]) for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    found = {(row["model"], (row["trained_on"], row["dataset"], row["prompt"])): row for row in rows}
    best = {column: max(row["mean"] for row in rows if _column(row) == column) for column in columns}
    heads = [
        f"{dataset}, {prompt}" + ("" if trained_on == dataset else f" (trained on {trained_on})")
        for trained_on, dataset, prompt in columns
    ]
    lines = ["| model | " + " | ".join(heads) + " |", "|---" * (len(columns) + 1) + "|"]
    for model in models:
        cells = [_cell(found.get((model, column)), best[column]) for column in columns]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return lines


def _column(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["trained_on"], row["dataset"], row["prompt"]


def _cell(row: dict[str, Any] | None, best: float) -> str:
    if row is None:
        return ""
    text = f"{100 * row['mean']:.1f}" + ("" if row["sd"] is None else f" ± {100 * row['sd']:.1f}")
    text = f"**{text}**" if row["mean"] == best else text
    return text + ("" if not row["difference"] else f" ({100 * row['difference']:+.1f})")
