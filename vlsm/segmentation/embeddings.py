"""Embeddings of images: which member of a run makes them, and how those of an image's windows become one."""

import logging
from collections.abc import Iterable, Sequence

import numpy as np

from vlsm.checkpoints import CheckpointSettings
from vlsm.config import SegmentSettings
from vlsm.errors import ConfigError
from vlsm.models import BLIND
from vlsm.models.options import STACK
from vlsm.segmentation.shard import Entry

logger = logging.getLogger("vlsm")


def check_embedding(settings: SegmentSettings, checkpoints: Sequence[CheckpointSettings]) -> None:
    """Say in the log which member of an ensemble makes the embeddings.

    Raises:
        ConfigError: the run keeps embeddings, and no member has an image tower.
    """
    if not settings.embedding:
        return
    names = [checkpoint.model for checkpoint in checkpoints]
    number = next((number for number, name in enumerate(names, start=1) if name not in (*BLIND, STACK)), None)
    if number is None:
        known = ", ".join(dict.fromkeys(names))
        raise ConfigError(
            f"embedding is true, but {known} has no pretrained image tower of its own, which makes embeddings; "
            "set it to false, or add a member with a tower"
        )
    if len(names) > 1:
        checkpoint = settings.members[number - 1].checkpoint
        logger.info("embeddings are those of member %d, %s (%s)", number, names[number - 1], checkpoint)


class Embeddings:
    """The embeddings of the images of a shard. That of an image is the mean over its windows, with length 1.

    Args:
        member: number in the run of the member that makes them.
        width: D, the number of values in each.
    """

    def __init__(self, member: int, width: int) -> None:
        self.member, self.width = member, width
        self._windows: dict[int, np.ndarray] = {}  # by their rows in the shard

    def add(self, rows: Sequence[int], vectors: np.ndarray) -> None:
        """Take the embeddings of a batch of windows, (B or more, D) float32; black images fill a compiled batch."""
        self._windows.update(zip(rows, vectors, strict=False))

    def share(self, entries: Iterable[Entry]) -> None:
        """Give each image its embedding. An image that no model has seen gets none."""
        for entry in entries:
            rows = range(entry.first_window, entry.first_window + entry.num_windows)
            if entry.error is None and rows and all(row in self._windows for row in rows):
                mean = np.mean([self._windows[row] for row in rows], axis=0)
                entry.embedding = (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float16).tobytes()
