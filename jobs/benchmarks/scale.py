"""The segment job over archives of growing size: rows per second and memory of the driver, with a trivial model."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

import vlsm
from jobs.benchmarks.archives import SMALL_PX, write_files, write_manifest
from jobs.benchmarks.figures import write_json
from vlsm.errors import ResultError

_ROOT = Path(__file__).parents[2]
_NUM_FILES = 4096  # different files; the rows name them in order, so the files of a shard of up to 4096 rows differ


@dataclass(frozen=True)
class Growth:
    """Measurements of one run.

    Attributes:
        num_rows: rows of the manifest.
        rows_per_s: rows per second from the first to the last image.
        planning_s: seconds from the command until config.yaml exists.
        seconds: seconds of the whole command, including the start of Ray.
        verify_s: seconds of `jobs.verify`, which decodes every mask.
        peak_mb: peak resident memory of the driver, in 10^6 bytes.
    """

    num_rows: int
    rows_per_s: float
    planning_s: float
    seconds: float
    verify_s: float
    peak_mb: float


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `python -m jobs.benchmark scale`."""
    parser.add_argument(
        "--rows", action="append", type=int, metavar="N", help="rows; may be repeated (1000, 10000, 100000)"
    )
    parser.add_argument("--shard-rows", type=int, default=1024, metavar="N", help="rows per shard (1024)")
    parser.add_argument("--folder", metavar="DIR", help="folder of the runs (a temporary folder)")


def measure(args: Namespace) -> int:
    """Measure rows per second and peak driver memory of the segment job with a model of four weights.

    The rows name small images on the local disk. The images of one shard differ, up to 4096 rows per shard.
    """
    print(f"{'rows':>11} {'rows/s':>9} {'planning, s':>12} {'all, s':>9} {'verify, s':>9} {'driver, MB':>11}")
    growths = []
    with tempfile.TemporaryDirectory() as temporary:
        for num_rows in args.rows or (1000, 10_000, 100_000):
            growth = measure_growth(Path(args.folder or temporary), num_rows, args.shard_rows)
            growths.append(asdict(growth))
            print(
                f"{growth.num_rows:11,} {growth.rows_per_s:9,.0f} {growth.planning_s:12.1f} {growth.seconds:9.1f} "
                f"{growth.verify_s:9.1f} {growth.peak_mb:11.0f}",
                flush=True,
            )
            write_json(args.json, "scale", {"shard_rows": args.shard_rows, "runs": growths})
    return 0


def tell(figures: dict[str, Any]) -> list[str]:
    """Return the measured figures as lines of Markdown for the documentation."""
    lines = [
        f"The segment job with a model of four weights over small images on the local disk, {figures['shard_rows']:,} "
        "rows a shard. Rows a second are from the first to the last, all seconds with Ray's start.",
        "",
        "| rows | rows/s | planning, s | all, s | `jobs.verify`, s | driver, MB |",
        "|---|---|---|---|---|---|",
    ]
    for run in figures["runs"]:
        lines.append(
            f"| {run['num_rows']:,} | {run['rows_per_s']:,.0f} | {run['planning_s']:.1f} | {run['seconds']:.0f} | "
            f"{run['verify_s']:.0f} | {run['peak_mb']:.0f} |"
        )
    if len(large := [run for run in figures["runs"] if run["num_rows"] >= 10_000]) > 1:
        few, many = large[0], large[-1]
        grown = f"{many['peak_mb'] - few['peak_mb']:.0f} MB"
        lines += ["", f"From {few['num_rows']:,} to {many['num_rows']:,} rows the driver's memory grew by {grown}."]
    return lines


def measure_growth(folder: Path, num_rows: int, shard_rows: int) -> Growth:
    """Run the job and `jobs.verify` over a manifest of `num_rows` rows, and return the measurements.

    Raises:
        ResultError: the job failed, or its output differs from its plan.
    """
    files, checkpoint, output = folder / "files", folder / "checkpoint", folder / f"out_{num_rows}"
    if not files.exists():
        write_files(files, _NUM_FILES, SMALL_PX)
        vlsm.save_checkpoint(vlsm.build_model("pixel", image_size=32), checkpoint, prompt="bright")
    manifest = folder / f"list_{num_rows}.parquet"
    write_manifest(manifest, [str(path) for path in sorted(files.iterdir())], num_rows)
    command = [sys.executable, "-m", "jobs.segment", str(manifest), str(output), "--checkpoint", str(checkpoint)]
    command += ["--set", f"shard_rows={shard_rows}", "--set", "run.batch_size=64"]
    started_s = time.monotonic()
    with (folder / "job.log").open("w") as log:
        job = subprocess.Popen(command, cwd=_ROOT, env=os.environ.copy(), stdout=subprocess.PIPE, stderr=log, text=True)
    watch = _MemoryWatch(job.pid, output / "config.yaml")
    out, _ = job.communicate()
    watch.stop()
    if job.returncode:
        raise ResultError(f"the job failed: {(folder / 'job.log').read_text()[-1500:]}")
    seconds, summary = time.monotonic() - started_s, json.loads(out)
    started_verify_s, command = time.monotonic(), [sys.executable, "-m", "jobs.verify", str(output)]
    verified = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    if verified.returncode:
        raise ResultError(f"jobs.verify failed: {verified.stderr[-1500:]}")
    return Growth(
        num_rows,
        round(summary["images_per_s"], 1),
        round(watch.planned_s - started_s, 1),
        round(seconds, 1),
        round(time.monotonic() - started_verify_s, 1),
        round(watch.peak_bytes / 1e6, 1),
    )


class _MemoryWatch:
    """Samples the memory of a process every 0.1 s, and notes when its config.yaml appears."""

    def __init__(self, pid: int, record: Path) -> None:
        self.peak_bytes, self.planned_s = 0, 0.0
        self._process, self._record, self._stop = psutil.Process(pid), record, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(0.1):
            try:
                self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)
            except psutil.NoSuchProcess:
                return
            if not self.planned_s and self._record.exists():
                self.planned_s = time.monotonic()

    def stop(self) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join()
