"""A group of training workers: how many, what each is told, what they say, and Ray Train that keeps them alive.

Ray Train's controller imports this module, so it imports no torch: `jobs.train_worker` is for the workers alone.
"""

import pkgutil
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.crash_watch import Milestones
from jobs.train_feed import Decoded
from vlsm.config import parse_range
from vlsm.training.settings import TrainSettings

FIRST_STEP = "first step"
TRAIN_WORKER = "jobs.train_worker:train_worker"


@dataclass(frozen=True)
class Work:
    """What the driver tells each worker.

    Attributes:
        settings: of the run.
        run_id: the same when the run is taken up again.
        decoded: the examples where they are kept decoded.
        board: a `TrainingBoard` for what there is to say.
        num_threads: that torch may use.
    """

    settings: TrainSettings
    run_id: str
    decoded: Decoded | None
    board: Any
    num_threads: int


class TrainingBoard(Milestones):
    """What workers have to say: lines for the log, and why the run cannot go on."""

    def __init__(self, milestones: Mapping[str, float] | None = None) -> None:
        super().__init__(milestones)
        self._lines: list[str] = []
        self._failure: str | None = None

    def reach(self, name: str, time_s: float) -> None:
        """Note a milestone. After the first step, the log gets a line with all milestones."""
        is_first = name not in self._milestones
        super().reach(name, time_s)
        if is_first and name == FIRST_STEP:
            self.say(self.describe())

    def say(self, line: str) -> None:
        """Add a line."""
        self._lines.append(line)

    def take(self) -> list[str]:
        """The lines since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def fail(self, message: str) -> None:
        """The run cannot go on; the first reason counts."""
        self._failure = self._failure or message

    def failure(self) -> str | None:
        """Why the run cannot go on, or None."""
        return self._failure


@dataclass(frozen=True)
class GroupSize:
    """What Ray is asked for: workers, the fewest and the most, and what each takes."""

    num_workers: tuple[int, int]
    cpus: float
    gpus: float
    num_threads: int


def group_size(settings: TrainSettings, nodes: list[dict[str, Any]]) -> GroupSize:
    """A worker per GPU, or one; a quarter of the CPUs is left to the tasks that feed them."""
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = sum(node.get("GPU", 0) for node in resources)
    run = settings.run
    gpus_per_worker = run.gpus_per_worker if run.gpus_per_worker is not None else float(gpus > 0)
    default = max(1, int(gpus / gpus_per_worker)) if gpus_per_worker else 1
    low, high = parse_range(run.workers, default)
    most = max(node.get("CPU", 0) for node in resources)
    share = min(sum(node.get("CPU", 0) for node in resources) / high, most)
    cpus = run.cpus_per_worker or (1.0 if gpus_per_worker else max(0.01, int(75 * share) / 100))
    return GroupSize((low, high), cpus, gpus_per_worker, max(1, round(cpus if gpus_per_worker else share)))


class Ended(threading.Event):
    """That training has ended, and how."""

    error: BaseException | None = None


def fit_in_background(work: Work, size: GroupSize, worker: str = TRAIN_WORKER) -> Ended:
    """Start Ray Train in a thread: in the main one it would take Ctrl-C for itself, and end with exit code 0.

    Args:
        work: what each worker is told.
        size: of the group.
        worker: MODULE:NAME of the function that each calls with the work.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    low, high = size.num_workers
    trainer = TorchTrainer(
        _train,
        train_loop_config={"work": work, "worker": worker},
        scaling_config=ScalingConfig(
            num_workers=low if low == high else (low, high),
            use_gpu=size.gpus > 0,
            resources_per_worker={"CPU": size.cpus} | ({"GPU": size.gpus} if size.gpus else {}),
        ),
        run_config=RunConfig(
            name=f"{work.run_id}-{time.time_ns()}",
            storage_path=tempfile.gettempdir(),  # nothing of ours goes there
            failure_config=FailureConfig(max_failures=work.settings.run.max_failures),
        ),
    )
    ended = Ended()

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # whatever it is, the main thread is to know
            ended.error = error
        ended.set()

    threading.Thread(target=fit, daemon=True).start()
    return ended


def _train(config: dict[str, Any]) -> None:
    pkgutil.resolve_name(config["worker"])(config["work"])
