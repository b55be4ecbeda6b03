"""The group of training workers: its size, its work, the board that collects its messages, and Ray Train that runs it.

Ray Train's controller imports this module, so it must not import torch. Only the workers import `jobs.train_worker`.
"""

import pkgutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.crash_watch import Milestones
from jobs.train_feed import Decoded
from vlsm.config import parse_range
from vlsm.events import event
from vlsm.runs.lease import Token
from vlsm.training.settings import TrainSettings

FIRST_STEP = "first step"
# what follows a milestone, for a person who waits
_PHASES = {"workers": "the workers load the model", "model": "the workers read the first images"}

Line = tuple[str, dict[str, Any] | None]  # a text, and what `vlsm.events.event` returns
TRAIN_WORKER = "jobs.train_worker:train_worker"


@dataclass(frozen=True)
class GroupSize:
    """The smallest and the largest number of workers, and the CPUs, GPUs and torch threads of each worker."""

    num_workers: tuple[int, int]
    cpus: float
    gpus: float
    num_threads: int


@dataclass(frozen=True)
class Work:
    """The work that the driver gives to each worker.

    Attributes:
        settings: settings of the run.
        run_id: id of the run; a resumed run has the same id.
        decoded: the decoded examples in Ray's object store, or None if they are not kept there.
        board: handle of the `TrainingBoard` actor.
        size: size of the group.
        features_kind: kind of the temporary folders for the feature cache; see `vlsm.temporary`.
        lease: the lease of OUTPUT; the first worker checks it before it writes. None: nothing is checked.
    """

    settings: TrainSettings
    run_id: str
    decoded: Decoded | None
    board: Any
    size: GroupSize
    features_kind: str
    lease: Token | None = None


class TrainingBoard(Milestones):
    """The messages of the workers to the driver: milestones, log lines, and the error that ends the run."""

    def __init__(self, milestones: Mapping[str, float] | None = None) -> None:
        super().__init__(milestones)
        self._lines: list[Line] = []
        self._failure: str | None = None
        self._progress: dict[str, int] | None = None

    def reach(self, name: str, time_s: float) -> None:
        """Record a milestone, and add a log line with what follows; after the first step, with all milestones."""
        is_first = name not in self._milestones
        super().reach(name, time_s)
        if is_first and name == FIRST_STEP:
            self.say(self.describe())
        elif is_first and name in _PHASES:
            self.say(_PHASES[name], event("phase", phase=_PHASES[name]))

    def say(self, text: str, extra: dict[str, Any] | None = None) -> None:
        """Add a log line; `extra` is what `vlsm.events.event` returns."""
        self._lines.append((text, extra))

    def note(self, progress: dict[str, int]) -> None:
        """Record the current epoch and step, for `jobs.status`."""
        self._progress = progress

    def take(self) -> tuple[list[Line], dict[str, int] | None]:
        """Return the log lines since the last call, and the last progress."""
        lines, self._lines = self._lines, []
        return lines, self._progress

    def fail(self, message: str) -> None:
        """Record the error that ends the run. Only the first one is kept."""
        self._failure = self._failure or message

    def failure(self) -> str | None:
        """Return the error that ends the run, or None."""
        return self._failure


def group_size(settings: TrainSettings, nodes: list[dict[str, Any]]) -> GroupSize:
    """Return the size of the group: by default one worker per GPU, or one worker on CPUs.

    Workers on CPUs take three quarters of them. The tasks that load examples use the rest. A worker computes with as
    many threads as it has CPUs; the default uses all, since loading waits most of the time.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = sum(node.get("GPU", 0) for node in resources)
    run = settings.run
    gpus_per_worker = run.gpus_per_worker if run.gpus_per_worker is not None else float(gpus > 0)
    default = max(1, int(gpus / gpus_per_worker)) if gpus_per_worker else 1
    low, high = parse_range(run.workers, default)
    most = max(node.get("CPU", 0) for node in resources)
    share = min(sum(node.get("CPU", 0) for node in resources) / high, most)
    cpus = run.cpus_per_worker or (1.0 if gpus_per_worker else max(0.01, int(75 * share) / 100))
    threads = cpus if gpus_per_worker or run.cpus_per_worker else share
    return GroupSize((low, high), cpus, gpus_per_worker, max(1, round(threads)))


def share_cpus(settings: TrainSettings, nodes: list[dict[str, Any]], parallel: int) -> TrainSettings:
    """Return the settings of one of `parallel` trainings at once: on CPUs, each of several has its part of them.

    With the default of a single training, the second would wait for the CPUs of the first.
    """
    size = group_size(settings, nodes)
    if parallel == 1 or size.gpus or settings.run.cpus_per_worker:
        return settings
    run = settings.run.model_copy(update={"cpus_per_worker": max(0.01, int(100 * size.cpus / parallel) / 100)})
    return settings.model_copy(update={"run": run})


class Ended(threading.Event):
    """An event that is set when the training has ended, with its error if it failed."""

    error: BaseException | None = None


def fit_in_background(work: Work, folder: Path, worker: str = TRAIN_WORKER) -> Ended:
    """Start Ray Train in a thread and return the event of its end.

    In the main thread, Ray Train would handle Ctrl-C itself and end the process with exit code 0.

    Args:
        work: work for each worker.
        folder: a temporary folder; Ray Train needs one, although vlsm keeps nothing there.
        worker: MODULE:NAME of the function that each worker calls with the work.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    size = work.size
    low, high = size.num_workers
    trainer = TorchTrainer(
        _train,
        train_loop_config={"work": work, "worker": worker},
        scaling_config=ScalingConfig(
            num_workers=low if low == high else (low, high),  # type: ignore[arg-type]
            use_gpu=size.gpus > 0,
            resources_per_worker={"CPU": size.cpus} | ({"GPU": size.gpus} if size.gpus else {}),
        ),
        run_config=RunConfig(
            name=f"{work.run_id}-{time.time_ns()}",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=work.settings.run.max_failures),
        ),
    )
    ended = Ended()

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # the main thread handles every kind of error
            ended.error = error
        ended.set()

    threading.Thread(target=fit, daemon=True).start()
    return ended


def _train(config: dict[str, Any]) -> None:
    pkgutil.resolve_name(config["worker"])(config["work"])
