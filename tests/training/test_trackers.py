"""What the trackers get, and that none of them can hold up or end a training."""

import socket
import sys
import time
from pathlib import Path

import pytest

from vlsm.config import load_settings
from vlsm.training.history import History, Row
from vlsm.training.settings import TrainSettings
from vlsm.training.trackers import Connection, Tracker, open_trackers, tensorboard_events, write_events


def rows_of(epoch, split="val", finished_at=None):
    time_s = 1e9 + epoch if finished_at is None else finished_at
    return [Row(epoch, epoch * 5, split, name, 1 / epoch, 0.5, 4, 0.1, 1.0, time_s) for name in ("a", "mean")]


def settings_of(*words):
    return load_settings(TrainSettings, None, ["model=pixel", *words], {"output": "/out", "datasets": {"a": "/a"}})


class Reader:
    """Reads an events file as TensorBoard does: it opens the file once, and later reads on where it was."""

    def __init__(self, path):
        self._file = path.open("rb")

    def read_on(self):
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        found = []
        while length := self._file.read(8):
            assert int.from_bytes(self._file.read(4), "little") == masked_crc32c(length)
            body = self._file.read(int.from_bytes(length, "little"))
            assert int.from_bytes(self._file.read(4), "little") == masked_crc32c(body)
            event = Event.FromString(body)
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        return found


def test_a_reader_that_keeps_the_file_open_sees_later_epochs(tmp_path):
    history = History(rows_of(1))
    write_events(str(tmp_path), history)
    (path,) = (tmp_path / "tensorboard").iterdir()
    reader = Reader(path)
    assert ("loss/val/a", 1, 1.0) in reader.read_on()
    for epoch in (2, 4):
        history.rows += rows_of(epoch)
        write_events(str(tmp_path), history)
        assert [found[1:] for found in reader.read_on() if found[0] == "loss/val/a"] == [(epoch, 1 / epoch)]
    assert path.read_bytes() == tensorboard_events(history)


def test_an_epoch_that_is_repeated_after_a_crash_moves_no_reader(tmp_path):
    """The repeated epoch ended at another time; the crash cut the file in the middle of a record."""
    write_events(str(tmp_path), History(rows_of(1) + rows_of(2)))
    (path,) = (tmp_path / "tensorboard").iterdir()
    reader = Reader(path)
    reader.read_on()
    for cut in (0, 5):
        path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])
        history = History(rows_of(1) + rows_of(2, finished_at=2e9 + cut))
        write_events(str(tmp_path), history)
        assert path.read_bytes() == tensorboard_events(history)
    write_events(str(tmp_path), History(history.rows + rows_of(3)))
    assert {found[1] for found in reader.read_on()} == {3}


def test_events_in_a_store_are_complete_objects(s3_folder):
    from vlsm import storage

    for epochs in (1, 2):
        history = History([row for epoch in range(1, epochs + 1) for row in rows_of(epoch)])
        write_events(s3_folder, history)
        assert storage.read_bytes(f"{s3_folder}/tensorboard/events.out.tfevents.0.vlsm") == tensorboard_events(history)


def test_a_tool_that_fails_costs_one_warning_and_gets_everything_when_it_is_back():
    got, said, is_away = [], [], [True]

    def connect():
        if is_away[0]:
            raise ConnectionError("refused by\nthe server")
        return Connection(lambda rows: got.append(rows[0].epoch), got.append)

    tracker = Tracker("MLflow", connect, said.append)
    tracker.track(rows_of(1))
    tracker.track(rows_of(2))
    while len(tracker._unsent) < 2:
        time.sleep(0.01)
    is_away[0] = False
    tracker.track(rows_of(3))
    tracker.finish("folder")
    assert got == [1, 2, 3, "folder"]
    assert said == ["MLflow cannot be used: refused by the server; the training goes on, and tries it again"]


def test_a_server_that_takes_connections_and_never_answers_holds_up_nobody():
    said = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        settings = settings_of(f"run.mlflow=http://127.0.0.1:{server.getsockname()[1]}")
        (tracker,) = open_trackers(settings, "run", said.append)
        began_s = time.monotonic()
        tracker.track(rows_of(1))
        tracker.finish(None, patience_s=0.1)
        assert time.monotonic() - began_s < 10
    assert said[-1].startswith("MLflow did not get all metrics and files; OUTPUT has them")


def test_mlflow_gets_metrics_and_files(tmp_path):
    (tmp_path / "files" / "checkpoint").mkdir(parents=True)
    (tmp_path / "files" / "checkpoint" / "checkpoint.yaml").write_text("model: pixel")
    said = []
    (tracker,) = open_trackers(settings_of(f"run.mlflow=file://{tmp_path}/mlruns"), "run", said.append)
    tracker.track(rows_of(1))
    tracker.track(rows_of(1, "test"))
    tracker.finish(str(tmp_path / "files"))
    assert said == []
    from mlflow import MlflowClient

    client = MlflowClient(f"file://{tmp_path}/mlruns")
    (found,) = client.search_runs([client.get_experiment_by_name("vlsm").experiment_id])
    assert (found.info.status, found.data.metrics["dice/test/mean"]) == ("FINISHED", 0.5)
    assert [entry.path for entry in client.list_artifacts(found.info.run_id, "checkpoint")] == [
        "checkpoint/checkpoint.yaml"
    ]


WANDB = """
kept, files = [], []
class Artifact:
    def __init__(self, name, type): pass
    def add_dir(self, folder): files.append(folder)
class Run:
    step = -1
    def define_metric(self, name, step_metric): pass
    def log(self, values, step=None):
        step = self.step + 1 if step is None else step
        if step > self.step:  # as its documentation says: a step that goes backwards is dropped
            self.step = step
            kept.append(values)
    def log_artifact(self, artifact): pass
    def finish(self): pass
def init(**options): return Run()
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A stand-in with the rule of steps: the package is not installed for tests."""
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


def test_weights_and_biases_gets_the_test_of_an_earlier_epoch(wandb, tmp_path):
    said = []
    (tracker,) = open_trackers(settings_of("run.wandb=project"), "run", said.append)
    for rows in (rows_of(1), rows_of(2), rows_of(3), rows_of(2, "test")):
        tracker.track(rows)
    tracker.finish(str(Path(tmp_path)))
    assert said == []
    assert [values["epoch"] for values in wandb.kept] == [1, 2, 3, 2]
    assert wandb.kept[-1]["dice/test/mean"] == 0.5
    assert wandb.files == [str(tmp_path)]
