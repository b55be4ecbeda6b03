"""Both jobs on two nodes against one node, one CPU per node, and the seconds from submission to the first image."""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import vlsm
from jobs.benchmarks.archives import write_files
from jobs.benchmarks.figures import write_json
from jobs.benchmarks.stores import free_port
from jobs.command import start_patiently
from jobs.phantoms import write_labelled
from vlsm.errors import ConfigError, ResultError

_ROOT = Path(__file__).parents[2]
_STORE_BYTES = 400 << 20  # object store of each node
_AGENT_S = 300.0  # a cluster is waited for so long that takes no jobs yet


@dataclass(frozen=True)
class Scaling:
    """Speed of one job on one node and on two.

    Attributes:
        name: "segment" or "train".
        start_s: seconds from submission to the first image, on one node.
        one_per_s, two_per_s: images per second in the steady state, on one node and on two.
    """

    name: str
    start_s: float
    one_per_s: float
    two_per_s: float


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `python -m jobs.benchmark nodes`."""
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="interleaved rounds; the median counts (5)")
    parser.add_argument(
        "--images", type=int, default=192, metavar="N", help="images to segment (192); training gets N / 8"
    )
    parser.add_argument(
        "--image-size", type=int, default=224, metavar="N", help="input side of the model, pixels (224)"
    )


def measure(args: Namespace) -> int:
    """Measure both jobs with a full UNet-D on clusters of one and of two nodes. Each node has one core of this machine.

    Raises:
        ConfigError: this process may use fewer than two cores, or the extra `cluster` is not installed.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2 or find_spec("opencensus") is None:
        raise ConfigError(
            f"this benchmark needs two cores (here: {len(cores)}) and the package's extra: pip install '.[cluster]'"
        )
    print(f"{'job':8} {'start, s':>9} {'1 node':>9} {'2 nodes, images/s':>18} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_files(folder / "images", args.images)
        write_labelled(folder / "labelled", {"train": args.images // 8, "val": 2}, seed=0)
        model = vlsm.build_model("unet_d", image_size=args.image_size)
        vlsm.save_checkpoint(model, folder / "checkpoint", prompt="polyp")
        timed: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for repeat in range(args.repeats):
            for count in (1, 2):
                with _cluster(cores[:count]) as address:
                    for name, run in (("segment", _segment), ("train", _train)):
                        output = folder / f"{name} {count} {repeat}"
                        timed.setdefault((name, count), []).append(run(address, folder, output, args, count))
            scalings = [_summarize(name, timed[name, 1], timed[name, 2]) for name in ("segment", "train")]
            for scaling in scalings:
                print(
                    f"{scaling.name:8} {scaling.start_s:9.1f} {scaling.one_per_s:9.2f} {scaling.two_per_s:18.2f} "
                    f"{scaling.two_per_s / scaling.one_per_s:5.2f}x; {repeat + 1} of {args.repeats}",
                    flush=True,
                )
            setup = {"repeats": repeat + 1, "images": args.images, "image_size": args.image_size}
            write_json(args.json, "nodes", setup | {"runs": [asdict(scaling) for scaling in scalings]})
    return 0


def tell(figures: dict[str, Any]) -> list[str]:
    """Return the measured figures as lines of Markdown for the documentation."""
    rounds = f"medians of {figures['repeats']} rounds" if figures["repeats"] > 1 else "one round"
    lines = [
        f"Both jobs with a full `unet_d` at {figures['image_size']} pixels, by `ray job submit` on clusters "
        f"of one and of two nodes of one core each, {rounds}. The start is from submitting to the first image.",
        "",
        "| job | start, s | images/s on one node | on two | ratio |",
        "|---|---|---|---|---|",
    ]
    for job in figures["runs"]:
        lines.append(
            f"| {job['name']} | {job['start_s']:.0f} | {job['one_per_s']:.2f} | {job['two_per_s']:.2f} | "
            f"{job['two_per_s'] / job['one_per_s']:.2f}x |"
        )
    return lines


def _summarize(name: str, one: list[tuple[float, float]], two: list[tuple[float, float]]) -> Scaling:
    return Scaling(
        name,
        round(statistics.median(start_s for start_s, _ in one), 1),
        round(statistics.median(per_s for _, per_s in one), 3),
        round(statistics.median(per_s for _, per_s in two), 3),
    )


@contextlib.contextmanager
def _cluster(cores: list[int]) -> Iterator[str]:
    """Start a head without CPUs and one node per core; yield the address for job submission."""
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_num_workers_soft_limit", "64")  # as in cluster.yaml
    port = free_port()
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port, "object_store_memory": _STORE_BYTES}
    cluster = start_patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
    allowed = os.sched_getaffinity(0)
    try:
        for core in cores:
            os.sched_setaffinity(0, {core})  # processes that start now inherit this core
            start_patiently(lambda: cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES))
            os.sched_setaffinity(0, allowed)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.sched_setaffinity(0, allowed)
        cluster.shutdown()


def _submit(address: str, *words: str) -> float:
    """Submit a job, wait for its end, and return the time of submission in seconds since 1970.

    A cluster takes no job until an agent runs. This takes long on a busy machine, so the job is submitted again.
    """
    submit = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", address]
    command = [*submit, "--working-dir", str(_ROOT), "--", sys.executable, "-m", *words]
    deadline_s = time.monotonic() + _AGENT_S
    while True:
        submitted_s = time.time()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "No available agent" not in done.stdout + done.stderr or time.monotonic() > deadline_s:
            break
    if done.returncode:
        raise ResultError(f"the job failed: {done.stdout[-3000:]} {done.stderr[-1000:]}")
    return submitted_s


def _segment(address: str, folder: Path, output: Path, args: Namespace, num_nodes: int) -> tuple[float, float]:
    """Return the seconds to the first part of four images, and the images per second over the second half of the parts.

    The model of the second node loads some seconds after the first; the second half of the parts excludes this time.
    """
    words = ["jobs.segment", str(folder / "images"), str(output), "--checkpoint", str(folder / "checkpoint")]
    settings = "shard_rows=4", "run.batch_size=4", f"run.actors={num_nodes}..{num_nodes}"
    submitted_s = _submit(address, *words, *_set(settings))
    written_s = sorted(path.stat().st_mtime for path in (output / "masks").glob("part-*"))
    later = written_s[len(written_s) // 2 :]
    return written_s[0] - submitted_s, 4 * (len(later) - 1) / (later[-1] - later[0])


def _train(address: str, folder: Path, output: Path, args: Namespace, num_nodes: int) -> tuple[float, float]:
    """Return the seconds to the first step, and the images per second over all epochs after the first."""
    settings = ["model=unet_d", f"options.image_size={args.image_size}", "optim.batch_size=8", "optim.epochs=3"]
    settings.append(f"run.workers={num_nodes}")
    words = ["jobs.train", str(output), "--dataset", f"drawn={folder / 'labelled'}"]
    submitted_s = _submit(address, *words, *_set(settings))
    rows = pq.read_table(output / "metrics.parquet").to_pylist()
    first_epoch, *later_epochs = (row for row in rows if (row["split"], row["dataset"]) == ("train", "mean"))
    start_s = first_epoch["finished_at"] - first_epoch["seconds"] - submitted_s
    num_examples = sum(row["num_examples"] for row in later_epochs)
    return start_s, num_examples / sum(row["seconds"] for row in later_epochs)


def _set(settings: "tuple[str, ...] | list[str]") -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]
