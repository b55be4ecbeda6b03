"""Metrics of a training run for the tools in which people compare runs."""

import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlsm.errors import ConfigError
from vlsm.training.history import History, Row
from vlsm.training.settings import TrainSettings


@dataclass(frozen=True)
class Tracker:
    """One of them: what takes an epoch's rows, and what ends the run there when it is finished."""

    track: Callable[[Sequence[Row]], None]
    finish: Callable[[], object]


def check_trackers(settings: TrainSettings) -> None:
    """Nothing, or a ConfigError where the package of a tracker that the settings name is not installed."""
    for package in ("mlflow", "wandb"):
        if getattr(settings.run, package) and importlib.util.find_spec(package) is None:
            raise ConfigError(f"run.{package} needs the package {package}: pip install it, here and where workers run")


def tensorboard_events(history: History) -> bytes:
    """An events file with all metrics so far.

    Times are those of the epochs: the file of a later epoch begins as the one before it, so that a TensorBoard which
    reads along goes on where it was, also after the run was taken up again.
    """
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for row in history.rows:
                for key, value in _scalars(row).items():
                    writer.add_scalar(key, value, row.epoch, walltime=row.finished_at)
        (path,) = Path(folder).iterdir()
        return path.read_bytes()


def open_trackers(settings: TrainSettings, run_id: str) -> list[Tracker]:
    """Those that the settings name.

    Args:
        settings: run.mlflow and run.wandb.
        run_id: the same when the run is taken up again.

    Raises:
        ConfigError: a tracker's package is not installed.
    """
    check_trackers(settings)
    trackers = []
    if settings.run.mlflow:
        trackers.append(_open_mlflow(settings.run.mlflow, settings, run_id))
    if settings.run.wandb:
        trackers.append(_open_wandb(settings, run_id))
    return trackers


def _open_mlflow(uri: str, settings: TrainSettings, run_id: str) -> Tracker:
    from mlflow import MlflowClient

    if "://" not in uri or uri.startswith("file:"):  # MLflow 3 wants to be told that plain files are wanted
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("vlsm")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("vlsm")
    found = client.search_runs([experiment_id], f"tags.vlsm_run = '{run_id}'")
    if found:
        mlflow_id = found[0].info.run_id
    else:
        tags, name = {"vlsm_run": run_id, "output": settings.output}, settings.output.rsplit("/", 1)[-1]
        mlflow_id = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
        for key, value in _parameters(settings).items():
            client.log_param(mlflow_id, key, value)

    def track(rows: Sequence[Row]) -> None:
        for row in rows:
            for key, value in _scalars(row).items():
                client.log_metric(mlflow_id, key, value, int(row.finished_at * 1000), row.epoch)

    return Tracker(track, lambda: client.set_terminated(mlflow_id))


def _open_wandb(settings: TrainSettings, run_id: str) -> Tracker:
    import wandb

    run = wandb.init(
        project=settings.run.wandb, id=run_id, resume="allow", config=_parameters(settings), dir=tempfile.gettempdir()
    )

    def track(rows: Sequence[Row]) -> None:
        values = {key: value for row in rows for key, value in _scalars(row).items()}
        run.log(values, step=rows[-1].epoch)

    return Tracker(track, run.finish)


def _scalars(row: Row) -> dict[str, float]:
    scalars = {f"{name}/{row.split}/{row.dataset}": getattr(row, name) for name in ("loss", "dice")}
    return scalars | ({"lr": row.lr, "seconds": row.seconds} if row.split == "train" else {})


def _parameters(settings: TrainSettings) -> dict[str, Any]:
    from vlsm.config import flatten

    return flatten(settings.model_dump(mode="json", exclude={"run", "start_over"}))
