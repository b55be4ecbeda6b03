"""How the segment job grows with its archive: rows per second and the driver's memory, with a model of no cost."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import vlsm
from vlsm.errors import ResultError

_ROOT = Path(__file__).parents[1]
_NUM_FILES = 4096  # that the rows name in turns: all different within a shard
_SIDE = 48  # pixels


@dataclass(frozen=True)
class Growth:
    """Of one run.

    Attributes:
        num_rows: of its manifest.
        rows_per_s: from the first to the last image.
        planning_s: until config.yaml was there.
        seconds: all in all, Ray's start included.
        peak_mb: of the driver's resident memory, 10^6 bytes.
    """

    num_rows: int
    rows_per_s: float
    planning_s: float
    seconds: float
    peak_mb: float


def measure_growth(folder: Path, num_rows: int, shard_rows: int) -> Growth:
    """Run the job over a manifest of so many rows.

    Raises:
        ResultError: it failed.
    """
    files, checkpoint, output = folder / "files", folder / "checkpoint", folder / f"out_{num_rows}"
    if not files.exists():
        _draw(files)
        vlsm.save_checkpoint(vlsm.build_model("pixel", image_size=32), checkpoint, prompt="bright")
    manifest = folder / f"list_{num_rows}.parquet"
    _write_manifest(manifest, files, num_rows)
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
    summary = json.loads(out)
    return Growth(
        num_rows,
        round(summary["images_per_s"], 1),
        round(watch.planned_s - started_s, 1),
        round(time.monotonic() - started_s, 1),
        round(watch.peak_bytes / 1e6, 1),
    )


class _MemoryWatch:
    """Looks at a process ten times a second."""

    def __init__(self, pid: int, record: Path) -> None:
        self.peak_bytes, self.planned_s = 0, 0.0
        self._process, self._record, self._stop = psutil.Process(pid), record, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.wait(0.1):
            try:
                self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)
            except psutil.NoSuchProcess:
                return
            if not self.planned_s and self._record.exists():
                self.planned_s = time.monotonic()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()
        self._thread.join()


def _draw(folder: Path) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(_NUM_FILES):
        coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        coarse.resize((_SIDE, _SIDE)).save(folder / f"{number:05d}.jpg")


def _write_manifest(path: Path, files: Path, num_rows: int) -> None:
    schema = pa.schema([("image_id", pa.string()), ("image_uri", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for begin in range(0, num_rows, 100_000):
            numbers = range(begin, min(num_rows, begin + 100_000))
            ids = [f"{number:09d}" for number in numbers]
            uris = [f"{files}/{number % _NUM_FILES:05d}.jpg" for number in numbers]
            writer.write_table(pa.table([ids, uris], schema=schema))
