"""CPU time of an image from the store to Parquet, outside of the model, by kind of process."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

import vlsm
from jobs.benchmarks.archives import write_files, write_manifest
from jobs.benchmarks.figures import write_json
from jobs.benchmarks.pipeline import archive_at
from vlsm.errors import ResultError
from vlsm.images.decode import decode_image
from vlsm.segmentation.masks import probabilities
from vlsm.segmentation.segmenter import Segmenter

_ROOT = Path(__file__).parents[2]
_SIDES_PX = (560, 561)
_NUM_FILES, _NUM_DRAWINGS = 512, 64  # more files than a shard has rows, so that those of a shard differ
_FOREGROUND = 0.15  # share of the pixels in masks: about that of Kvasir-SEG
_SAMPLE_S = 0.2
# by words in the title of a process; the first that fits counts
_KINDS = {
    "fetch_shard": "fetch",
    "write_masks": "write",
    "SegmentActor": "model",
    "ray::IDLE": "idle workers",
    "default_worker.py": "starting workers",
    "raylet/raylet": "raylet",
    "CrashBoard": "board",
    "ray::": "Ray's actors",
    "gcs/gcs_server": "GCS",
    "jobs.segment": "driver",
}


@dataclass(frozen=True)
class Cost:
    """CPU time of an image from one source.

    Attributes:
        source: "disk" or "S3".
        core_ms: median CPU milliseconds per image by kind of process: "fetch", "write" and "model" are the stages;
            "agents" are Ray's other daemons.
        outside_ms: median of their sum, without the model.
        images_per_s: median images per second of the clock.
        num_starts: median number of processes that the longer run started beyond those of the shorter one.
    """

    source: str
    core_ms: dict[str, float]
    outside_ms: float
    images_per_s: float
    num_starts: float


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `python -m jobs.benchmark cost`."""
    parser.add_argument(
        "--source", action="append", choices=("disk", "S3"), help="location of the images (default: S3)"
    )
    parser.add_argument("--images", type=int, nargs=2, default=(2048, 12288), metavar="N", help="of the two runs")
    parser.add_argument("--shard-rows", type=int, default=256, metavar="N", help="images per shard (256)")
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="pairs of runs; the median counts (2)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="further settings of the job")


def measure(args: Namespace) -> int:
    """Measure the CPU milliseconds of an image from the store to Parquet in all processes of a segment run.

    Images are JPEGs of 560 x 560 pixels. The model has four weights at 352 x 352 pixels. The figures are differences of
    two runs of different length, so that the start of Ray and of all processes drops out. They are CPU times: other
    programs on the machine hardly change them. The S3 server is not counted. Processes that the longer run starts later
    are counted: each costs seconds. The CPU time between two samples of a process (0.2 s) counts for its title at the
    second one.
    """
    costs = []
    print(f"{'from':5} {'images/s':>9} {'outside of the model':>21}  core ms an image")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = write_files(folder / "files", _NUM_FILES, _SIDES_PX, _NUM_DRAWINGS)
        torch.manual_seed(0)
        vlsm.save_checkpoint(vlsm.build_model("pixel", image_size=352).eval(), folder / "checkpoint", prompt="a polyp")
        words = ["--checkpoint", str(folder / "checkpoint"), "--set", f"shard_rows={args.shard_rows}"]
        words += ["--set", f"threshold={_threshold(folder / 'checkpoint', files)}", "--set", "run.batch_size=32"]
        words += [word for setting in args.set for word in ("--set", setting)]
        for source in args.source or ["S3"]:
            with archive_at(source, folder, files) as uris:
                cost = _measure_source(source, folder, uris, words, args)
            costs.append(asdict(cost))
            told = ", ".join(f"{kind} {ms:.2f}" for kind, ms in cost.core_ms.items())
            print(
                f"{source:5} {cost.images_per_s:9.1f} {cost.outside_ms:21.2f}  {told}; {cost.num_starts:g} starts",
                flush=True,
            )
            write_json(args.json, "cost", {"shard_rows": args.shard_rows, "images": args.images, "runs": costs})
    return 0


def tell(figures: dict[str, Any]) -> list[str]:
    """Return the measured figures as lines of Markdown for the documentation."""
    shorter, longer = figures["images"]
    kinds = list(dict.fromkeys(kind for row in figures["runs"] for kind in row["core_ms"]))
    lines = [
        "Milliseconds of a core that a JPEG of 560 x 560 pixels costs in each process of a segment run with a model of "
        f"four weights at 352 pixels, and shards of {figures['shard_rows']}: the difference between runs of {longer:,} "
        f"and of {shorter:,} images, so without all starts.",
        "",
        f"| images from | images/s | outside of the model | {' | '.join(kinds)} |",
        f"|---|---|---|{'---|' * len(kinds)}",
    ]
    for row in figures["runs"]:
        each = " | ".join(f"{row['core_ms'].get(kind, 0):.2f}" for kind in kinds)
        lines.append(f"| {row['source']} | {row['images_per_s']:,.0f} | {row['outside_ms']:.2f} | {each} |")
    return lines


def _threshold(checkpoint: Path, files: list[Path]) -> float:
    """Return the threshold that gives masks of the usual area: weights are random."""
    segmenter = Segmenter(vlsm.load_checkpoint(checkpoint), device="cpu")
    square = segmenter.model.image_spec.square
    images = [square.resize_image(decode_image(file.read_bytes(), file.name)) for file in files[:_NUM_DRAWINGS:8]]
    logits = np.stack(segmenter.predict_logits(np.stack(images), [["a polyp"]] * len(images)))
    return float(probabilities(np.quantile(logits, 1 - _FOREGROUND)))


def _measure_source(source: str, folder: Path, uris: list[str], words: list[str], args: Namespace) -> Cost:
    shorter, longer = args.images
    pairs = []
    for repeat in range(args.repeats):
        runs = []
        for count in (shorter, longer):
            manifest, output = folder / f"{source}_{count}.parquet", folder / f"out_{source}_{count}_{repeat}"
            write_manifest(manifest, uris, count)
            runs.append(_run([str(manifest), str(output), *words]))
        pairs.append(runs)
    differences = []
    for (short_s, short, few), (long_s, long, many) in pairs:
        kinds = {kind: 1000 * (long[kind] - short[kind]) / (longer - shorter) for kind in {**short, **long}}
        differences.append(((longer - shorter) / (long_s - short_s), kinds, many - few))
    rates, all_kinds, starts = zip(*differences, strict=True)
    order = [*dict.fromkeys(_KINDS.values()), "agents"]
    return Cost(
        source,
        {kind: statistics.median(kinds.get(kind, 0.0) for kinds in all_kinds) for kind in order},
        statistics.median(sum(kinds.values()) - kinds.get("model", 0.0) for kinds in all_kinds),
        statistics.median(rates),
        statistics.median(starts),
    )


def _run(words: list[str]) -> tuple[float, Counter[str], int]:
    """Run the segment job. Returns its seconds, the CPU seconds of its processes by kind, and their number."""
    environment = os.environ | {"RAY_ADDRESS": "local", "RAY_worker_niceness": "0"}
    started_s, core_s, seen = time.monotonic(), Counter[str](), dict[tuple[int, float], float]()
    with tempfile.TemporaryFile("w+") as log:
        job = subprocess.Popen(
            [sys.executable, "-m", "jobs.segment", *words], cwd=_ROOT, env=environment, stdout=log, stderr=log
        )
        driver = psutil.Process(job.pid)
        while job.poll() is None:
            try:
                processes = [driver, *driver.children(recursive=True)]
            except psutil.NoSuchProcess:
                break
            for process in processes:
                _count(process, core_s, seen)
            time.sleep(_SAMPLE_S)
        if job.wait() != 0:
            log.seek(0)
            raise ResultError(f"a measured run failed: {log.read()[-1500:]}")
    return time.monotonic() - started_s, core_s, len(seen)


def _count(process: psutil.Process, core_s: Counter[str], seen: dict[tuple[int, float], float]) -> None:
    """Add the CPU seconds of a process since its last sample to those of its kind."""
    try:
        times, kind, key = process.cpu_times(), kind_of(process), (process.pid, process.create_time())
    except psutil.Error:  # it has ended meanwhile
        return
    total = times.user + times.system
    core_s[kind] += total - seen.get(key, 0.0)
    seen[key] = total


def kind_of(process: psutil.Process) -> str:
    """Return the kind of a process of a segment run, by its title."""
    title = " ".join(process.cmdline())
    return next((kind for word, kind in _KINDS.items() if word in title), "agents")
