"""The members of an ensemble on one device: they turn the windows of a shard into logits, or into masks."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlsm.checkpoints import build_checkpoint
from vlsm.config import MemberSettings, SegmentSettings
from vlsm.errors import ProbeError
from vlsm.images.preprocess import ImageSpec, Square
from vlsm.models.sharing import share_towers
from vlsm.segmentation.batch_size import FIRST_BATCH_SIZE, Probe, choose_batch_size, cpu_batch_size, probe_gpu
from vlsm.segmentation.embeddings import Embeddings
from vlsm.segmentation.finished import count_masks, cpu_reason
from vlsm.segmentation.gpu_decode import decode_images
from vlsm.segmentation.outputs import (
    LogitsOutput,
    MasksOutput,
    Output,
    Prediction,
    Texts,
    WindowTexts,
    distinct_windows,
    mean_prediction,
)
from vlsm.segmentation.segmenter import Segmenter, choose_device
from vlsm.segmentation.shard import Guard, Logits, ShardBatch, count_logits
from vlsm.segmentation.staging import Staging

logger = logging.getLogger("vlsm")

MOST_LOGIT_BYTES = 1 << 30  # on the device: of one batch, and of one image until its masks are made

Report = Callable[[int, int, float], None]  # finished images of the shard, windows of the batch, seconds of the batch


class _Batch(NamedTuple):
    """Windows whose work is queued on the device.

    Attributes:
        windows: the windows.
        predictions: of each member, for the texts of all windows, complete at `end`.
        end: of the work; None on a CPU, which has done it.
        started_s: when it was queued, by time.monotonic.
        embeddings: of the windows, (B or more, D) float32, complete at `end`; None if nobody asks for them.
    """

    windows: list[WindowTexts]
    predictions: dict[int, Prediction[Tensor]]
    end: "torch.cuda.Event | None"
    started_s: float
    embeddings: Tensor | None = None


class Predictor:
    """Some members of a run's ensemble, built and on the device.

    On a GPU, the next batches are prepared and queued while a batch computes, and results are copied at the same time.

    Args:
        settings: the resolved settings of the run.
        files: the checkpoint files of each member to build, by the member's number in the run.
        device: as for `Segmenter`.

    Raises:
        CheckpointError: a checkpoint cannot be used.
    """

    def __init__(
        self, settings: SegmentSettings, files: Mapping[int, dict[str, bytes]], device: str | None = None
    ) -> None:
        self._settings = settings
        self._members: dict[int, tuple[MemberSettings, Segmenter]] = {}
        self.names: dict[int, str] = {}
        self._device = choose_device(device)
        is_gpu, run = self._device.type == "cuda", settings.run
        self._batch_size = FIRST_BATCH_SIZE if is_gpu else cpu_batch_size()
        if isinstance(run.batch_size, int):
            self._batch_size = run.batch_size
        is_compiled = run.compile == "on" or (run.compile == "auto" and is_gpu)
        for number, member_files in files.items():
            member = settings.members[number]
            checkpoint = build_checkpoint(member_files, member.checkpoint)
            self.names[number] = checkpoint.name
            self._members[number] = member, Segmenter(checkpoint, device, self._batch_size, is_compiled)
        share_towers([segmenter.model for _, segmenter in self._members.values()])
        self._staging = Staging(self._device)
        self._makes_masks = cpu_reason(settings, is_gpu) is None

    @property
    def squares(self) -> dict[int, Square]:
        """The input square of each member, by its number in the run."""
        return {number: segmenter.model.image_spec.square for number, (_, segmenter) in self._members.items()}

    def warm_up(self) -> None:
        """Prepare a GPU for the first shard: choose the batch size, compile the models, and choose kernels."""
        if self._device.type != "cuda":
            return
        if self._settings.run.batch_size == "auto":
            self._set_batch_size(choose_batch_size(self._probe))
            torch.cuda.empty_cache()
            logger.info("batches of %d images are the fastest on this GPU", self._batch_size)
        self._predict_black()

    def check_probes(self) -> None:
        """Check that each member computes on this device as where its checkpoint was written, if `run.probe` is set.

        Raises:
            ProbeError: it does not.
        """
        if not self._settings.run.probe:
            return
        for number, (member, segmenter) in self._members.items():
            where = f"checkpoint {member.checkpoint!r}"
            try:
                agreement = segmenter.check_probe()
            except ProbeError as error:
                raise ProbeError(f"{where}: {error}; to segment all the same: --set run.probe=false") from error
            if agreement is None:
                logger.info("%s has no probe, as an earlier version wrote it: it is not checked", where)
            else:
                logger.info("%s computes as it should: %s", self.names[number], agreement)

    def _probe(self, batch_size: int) -> Probe:
        """Measure a batch size, without compiling, which would take a minute for each size."""
        self._set_batch_size(batch_size)
        networks = [segmenter.network for _, segmenter in self._members.values()]
        are_compiled = [network.is_compiled for network in networks]
        for network in networks:
            network.is_compiled = False
        try:
            share = min(1.0, self._settings.run.gpus_per_actor or 1.0)
            queue: deque[_Batch] = deque(maxlen=self._staging.depth + 1)  # as many as a run has in its queue
            return probe_gpu(lambda: queue.append(self._predict_black()), batch_size, self._device, share)
        finally:
            for network, is_compiled in zip(networks, are_compiled, strict=True):
                network.is_compiled = is_compiled

    def _set_batch_size(self, batch_size: int) -> None:
        self._batch_size = batch_size
        for _, segmenter in self._members.values():
            segmenter.batch_size = batch_size

    def _predict_black(self) -> _Batch:
        """Queue one batch of black images with the prompts of the run."""
        prompts = tuple(self._settings.texts_of(self._settings.prompts or ("",)))
        windows = [WindowTexts(row, 0, prompts, []) for row in range(self._batch_size)]
        shapes = {square: (self._batch_size, square.size, square.size, 3) for square in self.squares.values()}
        return self._launch({square: np.zeros(shape, np.uint8) for square, shape in shapes.items()}, windows)

    def predict(
        self, batch: ShardBatch, texts: Texts, guard: Guard, report: Report = lambda done, windows, seconds: None
    ) -> ShardBatch:
        """Return the batch with the results of these members. An image that the guard blames gets an error.

        The results are masks if `vlsm.segmentation.finished.cpu_reason` has no reason against it. Those of an image
        with more than 1 GiB of logits, and of all other runs, are logits.

        Args:
            batch: it holds pixels for the square of each member.
            texts: one item for each entry.
            guard: watches the work on each image.
            report: called after each batch of windows.
        """
        for entry in batch.entries:
            if entry.position in guard.blamed:
                entry.error = "crashed: the process that ran the model on the image died each time"
        pixels = decode_images(batch, self.squares.values(), self._settings, guard, str(self._device))
        for entry, prompts in zip(batch.entries, texts, strict=True):
            if entry.error is None and self._makes_masks and self._logit_bytes(entry.num_logits) <= MOST_LOGIT_BYTES:
                entry.num_masks = count_masks(self._settings, len(prompts))
        count_logits(batch.entries)
        work = distinct_windows(batch, texts)
        with_masks = [item for item in work if item.entries[0].num_masks]
        others = [item for item in work if not item.entries[0].num_masks]
        masks = MasksOutput(self._settings, [square for _, square in sorted(self.squares.items())])
        logits = LogitsOutput(batch, self.squares, self._staging)
        embeddings = self._new_embeddings(batch)
        done: set[int] = set()  # images, by their first windows
        for windows, output in ((with_masks, masks), (others, logits)):
            for taken, seconds in self._run(pixels, windows, output, guard, embeddings):
                done.update(item.row - item.window for item in taken)
                report(len(done), len(taken), seconds)
        logits.share(others)
        if embeddings is not None:
            embeddings.share(batch.entries)
            batch = replace(batch, embedding_width=embeddings.width)
        values = {
            number: Logits(self.names[number], array.numpy(), logits.presence.get(number))
            for number, array in logits.values.items()
        }
        return replace(batch, logits=batch.logits | values, masks=masks.masks)

    def _new_embeddings(self, batch: ShardBatch) -> Embeddings | None:
        """Return what takes embeddings, or None if the run keeps none or an earlier pool has made them."""
        if not self._settings.embedding or batch.embedding_width:
            return None
        widths = {number: segmenter.model.embedding_width for number, (_, segmenter) in self._members.items()}
        member = next((number for number, width in sorted(widths.items()) if width), None)
        return None if member is None else Embeddings(member, widths[member])

    def _logit_bytes(self, num_logits: int) -> int:
        return sum(4 * num_logits * square.size**2 for square in self.squares.values())

    def _run(
        self,
        pixels: Mapping[Square, np.ndarray],
        windows: list[WindowTexts],
        output: Output,
        guard: Guard,
        embeddings: Embeddings | None,
    ) -> Iterator[tuple[list[WindowTexts], float]]:
        """Pass windows through the models to an output. Yields the windows of each batch, and its seconds.

        A careful guard gets one window at a time, with all its work.
        """
        step, depth = (1, 0) if guard.is_careful else (self._batch_size, self._staging.depth)
        queue: deque[_Batch] = deque()
        last_s = 0.0

        def take() -> tuple[list[WindowTexts], float]:
            nonlocal last_s
            queued = queue.popleft()
            with self._staging.results(queued.end):
                output.add(queued.windows, queued.predictions)
                if embeddings is not None and queued.embeddings is not None:
                    embeddings.add([item.row for item in queued.windows], queued.embeddings.cpu().numpy())
            started_s, last_s = max(last_s, queued.started_s), time.monotonic()
            return queued.windows, last_s - started_s

        for chosen in self._cut(windows, step):
            with guard.image(chosen[0].entries[0].position):
                queue.append(self._launch(pixels, chosen, None if embeddings is None else embeddings.member))
                taken = take() if len(queue) > depth else None
            if taken is not None:
                yield taken
        while queue:
            yield take()

    def _cut(self, windows: Sequence[WindowTexts], most: int) -> Iterator[list[WindowTexts]]:
        """Yield batches of at most `most` windows; many prompts make smaller ones, since all their logits are kept."""
        batch: list[WindowTexts] = []
        num_bytes = 0
        for item in windows:
            item_bytes = self._logit_bytes(len(item.texts))
            if batch and (len(batch) == most or num_bytes + item_bytes > MOST_LOGIT_BYTES):
                yield batch
                batch, num_bytes = [], 0
            batch.append(item)
            num_bytes += item_bytes
        if batch:
            yield batch

    @torch.inference_mode()
    def _launch(
        self, pixels: Mapping[Square, np.ndarray], windows: list[WindowTexts], embedder: int | None = None
    ) -> _Batch:
        """Queue the work of all members on some windows. The member `embedder` embeds them too, not mirrored.

        Every member sees a batch before the next one, and equal inputs are one tensor: members may share features. The
        settings of a member may replace texts, and may average over the image and its mirror image.
        """
        started_s, rows = time.monotonic(), [item.row for item in windows]
        images: dict[Square, Tensor] = {}
        inputs: dict[tuple[ImageSpec, bool], Tensor] = {}
        predictions: dict[int, Prediction[Tensor]] = {}
        embeddings: Tensor | None = None
        for number, (member, segmenter) in self._members.items():
            spec = segmenter.model.image_spec
            if spec.square not in images:
                images[spec.square] = self._staging.upload(pixels[spec.square], rows)
            texts = [[member.prompts.get(text, text) for text in item.texts] for item in windows]
            predicted = []
            for is_mirrored in (False, True) if member.flip else (False,):
                if (spec, is_mirrored) not in inputs:
                    uploaded = images[spec.square]
                    inputs[spec, is_mirrored] = segmenter.prepare(uploaded.flip(2) if is_mirrored else uploaded)
                if number == embedder and not is_mirrored:
                    prediction, embeddings = segmenter.predict_and_embed(inputs[spec, is_mirrored], texts)
                    predicted.append(prediction)
                else:
                    predicted.append(segmenter.predict_tensor(inputs[spec, is_mirrored], texts))
            predictions[number] = mean_prediction(*predicted) if member.flip else predicted[0]
        return _Batch(windows, predictions, self._staging.mark(), started_s, embeddings)
