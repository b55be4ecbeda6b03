"""A sweep: a matrix of trainings (models x datasets x prompts x seeds) and the table of its results."""

import io
import itertools
import re
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from vlsm import storage
from vlsm.cells import CsvWriter, markdown_cell
from vlsm.config import PlaceSettings, Settings, load_settings
from vlsm.datasets.settings import SplitSettings
from vlsm.datasets.shared import share_settings
from vlsm.documents import read_yaml
from vlsm.errors import ConfigError
from vlsm.evaluation.places import allow_places, places_of
from vlsm.evaluation.settings import EvaluateSettings
from vlsm.models.options import STACK
from vlsm.training.settings import TrainSettings
from vlsm.words import count

POOLED = "all"  # value of the column trained_on for a model that is trained on all datasets together
COLUMNS = (
    "trained_on",
    "dataset",
    "prompt",
    "prompt_class",
    "model",
    "num_folds",
    "num_seeds",
    "mean",
    "sd",
    "difference",
    "num_failed",
)


class SweepRunSettings(PlaceSettings):
    """Settings of the execution of a sweep; they may change when the sweep resumes. All its jobs get `allow`."""

    parallel: int | None = Field(
        None, ge=1, description="number of trainings at the same time; default: one per GPU of the cluster"
    )


class SweepSettings(Settings):
    """Models to train, training data, and the comparison of the models."""

    output: str
    datasets: dict[str, str] = Field({}, description="locations by name; each model is trained on each dataset")
    pooled: bool = Field(False, description="train each model once, on all datasets together")
    external: dict[str, str] = Field({}, description="datasets for testing only; every model is scored on them")
    models: dict[str, dict[str, Any]] = Field(
        {},
        description="settings of jobs.train by model name; `config` names a file with more, beside this file; "
        "options.members of a stack may name other models of the sweep, which are trained first",
    )
    prompts: tuple[str, ...] = Field(
        ("p1",), min_length=1, description="prompts to train with and to score with: p0, p1, text:WORDS, ..."
    )
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="random seeds of the trainings")
    folds: int | None = Field(
        None, ge=2, description="train once per fold; val of a fold is 1/folds of the train and val records, test stays"
    )
    train: dict[str, Any] = Field(
        {}, description="settings of jobs.train for all models; the settings of a model override them"
    )
    evaluate: dict[str, Any] = Field({}, description="settings of jobs.evaluate")
    baseline: str | None = Field(
        None, description="the model that the other models are compared with; default: the first model"
    )
    start_over: bool = Field(False, description="delete an earlier sweep's tables in OUTPUT, but keep its trainings")
    run: SweepRunSettings = SweepRunSettings()

    @field_validator("datasets", "external")
    @classmethod
    def _make_absolute(cls, value: dict[str, str]) -> dict[str, str]:
        return {name: storage.absolute(uri) for name, uri in value.items()}

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("datasets", "models"):
            if not getattr(self, name):
                raise ValueError(f"{name}: there are none; give at least one")
        if self.baseline is not None and self.baseline not in self.models:
            raise ValueError(f"baseline is {self.baseline}; models are {', '.join(self.models)}")
        for name in ("prompts", "seeds"):
            values = getattr(self, name)
            if repeated := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"{name}: {repeated[0]} is repeated; list each value once")
        return self


@dataclass(frozen=True)
class Trial:
    """One training: its position in the matrix, and its settings.

    Attributes:
        needs: OUTPUT of each trial of the sweep whose checkpoint is a member of this one, a stack.
    """

    model: str
    dataset: str
    prompt: str
    seed: int
    settings: TrainSettings
    fold: int | None = None
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the trial in log lines."""
        fold = "" if self.fold is None else f"fold {self.fold}, "
        return f"{self.model} on {self.dataset}, {self.prompt}, {fold}seed {self.seed}"

    @property
    def system(self) -> str:
        """Name of the trial's system in the evaluation."""
        return f"{self.model}, seed {self.seed}"


class _Position(NamedTuple):
    """The place of a trial in the matrix."""

    model: str
    dataset: str
    prompt: str
    fold: int | None
    seed: int


@dataclass(frozen=True)
class TrialGroup:
    """All trials with the same data, prompt and fold, and the settings of the evaluation that compares them."""

    trials: tuple[Trial, ...]
    settings: EvaluateSettings


def read_models(models: dict[str, dict[str, Any]], folder: str) -> dict[str, dict[str, Any]]:
    """Return the settings of the models, merged with the content of the files that `config` names.

    The settings in `models` override the settings in the file.

    Args:
        models: settings by model name, as in SweepSettings.
        folder: folder that relative file names start from.

    Raises:
        ConfigError: a file cannot be read, or holds no settings.
    """
    merged = {}
    for name, model_settings in models.items():
        tree = {key: value for key, value in model_settings.items() if key != "config"}
        if "config" in model_settings:
            path = str(model_settings["config"])
            uri = path if "://" in path or path.startswith("/") else storage.join(folder, path)
            try:
                file_tree = read_yaml(uri, f"models: {name}: {uri}", ConfigError)
            except OSError as error:
                raise ConfigError(f"models: {name}: {uri} cannot be read: {' '.join(str(error).split())}") from error
            if not isinstance(file_tree, dict):
                raise ConfigError(f"models: {name}: {uri} holds no settings; it must hold settings of jobs.train")
            tree = merge(file_tree, tree)
        merged[name] = tree
    return merged


def plan_trial_groups(settings: SweepSettings) -> list[TrialGroup]:
    """Return the whole matrix, one group per training dataset, prompt and fold, in the order of the table.

    Raises:
        ConfigError: the settings of a training or of the evaluation are wrong.
    """
    names = [POOLED] if settings.pooled else list(settings.datasets)
    groups = []
    for dataset, prompt, fold in itertools.product(names, settings.prompts, folds_of(settings)):
        trials = tuple(
            _make_trial(settings, _Position(model, dataset, prompt, fold, seed))
            for model, seed in itertools.product(settings.models, settings.seeds)
        )
        groups.append(TrialGroup(trials, _evaluate_settings(settings, trials)))
    first = groups[0].trials[0]
    for trial in groups[0].trials:
        if trial.settings.data.split != first.settings.data.split:
            raise ConfigError(
                f"models: {trial.model}: data.split differs from that of {first.model}; all models must see the same "
                "splits: set train.data.split"
            )
    return groups


def _make_trial(settings: SweepSettings, position: _Position) -> Trial:
    """Return a trial. The members of a stack that are names of models become the checkpoints of their trials."""
    model, dataset, prompt, fold, seed = position

    def output_of(name: str) -> str:
        folders = (*map(_safe_name, (name, dataset, prompt)), *_folder_of(settings, fold), f"seed-{seed}")
        return storage.join(settings.output, "trials", *folders)

    tree, needs = settings.models[model], list[str]()
    options = tree.get("options")
    members = options.get("members") if tree.get("model") == STACK and isinstance(options, dict) else None
    if isinstance(members, list):
        names = [name for name in members if isinstance(name, str) and name in settings.models]
        if any(settings.models[name].get("model") == STACK for name in names):
            raise ConfigError(f"models: {model}: a member of the stack is a stack itself; name other models")
        needs = [output_of(name) for name in names]
        uris = [storage.join(output_of(name), "checkpoint") if name in names else name for name in members]
        tree = merge(tree, {"options": {"members": uris}})
    trained = _train_settings(settings, position, tree, output_of(model))
    return Trial(model, dataset, prompt, seed, trained, fold, tuple(needs))


def choose_next(waiting: Sequence[Trial], unfinished: Collection[str]) -> Trial | None:
    """Return the first trial that may start: all trials whose checkpoints it needs are finished. None: none may.

    Args:
        waiting: trials that have not started.
        unfinished: OUTPUT of each trial that runs or has failed.
    """
    missing = {trial.settings.output for trial in waiting} | set(unfinished)
    return next((trial for trial in waiting if missing.isdisjoint(trial.needs)), None)


def folds_of(settings: SweepSettings) -> list[int | None]:
    """Return the numbers of the folds, from 1; one None without folds."""
    return [None] if settings.folds is None else list(range(1, settings.folds + 1))


def list_uri(settings: SweepSettings, name: str, fold: int | None) -> str:
    """Return the location of a list of the sweep: the records of a dataset with their splits; see `folds`."""
    kind = "splits" if fold is None else "folds"
    return storage.join(settings.output, kind, *_folder_of(settings, fold), f"{_safe_name(name)}.parquet")


def _folder_of(settings: SweepSettings, fold: int | None) -> tuple[str, ...]:
    return () if fold is None else (f"fold-{fold}-of-{settings.folds}",)


def _train_settings(
    settings: SweepSettings, position: _Position, model_settings: dict[str, Any], output: str
) -> TrainSettings:
    model, dataset, prompt, fold, seed = position
    tree = merge(settings.train, model_settings)
    tree = merge({"data": {"prompt": prompt}}, tree)
    names = list(settings.datasets) if settings.pooled else [dataset]
    datasets = {name: settings.datasets[name] for name in names}
    try:
        trained = load_settings(TrainSettings, None, [], tree | {"output": output, "datasets": datasets, "seed": seed})
    except ConfigError as error:
        raise ConfigError(f"models: {model}: {error}") from error
    trained = trained.model_copy(update={"data": trained.data.beside([*settings.datasets, *settings.external])})
    if not has_lists(settings, trained.data.split):
        return allow_places(trained, settings.run.allow)
    lists = {name: list_uri(settings, name, fold) for name in names}
    places = places_of((*settings.datasets.values(), *settings.external.values()))  # which the lists name
    return allow_places(trained.model_copy(update={"datasets": lists}), (*settings.run.allow, *places))


def has_lists(settings: SweepSettings, split: SplitSettings) -> bool:
    """Return whether a sweep makes lists, from which it trains: with folds, or if data.split of its models says so."""
    return settings.folds is not None or not split.is_off


def _evaluate_settings(settings: SweepSettings, trials: tuple[Trial, ...]) -> EvaluateSettings:
    first = trials[0]
    systems = {trial.system: [{"checkpoint": storage.join(trial.settings.output, "checkpoint")}] for trial in trials}
    external = settings.external
    if has_lists(settings, first.settings.data.split):
        external = {name: list_uri(settings, name, first.fold) for name in external}
    folders = (_safe_name(first.dataset), _safe_name(first.prompt), *_folder_of(settings, first.fold))
    output = storage.join(settings.output, "evaluations", *folders)
    fixed = {"output": output, "datasets": first.settings.datasets | external, "systems": systems}
    tree = merge({"prompts": ["p1" if first.prompt == "random" else first.prompt]}, settings.evaluate)
    try:
        evaluation = load_settings(EvaluateSettings, None, [], tree | fixed)
    except ConfigError as error:
        raise ConfigError(f"evaluate: {error}") from error
    by_name = {f"models: {trial.model}": trial.settings.data for trial in trials}
    data = share_settings(by_name, evaluation.data).beside([*settings.datasets, *settings.external])
    evaluation = evaluation.model_copy(update={"data": data})
    return allow_places(evaluation, first.settings.run.allow)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return a tree of settings in which the values of `over` replace those of `base`, at every depth."""
    in_both = {
        key: merge(base[key], value) if isinstance(value, dict) and isinstance(base[key], dict) else value
        for key, value in over.items()
        if key in base
    }
    return base | over | in_both


def _safe_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "none"


def tabulate(rows: Iterable[dict[str, Any]], settings: SweepSettings) -> list[dict[str, Any]]:
    """Return the table: mean and standard deviation of Dice over folds and seeds, and the difference to the baseline.

    A row stands for one model, training dataset, test dataset, prompt and prompt class. Its keys are COLUMNS. A seed
    whose records all failed has no mean and does not count in num_seeds.

    Args:
        rows: results of the evaluations, as `sweep_scores.average_scores` returns them.
        settings: settings of the sweep.
    """
    cells: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        key = tuple(str(row[name]) for name in COLUMNS[:4])
        cells.setdefault(key, {}).setdefault(row["model"], []).append(row)
    baseline = settings.baseline or next(iter(settings.models))
    table = []
    for key, models in cells.items():
        dice = {
            model: [float(row["dice"]) for row in results if row["dice"] is not None]
            for model, results in models.items()
        }
        means = {model: statistics.fmean(values) for model, values in dice.items() if values}
        for model, values in dice.items():
            spread = statistics.stdev(values) if len(values) > 1 else None
            difference = means[model] - means[baseline] if {model, baseline} <= means.keys() else None
            num_failed = sum(row["num_failed"] for row in models[model])
            done = [row for row in models[model] if row["dice"] is not None]
            counts = [len({row[name] for row in done}) for name in ("fold", "seed")]
            row_values = (*key, model, *counts, means.get(model), spread, difference, num_failed)
            table.append(dict(zip(COLUMNS, row_values, strict=True)))
    return table


def write_csv(table: list[dict[str, Any]]) -> str:
    """Return the table as CSV."""
    sink = io.StringIO()
    CsvWriter(sink, COLUMNS).write_all(table)
    return sink.getvalue()


def write_markdown(table: list[dict[str, Any]], settings: SweepSettings) -> str:
    """Return the table as Markdown, in percent, as in the paper: a row per model, a column per dataset and prompt.

    The best value of a column is bold. Upper bounds (prompts that describe the label) are in a separate table.
    """
    folds = "" if settings.folds is None else f"{count(settings.folds, 'fold')} with "
    num_seeds = len(settings.seeds)
    parts = [
        f"Dice in percent: mean and standard deviation over {folds}{count(num_seeds, 'seed')}, and the difference to "
    ]
    parts[0] += f"{markdown_cell(settings.baseline or next(iter(settings.models)))}.\n"
    if any(row["num_failed"] for row in table):
        parts[0] += "Failed scores are in no mean; square brackets hold their number, over all seeds.\n"
    for prompt_class, heading in (
        ("honest", ""),
        ("upper_bound", "\n## Upper bound: prompts that reveal the answer\n"),
    ):
        rows = [row for row in table if row["prompt_class"] == prompt_class]
        if rows:
            parts += [heading, *_grid(rows)] if heading else _grid(rows)
    return "\n".join(parts) + "\n"


def _grid(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(map(_column, rows)))
    models = list(dict.fromkeys(row["model"] for row in rows))
    rows_by_cell = {(row["model"], _column(row)): row for row in rows}
    best = {column: max(row["mean"] or 0.0 for row in rows if _column(row) == column) for column in columns}
    headings = [
        markdown_cell(f"{dataset}, {prompt}" + ("" if trained_on == dataset else f" (trained on {trained_on})"))
        for trained_on, dataset, prompt in columns
    ]
    lines = ["| model | " + " | ".join(headings) + " |", "|---" * (len(columns) + 1) + "|"]
    for model in models:
        cells = [_cell(rows_by_cell.get((model, column)), best[column]) for column in columns]
        lines.append(f"| {markdown_cell(model)} | " + " | ".join(cells) + " |")
    return lines


def _column(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["trained_on"], row["dataset"], row["prompt"]


def _cell(row: dict[str, Any] | None, best: float) -> str:
    if row is None:
        return ""
    failed = f" [{row['num_failed']}]" if row["num_failed"] else ""
    if row["mean"] is None:
        return f"none{failed}"
    text = f"{100 * row['mean']:.1f}" + ("" if row["sd"] is None else f" ± {100 * row['sd']:.1f}")
    text = f"**{text}**" if row["mean"] == best else text
    return text + ("" if not row["difference"] else f" ({100 * row['difference']:+.1f})") + failed
