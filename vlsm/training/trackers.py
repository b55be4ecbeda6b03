"""Metrics of a training run for TensorBoard, MLflow, and Weights & Biases."""

import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlsm.errors import ConfigError, optional_packages
from vlsm.training.history import History, Row
from vlsm.training.settings import TrainSettings


@dataclass(frozen=True)
class Tracker:
    """An open run in a tracking tool: `track` takes the rows of an epoch, `finish` ends the run in the tool."""

    track: Callable[[Sequence[Row]], None]
    finish: Callable[[], object]


def check_trackers(settings: TrainSettings) -> None:
    """Check that the packages for curves, adapters and trackers are installed.

    Raises:
        ConfigError: a package is missing.
    """
    with optional_packages("train"):
        for package in ("matplotlib", "tensorboardX", *(["peft"] if settings.trainable == "lora" else [])):
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(name=package)
    for package in ("mlflow", "wandb"):
        if getattr(settings.run, package) and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"run.{package} needs the package {package}: pip install it, here and on all worker nodes"
            )


def tensorboard_events(history: History) -> bytes:
    """Return the content of a TensorBoard events file with all metrics so far.

    Times are the times of the epochs, so the file of a later epoch starts with the same bytes as the earlier file. A
    running TensorBoard can therefore continue at its last position, also after the run was resumed.
    """
    with optional_packages("train"):
        from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for row in history.rows:
                for key, value in _scalars(row).items():
                    writer.add_scalar(key, value, row.epoch, walltime=row.finished_at)
        (path,) = Path(folder).iterdir()
        return path.read_bytes()


def open_trackers(settings: TrainSettings, run_id: str) -> list[Tracker]:
    """Open the trackers that the settings name.

    Args:
        settings: run.mlflow and run.wandb are used.
        run_id: id of the run; a resumed run has the same id.

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

    if "://" not in uri or uri.startswith("file:"):  # MLflow 3 needs this before it writes plain files
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("vlsm")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("vlsm")
    earlier_runs = client.search_runs([experiment_id], f"tags.vlsm_run = '{run_id}'")
    if earlier_runs:
        mlflow_id = earlier_runs[0].info.run_id
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
