"""Metrics of a training run for TensorBoard, MLflow, and Weights & Biases."""

import importlib.util
import logging
import os
import queue
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vlsm import storage
from vlsm.errors import ConfigError, optional_packages
from vlsm.shown import hide_secrets, hide_secrets_in, public_uri
from vlsm.temporary import PrivateFolder
from vlsm.training.history import History, Row
from vlsm.training.settings import TrainSettings

logger = logging.getLogger("vlsm")

_EVENTS_NAME = "events.out.tfevents.0.vlsm"
_FINISH_S = 300.0  # a tracker gets this time after the training to take what is left, the checkpoint included
# a server that does not answer must not hold back the other rows for the minutes of these packages' own defaults
_LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "WANDB_INIT_TIMEOUT": "60"}


@dataclass(frozen=True)
class Connection:
    """An open run in a tracking tool.

    Attributes:
        track: sends the rows of an epoch.
        finish: sends the files of a folder, if there is one, and ends the run in the tool.
    """

    track: Callable[[Sequence[Row]], None]
    finish: Callable[[str | None], None]


class Tracker:
    """Sends metrics to a tracking tool in a thread. A tool that fails costs a warning; it never holds up the training.

    Rows that could not be sent are sent with the next ones. If the process dies, metrics.parquet still has them all.

    Args:
        name: name of the tool, for messages.
        connect: opens the run in the tool.
        say: takes the warnings.
    """

    def __init__(self, name: str, connect: Callable[[], Connection], say: Callable[[str], None]) -> None:
        self._name, self._connect, self._say = name, connect, say
        self._connection: Connection | None = None
        self._is_failing = False
        self._new: queue.SimpleQueue[Callable[[Connection], None] | None] = queue.SimpleQueue()
        self._unsent: deque[Callable[[Connection], None]] = deque()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def track(self, rows: Sequence[Row]) -> None:
        """Send the rows of an epoch. Returns at once."""
        self._new.put(lambda connection: connection.track(rows))

    def finish(self, folder: str | None = None, patience_s: float = _FINISH_S) -> None:
        """Send what is left, and the files of a folder, and end the run in the tool. Wait for this time at most."""
        self._new.put(lambda connection: connection.finish(folder))
        self._new.put(None)
        self._thread.join(patience_s)
        if self._thread.is_alive() or self._unsent:
            self._say(
                f"{self._name} did not get all metrics and files; OUTPUT has them: metrics.parquet and checkpoint/"
            )

    def _run(self) -> None:
        while (send := self._new.get()) is not None:
            self._unsent.append(send)
            try:
                if self._connection is None:
                    self._connection = self._connect()
                while self._unsent:
                    self._unsent[0](self._connection)
                    self._unsent.popleft()
                self._is_failing = False
            except Exception as error:  # whatever the package raises: the training does not depend on it
                if not self._is_failing:
                    reason = hide_secrets(" ".join(str(error).split()))[:300]
                    self._say(f"{self._name} cannot be used: {reason}; the training goes on, and tries it again")
                self._is_failing = True


def check_trackers(settings: TrainSettings) -> None:
    """Check that the packages for curves, adapters and trackers are installed.

    Raises:
        ConfigError: a package is missing.
    """
    with optional_packages("train"):
        for package in ("matplotlib", "tensorboardX", *(["peft"] if settings.trainable in ("lora", "dora") else [])):
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(name=package)
    for package in ("mlflow", "wandb"):
        if getattr(settings.run, package) and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"run.{package} needs the package {package}: pip install it, here and on all worker nodes"
            )


def write_events(output: str, history: History) -> None:
    """Write all metrics so far to the events file in OUTPUT/tensorboard.

    TensorBoard keeps an events file of a local disk open, so the file is continued there and never replaced. Elsewhere
    TensorBoard opens it again by name.
    """
    data = tensorboard_events(history)
    uri = storage.join(output, "tensorboard", _EVENTS_NAME)
    fs, path = storage.open_uri(uri)
    if not storage.is_local(fs):
        storage.write_bytes(uri, data)
        return
    with storage.name_full_disk(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # never through a link, which may lead out of OUTPUT
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+b") as file:
            before = file.read()
            # an epoch that was repeated after a crash has other times, but records of the same lengths
            start = len(before) if data.startswith(before) else 0
            file.seek(start)
            file.write(data[start:])
            file.truncate()


def tensorboard_events(history: History) -> bytes:
    """Return the content of a TensorBoard events file with all metrics so far.

    It follows from the history alone. The file of a later epoch starts with the same bytes as the earlier file.
    """
    with optional_packages("train"):
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c
        from tensorboardX.summary import scalar

    first_s = history.rows[0].finished_at if history.rows else 0.0
    events = [Event(wall_time=first_s, file_version="brain.Event:2")]
    for row in history.rows:
        for key, value in _scalars(row).items():
            events.append(Event(wall_time=row.finished_at, step=row.epoch, summary=scalar(key, value)))
    records = bytearray()
    for event in events:
        body = event.SerializeToString()
        length = struct.pack("<Q", len(body))
        records += length + struct.pack("<I", masked_crc32c(length)) + body + struct.pack("<I", masked_crc32c(body))
    return bytes(records)


def open_trackers(settings: TrainSettings, run_id: str, say: Callable[[str], None]) -> list[Tracker]:
    """Open the trackers that the settings name. Returns at once; each opens its run in its own thread.

    Args:
        settings: run.mlflow and run.wandb are used.
        run_id: id of the run; a resumed run has the same id.
        say: takes the warnings of the trackers.

    Raises:
        ConfigError: a tracker's package is not installed.
    """
    check_trackers(settings)
    for name, value in _LIMITS.items():
        os.environ.setdefault(name, value)
    trackers = []
    if settings.run.mlflow:
        trackers.append(Tracker("MLflow", partial(_open_mlflow, settings.run.mlflow, settings, run_id), say))
    if settings.run.wandb:
        trackers.append(Tracker("Weights & Biases", partial(_open_wandb, settings, run_id), say))
    return trackers


def _open_mlflow(uri: str, settings: TrainSettings, run_id: str) -> Connection:
    if "://" not in uri or uri.startswith("file:"):  # MLflow 3 needs this before it writes plain files
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    mlflow_id = _open_mlflow_run(client, settings, run_id)

    def track(rows: Sequence[Row]) -> None:
        for row in rows:
            for key, value in _scalars(row).items():
                client.log_metric(mlflow_id, key, value, int(row.finished_at * 1000), row.epoch)

    def finish(folder: str | None) -> None:
        if folder is not None:
            client.log_artifacts(mlflow_id, folder)
        client.set_terminated(mlflow_id)

    return Connection(track, finish)


def _open_mlflow_run(client: Any, settings: TrainSettings, run_id: str) -> str:
    """Return MLflow's id of the run; a resumed run has one already."""
    experiment = client.get_experiment_by_name("vlsm")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("vlsm")
    earlier_runs = client.search_runs([experiment_id], f"tags.vlsm_run = '{run_id}'")
    if earlier_runs:
        return str(earlier_runs[0].info.run_id)
    output = public_uri(settings.output)
    tags, name = {"vlsm_run": run_id, "output": output}, output.rsplit("/", 1)[-1]
    mlflow_id = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
    for key, value in _parameters(settings).items():
        client.log_param(mlflow_id, key, value)
    return str(mlflow_id)


def _open_wandb(settings: TrainSettings, run_id: str) -> Connection:
    import wandb

    folder = PrivateFolder("wandb")
    run = wandb.init(
        project=settings.run.wandb, id=run_id, resume="allow", config=_parameters(settings), dir=str(folder.path)
    )
    # its own step may only grow, but the test is that of an earlier epoch, and a resumed run may repeat an epoch
    run.define_metric("*", step_metric="epoch")

    def track(rows: Sequence[Row]) -> None:
        values = {key: value for row in rows for key, value in _scalars(row).items()}
        run.log(values | {"epoch": rows[-1].epoch})

    def finish(files: str | None) -> None:
        if files is not None:
            artifact = wandb.Artifact(f"training-{run_id}", type="model")
            artifact.add_dir(files)
            run.log_artifact(artifact)
        run.finish()
        folder.remove()

    return Connection(track, finish)


def _scalars(row: Row) -> dict[str, float]:
    scalars = {f"{name}/{row.split}/{row.dataset}": getattr(row, name) for name in ("loss", "dice")}
    return scalars | ({"lr": row.lr, "seconds": row.seconds} if row.split == "train" else {})


def _parameters(settings: TrainSettings) -> dict[str, Any]:
    from vlsm.config import flatten

    return flatten(hide_secrets_in(settings.model_dump(mode="json", exclude={"run", "start_over"})))
