"""Progress of a segment run: a live bar on a terminal, or a line every 10 s in a log."""

import datetime
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Self

import ray
from tqdm import tqdm

from jobs import metrics
from jobs.command import logger
from vlsm.shown import public_uri

_LOG_INTERVAL_S = 10.0
_BAR_INTERVAL_S = 0.5


class Progress:
    """Counts the images of a run; a thread prints the counts to stderr.

    Args:
        total: returns the number of images in the whole run, as far as they are known.
        done: number of images that earlier runs have finished.
        failed: number of failed images among these.
        board: the `jobs.crash_watch.CrashBoard` of the run.
        output: OUTPUT of the run; it labels the metrics.
    """

    def __init__(self, total: Callable[[], int], done: int, failed: int, board: Any, output: str) -> None:
        self._output = output
        self.total, self.done, self.failed = total, done, failed
        self._done_before, self._is_first_shard = done, True
        self._board = board
        self._started_s = time.monotonic()
        self._stop = threading.Event()
        self._bar = (
            tqdm(total=total(), initial=done, unit="image", unit_scale=False, smoothing=0.05, dynamic_ncols=True)
            if _has_columns()
            else None
        )
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Self:
        self._update_metrics()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._show(self.done)
        if self._bar is not None:
            self._bar.close()

    def finish_shard(self, shard: int, num_images: int, num_failed: int) -> None:
        """Count the images of a shard whose part file is written."""
        if self._is_first_shard:
            self._is_first_shard = False
            logger.info("%s", ray.get(self._board.describe.remote()))
        self._board.finish.remote(shard)
        self.done += num_images
        self.failed += num_failed
        self._update_metrics()

    def _update_metrics(self) -> None:
        values = {"planned": self.total(), "done": self.done, "failed": self.failed}
        for name, value in values.items():
            metrics.show(f"vlsm_{name}_images", value, output=public_uri(self._output))

    def _tick(self) -> None:
        while not self._stop.wait(_BAR_INTERVAL_S if self._bar is not None else _LOG_INTERVAL_S):
            try:
                partial = ray.get(self._board.total.remote(), timeout=5)
            except ray.exceptions.RayError:
                partial = 0  # a slow or ended cluster: show only finished shards
            self._show(min(self.total(), self.done + partial))

    def _show(self, done: int) -> None:
        if self._bar is not None:
            self._bar.n, self._bar.total = done, self.total()
            self._bar.set_postfix(failed=self.failed)
            return
        elapsed_s = time.monotonic() - self._started_s
        rate = (done - self._done_before) / elapsed_s
        total = self.total()
        time_left = str(datetime.timedelta(seconds=round((total - done) / rate))) if rate else "unknown"
        share = 100 * done / max(1, total)
        print(
            f"{datetime.datetime.now():%H:%M:%S} {done:,} of {total:,} images ({share:.1f} %), "
            f"{rate:.1f} images/s, {self.failed:,} failed, {time_left} left",
            file=sys.stderr,
            flush=True,
        )


def _has_columns() -> bool:
    """Return whether stderr is a terminal with columns for a bar. Terminals of some containers have 0 columns."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
