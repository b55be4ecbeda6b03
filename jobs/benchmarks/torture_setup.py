"""The archive of the torture, the segment job over it, and the expected rows from an undisturbed run."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import vlsm
from vlsm import storage
from vlsm.errors import ResultError, VlsmError
from vlsm.runs.verify import verify_run

ROOT = Path(__file__).parents[2]
LONGEST_S = 900.0  # time limit for one run of the job
_PROMPTS = ["polyp", "flat lesion"]
_EQUAL = ("allow_equal_masks=true",)  # UNet-D ignores the prompts


class CannotTortureError(VlsmError):
    """This machine lacks something that a scenario needs."""


@dataclass
class Arena:
    """An archive, a checkpoint, and the rows of an undisturbed run.

    Attributes:
        folder: folder of all files.
        num_images: images in the archive; some are broken, some are duplicates.
        shard_rows: rows per shard in every run.
        seed: random seed of images and of the times of faults.
        stall_s: delay of a stalled request to a faulty store, in seconds.
        num_kills: kills of the scenario with random ones, at most.
        environment: variables of every job, in addition to those of this process.
    """

    folder: Path
    num_images: int
    shard_rows: int = 16
    seed: int = 0
    stall_s: float = 30.0
    num_kills: int = 100
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.archive, self.checkpoint = self.folder / "archive", self.folder / "checkpoint"
        self.expected: dict[tuple[str, str], tuple[Any, ...]] = {}
        self._jobs: list[subprocess.Popen[str]] = []

    def prepare(self, run: Callable[[list[str]], object] | None = None) -> None:
        """Write the images and the checkpoint, run the job undisturbed, and keep its rows in `expected`.

        Args:
            run: runs the job with these words of a command line; None to start it as a user does.
        """
        import torch

        _draw_archive(self.archive, self.num_images, self.seed)
        torch.manual_seed(3)
        vlsm.save_checkpoint(vlsm.build_model("unet_d", image_size=32, width=4), self.checkpoint, prompt=_PROMPTS[0])
        output = str(self.folder / "undisturbed")
        if run is None:
            self.finish(output)
        else:
            run(self._words(output))
        self.expected = _read_rows(output)

    def start(
        self,
        output: str,
        *settings: str,
        source: str | None = None,
        environment: dict[str, str] | None = None,
        root: Path = ROOT,
    ) -> "subprocess.Popen[str]":
        """Start the job as a user does, and return its process.

        Args:
            output: OUTPUT.
            settings: further settings.
            source: INPUT; None for the archive.
            environment: further variables.
            root: the clone whose code runs.
        """
        words = self._words(output, *settings, source=source)
        log = (self.folder / "jobs.log").open("a")
        with log:
            job = subprocess.Popen(
                [sys.executable, "-m", "jobs.segment", *words],
                cwd=root,
                env=os.environ | self.environment | (environment or {}),
                stdout=subprocess.DEVNULL,
                stderr=log,
                text=True,
            )
        self._jobs.append(job)
        return job

    def _words(self, output: str, *settings: str, source: str | None = None) -> list[str]:
        words = [source or str(self.archive), output, "--checkpoint", str(self.checkpoint)]
        for setting in (f"shard_rows={self.shard_rows}", f"prompts={json.dumps(_PROMPTS)}", *_EQUAL, *settings):
            words += ["--set", setting]
        return words

    def stop(self) -> None:
        """Kill the jobs that a failed scenario left running."""
        for job in self._jobs:
            if job.poll() is None:
                job.kill()
                job.wait()

    def finish(self, output: str, *settings: str, **options: Any) -> None:
        """Run the job to its end.

        Raises:
            ResultError: the job failed.
        """
        job = self.start(output, *settings, **options)
        if code := job.wait(LONGEST_S):
            log = (self.folder / "jobs.log").read_text()[-1500:]
            raise ResultError(f"the job failed with exit code {code}: {log}")

    def wait_for_parts(self, output: str, count: int, job: "subprocess.Popen[str]") -> None:
        """Wait until the output has `count` more parts than now, or the job ends, or 900 s pass."""
        wanted = num_parts(output) + count
        deadline_s = time.monotonic() + LONGEST_S
        while job.poll() is None and num_parts(output) < wanted and time.monotonic() < deadline_s:
            time.sleep(0.02)

    def prove(self, output: str) -> None:
        """Check that the output matches its plan and the undisturbed run.

        Raises:
            ResultError: the output differs from one of them.
        """
        *_, proof = verify_run(output)
        if proof.differences:
            raise ResultError("; ".join(proof.differences[:5]))
        rows = _read_rows(output)
        if rows != self.expected:
            wrong = [key for key in self.expected.keys() | rows.keys() if self.expected.get(key) != rows.get(key)]
            raise ResultError(f"{len(wrong)} rows differ from those of the undisturbed run, such as {wrong[0]}")


def _draw_archive(folder: Path, num_images: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for number in range(num_images):
        path = folder / f"study {number % 3}" / f"scan_{number:06d}.{('png', 'jpg')[number % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 25 == 24:
            path.write_bytes(b"Dear radiologist,")
        elif number % 20 == 19:
            shutil.copy(path.with_name(f"scan_{number - 3:06d}{('.png', '.jpg')[(number - 3) % 2]}"), path)
        else:
            small = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(small).resize(tuple(rng.integers(40, 160, 2).tolist())).save(path)


def _read_rows(output: str) -> dict[tuple[str, str], tuple[Any, ...]]:
    columns = ["image_id", "prompt", "status", "mask_rle", "confidence", "content_sha256", "error"]
    rows = {}
    for row in vlsm.read_masks(output, columns=columns):
        reason = (row["error"] or "").partition(":")[0]  # the rest of the message contains the URI
        rows[row["image_id"], row["prompt"]] = (row["status"], row["mask_rle"], row["content_sha256"], reason)
    return rows


def num_parts(output: str) -> int:
    """Return the number of part files in OUTPUT."""
    if "://" in output:
        time.sleep(0.3)  # whoever waits for parts in a store asks again and again
        return sum(name.rpartition("/")[2].startswith("part-") for name in storage.list_times(f"{output}/masks"))
    return len(list(Path(output, "masks").glob("part-*")))


@contextlib.contextmanager
def environment(names: dict[str, str]) -> Iterator[None]:
    """Set environment variables of this process, and restore them at the end of the context."""
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
