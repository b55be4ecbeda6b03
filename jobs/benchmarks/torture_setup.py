"""An archive, the segment job over it as a user starts it, and what it made of it when nobody disturbed it."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import vlsm
from vlsm.errors import ResultError
from vlsm.runs.verify import verify_run

_ROOT = Path(__file__).parents[2]
LONGEST_S = 900.0  # one run of the job
_PROMPTS = ["polyp", "flat lesion"]


@dataclass
class Arena:
    """An archive, a checkpoint, and the rows of a run that nobody disturbed.

    Attributes:
        folder: for all files.
        num_images: of the archive; some are broken, some are there twice.
        shard_rows: of every run.
        seed: of images and moments.
        stall_s: for how long a faulty store stalls, in seconds.
        environment: of every job, beside this process's own.
    """

    folder: Path
    num_images: int
    shard_rows: int = 16
    seed: int = 0
    stall_s: float = 30.0
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.archive, self.checkpoint = self.folder / "archive", self.folder / "checkpoint"
        self.expected: dict[tuple[str, str], tuple[Any, ...]] = {}
        self._jobs: list[subprocess.Popen[str]] = []

    def prepare(self) -> None:
        """Make images and checkpoint, and run the job undisturbed."""
        import torch

        _draw_archive(self.archive, self.num_images, self.seed)
        torch.manual_seed(3)
        vlsm.save_checkpoint(vlsm.build_model("unet_d", image_size=32, width=4), self.checkpoint, prompt=_PROMPTS[0])
        output = str(self.folder / "undisturbed")
        self.finish(output)
        self.expected = _read_rows(output)

    def start(
        self, output: str, *settings: str, source: str | None = None, environment: dict[str, str] | None = None
    ) -> "subprocess.Popen[str]":
        """The job as a user starts it."""
        words = [source or str(self.archive), output, "--checkpoint", str(self.checkpoint)]
        for setting in (f"shard_rows={self.shard_rows}", f"prompts={json.dumps(_PROMPTS)}", *settings):
            words += ["--set", setting]
        log = (self.folder / "jobs.log").open("a")
        with log:
            job = subprocess.Popen(
                [sys.executable, "-m", "jobs.segment", *words],
                cwd=_ROOT,
                env=os.environ | self.environment | (environment or {}),
                stdout=subprocess.DEVNULL,
                stderr=log,
                text=True,
            )
        self._jobs.append(job)
        return job

    def stop(self) -> None:
        """End what a scenario that failed has left running."""
        for job in self._jobs:
            if job.poll() is None:
                job.kill()
                job.wait()

    def finish(self, output: str, *settings: str, **options: Any) -> None:
        """Run the job to its end.

        Raises:
            ResultError: it failed.
        """
        job = self.start(output, *settings, **options)
        if code := job.wait(LONGEST_S):
            log = (self.folder / "jobs.log").read_text()[-1500:]
            raise ResultError(f"the job ended with exit code {code}: {log}")

    def wait_for_parts(self, output: str, count: int, job: "subprocess.Popen[str]") -> None:
        """Until there are so many more parts than now, or the job has ended."""
        wanted = num_parts(output) + count
        deadline_s = time.monotonic() + LONGEST_S
        while job.poll() is None and num_parts(output) < wanted and time.monotonic() < deadline_s:
            time.sleep(0.02)

    def prove(self, output: str) -> None:
        """Nothing, where the output is as planned and as that of the undisturbed run; else a ResultError."""
        *_, proof = verify_run(output)
        if proof.differences:
            raise ResultError("; ".join(proof.differences[:5]))
        found = _read_rows(output)
        if found != self.expected:
            wrong = [key for key in self.expected.keys() | found.keys() if self.expected.get(key) != found.get(key)]
            raise ResultError(f"{len(wrong)} rows differ from the undisturbed run's, such as {wrong[0]}")


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
        reason = (row["error"] or "").partition(":")[0]  # what follows names the place
        rows[row["image_id"], row["prompt"]] = (row["status"], row["mask_rle"], row["content_sha256"], reason)
    return rows


def num_parts(output: str) -> int:
    """Part files in OUTPUT on a local disk."""
    return len(list(Path(output, "masks").glob("part-*")))
