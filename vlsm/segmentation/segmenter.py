"""Segment images with a checkpoint: images in, masks out, without a cluster."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlsm.checkpoints import Checkpoint
from vlsm.config import A_PROBABILITY
from vlsm.images.given import as_list, open_given
from vlsm.models.compiling import Network
from vlsm.models.contract import Features
from vlsm.models.folding import fold_batch_norms
from vlsm.models.probe import Agreement, Precision
from vlsm.models.probe_making import measure
from vlsm.models.prompts import PromptCache
from vlsm.segmentation.blind import judge_prompts, reader_of
from vlsm.segmentation.outputs import Prediction
from vlsm.segmentation.published import find_checkpoint
from vlsm.segmentation.results import Segmentation, segmentation_of

OneImage = str | os.PathLike[str] | bytes | np.ndarray | Image.Image
Prompts = str | Iterable[str] | None


class Segmenter:
    """A checkpoint on a device. Each distinct prompt and each image is encoded once.

    The Segmenter changes the model of the checkpoint: it folds the batch norms for speed. To train or save that model,
    load the checkpoint again.

    Args:
        checkpoint: from `vlsm.load_checkpoint`.
        device: such as "cpu", "cuda" or "cuda:1". Default: the GPU if there is one, else the CPU.
        batch_size: images per batch of the encoder, and (image, prompt) pairs per batch of the decoder. It affects only
            speed.
        compile: whether torch compiles the model at the first batch. This takes a minute, and pays on a GPU for
            thousands of images. A model that cannot be compiled runs as it is, with a warning.

    Attributes:
        precision: of the model's arithmetic: float32 on a CPU, bfloat16 on a GPU. Text features are float32.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: str | None = None, batch_size: int = 8, compile: bool = False
    ) -> None:
        self.device = choose_device(device)
        if not isinstance(checkpoint, Checkpoint):
            raise TypeError(f"checkpoint is a {type(checkpoint).__name__}; pass the result of vlsm.load_checkpoint")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
        # torch's fast path for nn.MultiheadAttention computes attention maps; without it, torch uses fused attention
        torch.backends.mha.set_fastpath_enabled(False)
        fold_batch_norms(checkpoint.model)
        self.model = checkpoint.model.to(self.device).to(memory_format=torch.channels_last)
        self.precision: Precision = "bf16" if self.device.type == "cuda" else "fp32"
        self.settings, self._name, self._probe = checkpoint.settings, checkpoint.name, checkpoint.probe
        self.batch_size = batch_size
        self._temperature = self.settings.calibration.temperature if self.settings.calibration else 1.0
        self._prompts = PromptCache(self.model)
        self.network = Network(self.model, compile)

    def __repr__(self) -> str:
        return f"<Segmenter of {self._name} on {self.device}: {self.settings.summary}>"

    @overload
    def segment(  # type: ignore[overload-overlap]  # a str is an iterable too
        self,
        images: OneImage,
        prompts: Prompts = None,
        threshold: float | None = None,
        probabilities: bool = False,
        allow_equal_masks: bool = False,
        embedding: bool = False,
    ) -> Segmentation: ...

    @overload
    def segment(
        self,
        images: Iterable[Any],
        prompts: Prompts = None,
        threshold: float | None = None,
        probabilities: bool = False,
        allow_equal_masks: bool = False,
        embedding: bool = False,
    ) -> list[Segmentation]: ...

    def segment(
        self,
        images: Any,
        prompts: Prompts = None,
        threshold: float | None = None,
        probabilities: bool = False,
        allow_equal_masks: bool = False,
        embedding: bool = False,
    ) -> Segmentation | list[Segmentation]:
        """Return one mask per image and prompt, at the original size of the image.

        `vlsm.images.given` has the rules for images. The pixels of an image stay in memory with its result.

        Args:
            images: one image or an iterable of images, whose sizes may differ. An image is a path or URI (a file with
                several images needs a selector: `ct.nii.gz#slice=17`), bytes, an image of Pillow, or a uint8 array:
                (H, W, 3), grey (H, W) or (H, W, 1), or with alpha (H, W, 4).
            prompts: one text or several, for every image. Default: the stored prompt of the checkpoint.
            threshold: a probability in (0, 1). Default: the stored threshold of the checkpoint.
            probabilities: whether to keep the probability of each pixel too.
            allow_equal_masks: take several prompts, or others than the checkpoint's, for a model that ignores the text;
                `vlsm.segmentation.blind` has the rule.
            embedding: whether to keep a vector of each image too, which does not depend on the prompts.

        Returns:
            For each image an array (H, W) uint8 of 0 and 1 for one text, (T, H, W) for a sequence of T texts. It has
            `mask`, `confidence`, `presence`, `probability`, `embedding`, `image` and `overlay()`; see
            `vlsm.segmentation.results.Segmentation`. For a single image its result, else a list.

        Raises:
            ValueError: an array is not uint8 or has another shape, there is no prompt, the model ignores these prompts
                or has no embedding, or the threshold is not in (0, 1).
            TypeError: images or prompts are of another type.
            ImageError: a file cannot be read. Then no image has a result.
        """
        several, is_one = as_list(images)
        texts = _list_texts(self.settings.prompt if prompts is None else prompts)
        verdict = judge_prompts([(text,) for text in texts], [reader_of(self.settings)])
        if verdict is not None and not allow_equal_masks:
            raise ValueError(f"{verdict.message}; leave prompts out, or pass allow_equal_masks=True")
        if embedding and not self.model.embedding_width:
            raise ValueError(f"{self.settings.model} has no pretrained image tower of its own; it makes no embedding")
        threshold = self.settings.threshold if threshold is None else threshold
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is {threshold}; it must be {A_PROBABILITY}")
        names = ["the image"] if is_one else [f"image {number}" for number, _ in enumerate(several, start=1)]
        openings = [open_given(image, name) for image, name in zip(several, names, strict=True)]
        square, results = self.model.image_spec.square, []
        for start in range(0, len(openings), self.batch_size):
            pixels = [read() for read in openings[start : start + self.batch_size]]
            resized = np.stack([square.resize_image(image) for image in pixels])
            predicted, vectors = self._predict_images(resized, [texts] * len(pixels), embedding)
            for (logits, presence), image, vector in zip(predicted, pixels, vectors, strict=True):
                shown = texts if isinstance(prompts, Iterable) and not isinstance(prompts, str) else texts[0]
                results.append(segmentation_of(logits, image, shown, threshold, square, probabilities, presence))
                results[-1].embedding = vector
        return results[0] if is_one else results

    def check_probe(self) -> Agreement | None:
        """Segment the probe of the checkpoint by the path of any image, and compare the result with the stored one.

        Returns:
            The largest difference of the logits and its tolerance; None if the checkpoint has no probe, as those of
            earlier versions.

        Raises:
            ProbeError: this machine computes otherwise than the one where the checkpoint was written.
        """
        if (probe := self._probe) is None:
            return None
        image = self.model.image_spec.square.resize_image(probe.decode())
        pixel_values = self.prepare(torch.from_numpy(image[None].copy()).to(self.device))
        logits = self.predict_tensor(pixel_values, [probe.prompts]).logits * self._temperature
        found = measure(pixel_values, self._prompts.encode(probe.prompts), logits)
        return probe.compare(found, self.precision, _name_machine(self.device))

    def predict_logits(self, images: np.ndarray, prompts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Return the logits of `predict`, which has the arguments: one array (T, S, S) per image."""
        return [predicted.logits for predicted in self.predict(images, prompts)]

    @torch.inference_mode()
    def predict(self, images: np.ndarray, prompts: Sequence[Sequence[str]]) -> list[Prediction[np.ndarray]]:
        """Return logits at the model's size S. If the checkpoint is calibrated, they are divided by its temperature.

        Args:
            images: (N, S, S, 3) uint8, resized by the `square` of the model's `image_spec`.
            prompts: the texts of each image, at least one.

        Returns:
            For each image logits (T, S, S) for its T texts, and the presence (T,) of each text.

        Raises:
            ValueError: images and prompts disagree on N, or an image has no prompt.
        """
        if len(images) != len(prompts) or not all(prompts):
            raise ValueError(
                f"{len(images)} images come with {len(prompts)} lists of prompts; each image needs one prompt or more"
            )
        return self._predict_images(images, prompts, embeds=False)[0]

    @torch.inference_mode()
    def _predict_images(
        self, images: np.ndarray, prompts: Sequence[Sequence[str]], embeds: bool
    ) -> tuple[list[Prediction[np.ndarray]], list[np.ndarray | None]]:
        """Return the prediction for each image, as `predict`, and its embedding, (D,) float16, or None."""
        results: list[Prediction[np.ndarray]] = []
        vectors: list[np.ndarray | None] = []
        for start in range(0, len(images), self.batch_size):
            batch = slice(start, start + self.batch_size)
            pixel_values = self.prepare(torch.from_numpy(np.array(images[batch])).to(self.device))
            (logits, presence), embeddings = self._predict(pixel_values, prompts[batch], embeds)
            ends = np.cumsum([len(image_prompts) for image_prompts in prompts[batch]])[:-1]
            split = np.split(logits.cpu().numpy(), ends)
            presences = [None] * len(split) if presence is None else np.split(presence.cpu().numpy(), ends)
            results += [Prediction(*each) for each in zip(split, presences, strict=True)]
            vectors += [None] * len(split) if embeddings is None else [*embeddings[: len(split)].half().cpu().numpy()]
        return results, vectors

    @torch.inference_mode()
    def prepare(self, images: Tensor) -> Tensor:
        """Return resized images on the device, (N, S, S, 3) uint8, as the input of `predict_tensor`.

        Compiled models have batches of one size: black images follow if there are fewer.
        """
        missing = self.batch_size - len(images) if self.network.is_compiled else 0
        if missing > 0:
            images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        return self.model.image_spec.normalize(images)

    @torch.inference_mode()
    def predict_tensor(self, pixel_values: Tensor, prompts: Sequence[Sequence[str]]) -> Prediction[Tensor]:
        """Return the prediction for one batch on the device, without waiting for it.

        Args:
            pixel_values: from `prepare`.
            prompts: the texts of each image; black images that `prepare` has added have none.

        Returns:
            Logits (texts of all images, S, S) float32, divided by the temperature of a calibrated checkpoint, and the
            presence of each text.
        """
        return self._predict(pixel_values, prompts, embeds=False)[0]

    @torch.inference_mode()
    def predict_and_embed(
        self, pixel_values: Tensor, prompts: Sequence[Sequence[str]]
    ) -> tuple[Prediction[Tensor], Tensor]:
        """Return the results of `predict_tensor`, and the embedding of each image, (N, D) float32 of length 1.

        The model must have an image tower, which runs once for both.
        """
        prediction, embeddings = self._predict(pixel_values, prompts, embeds=True)
        return prediction, cast(Tensor, embeddings)

    def _predict(
        self, pixel_values: Tensor, prompts: Sequence[Sequence[str]], embeds: bool
    ) -> tuple[Prediction[Tensor], Tensor | None]:
        image_indices = [index for index, image_prompts in enumerate(prompts) for _ in image_prompts]
        texts = [text for image_prompts in prompts for text in image_prompts]
        distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        text_features = self._prompts.encode(list(distinct))
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            embeddings = None
            if embeds:
                features, embeddings = self.network.encode_and_embed(pixel_values)
            else:
                features = self.network.encode(pixel_values)
            pieces, presences = [], []
            for start in range(0, len(texts), self.batch_size):
                batch = slice(start, start + self.batch_size)
                rows = [distinct[text] for text in texts[batch]]
                decoded, presence = self.network.decode(
                    self._take(features, image_indices[batch]), self._take(text_features, rows)
                )
                pieces.append(decoded[: len(rows), 0].float())
                if presence is not None:
                    presences.append(presence[: len(rows)].float().sigmoid())
        presence = torch.cat(presences) if presences else None
        return Prediction(torch.cat(pieces) / self._temperature, presence), embeddings

    def _take(self, features: Features, rows: list[int]) -> Features:
        """Return these rows of every tensor, without a copy if all rows are equal or consecutive.

        A compiled model gets copies, as many as the batch size: it would be compiled again for other strides and sizes.
        """
        if self.network.is_compiled:
            rows = rows + [rows[-1]] * (self.batch_size - len(rows))
        elif len(set(rows)) == 1:
            return tuple(part[rows[0]].expand(len(rows), *part.shape[1:]) for part in features)
        elif rows == [*range(rows[0], rows[0] + len(rows))]:
            return tuple(part[rows[0] : rows[0] + len(rows)] for part in features)
        index = torch.tensor(rows, pin_memory=self.device.type == "cuda").to(self.device, non_blocking=True)
        return tuple(part[index] for part in features)


def choose_device(device: str | None) -> torch.device:
    """Return a device by its name; None is the GPU if there is one, else the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _name_machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"this machine ({name}, torch {torch.__version__})"


@overload
def segment(  # type: ignore[overload-overlap]  # a str is an iterable too
    images: OneImage,
    checkpoint: Checkpoint | str | Path,
    prompts: Prompts = None,
    *,
    threshold: float | None = None,
    probabilities: bool = False,
    device: str | None = None,
    allow_equal_masks: bool = False,
    embedding: bool = False,
) -> Segmentation: ...


@overload
def segment(
    images: Iterable[Any],
    checkpoint: Checkpoint | str | Path,
    prompts: Prompts = None,
    *,
    threshold: float | None = None,
    probabilities: bool = False,
    device: str | None = None,
    allow_equal_masks: bool = False,
    embedding: bool = False,
) -> list[Segmentation]: ...


def segment(  # noqa: PLR0913 - as the method, and the model
    images: Any,
    checkpoint: Checkpoint | str | Path,
    prompts: Prompts = None,
    *,
    threshold: float | None = None,
    probabilities: bool = False,
    device: str | None = None,
    allow_equal_masks: bool = False,
    embedding: bool = False,
) -> Segmentation | list[Segmentation]:
    """Return one mask per image and prompt: load a model, segment, forget the model.

    To segment again and again, load the model once: `vlsm.Segmenter(vlsm.load_checkpoint(...))`.

    Args:
        images: one image or several, as for `Segmenter.segment`.
        checkpoint: a checkpoint's folder or URI, a Checkpoint, or the hub id or folder of a published CLIPSeg, such as
            "CIDAS/clipseg-rd64-refined", which needs a prompt.
        prompts: one text or several, for every image. Default: the stored prompt of the checkpoint.
        threshold: a probability in (0, 1). Default: the stored threshold of the checkpoint.
        probabilities: whether to keep the probability of each pixel too.
        device: such as "cpu" or "cuda". Default: the GPU if there is one, else the CPU.
        allow_equal_masks: as for `Segmenter.segment`.
        embedding: whether to keep a vector of each image too.

    Returns:
        As `Segmenter.segment`.

    Raises:
        CheckpointError: there is no usable model.
        ValueError, TypeError, ImageError: as for `Segmenter.segment`.
    """
    segmenter = Segmenter(find_checkpoint(checkpoint, prompts is not None), device)
    return segmenter.segment(images, prompts, threshold, probabilities, allow_equal_masks, embedding)


def _list_texts(prompts: Any) -> list[str]:
    texts = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, Iterable) else [prompts]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("prompts must be a text, or a list of texts, which every image gets")
    if not texts:
        raise ValueError("prompts is empty; each image needs one prompt or more")
    return texts
