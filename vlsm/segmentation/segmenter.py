"""Segment images with a checkpoint: arrays in, arrays out, without a cluster."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vlsm.checkpoints import Checkpoint
from vlsm.models.folding import fold_batch_norms
from vlsm.models.prompts import PromptCache
from vlsm.segmentation.masks import mask_from_logits


class Segmenter:
    """A checkpoint on a device. Each distinct prompt and each image is encoded once.

    The Segmenter changes the model of the checkpoint: it folds the batch norms for speed. To train or save that model,
    load the checkpoint again.

    Args:
        checkpoint: from `vlsm.load_checkpoint`.
        device: such as "cpu", "cuda" or "cuda:1". Default: the GPU if there is one, else the CPU.
        batch_size: images per batch of the encoder, and (image, prompt) pairs per batch of the decoder. It affects only
            speed.
    """

    def __init__(self, checkpoint: Checkpoint, device: str | None = None, batch_size: int = 8) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if not isinstance(checkpoint, Checkpoint):
            raise TypeError(f"checkpoint is a {type(checkpoint).__name__}; pass the result of vlsm.load_checkpoint")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
        # torch's fast path for nn.MultiheadAttention computes attention maps; without it, torch uses fused attention
        torch.backends.mha.set_fastpath_enabled(False)
        fold_batch_norms(checkpoint.model)
        self.model = checkpoint.model.to(self.device).to(memory_format=torch.channels_last)
        self.settings = checkpoint.settings
        self.batch_size = batch_size
        self._temperature = self.settings.calibration.temperature if self.settings.calibration else 1.0
        self._prompts = PromptCache(self.model)

    def segment(
        self,
        images: Sequence[np.ndarray],
        prompts: str | Sequence[str] | None = None,
        threshold: float | None = None,
    ) -> list[np.ndarray]:
        """Return one mask per image and prompt, at the original size of the image.

        Args:
            images: arrays (H, W, 3) uint8; their sizes may differ.
            prompts: one text or several, for every image. Default: the stored prompt of the checkpoint.
            threshold: a probability in (0, 1). Default: the stored threshold of the checkpoint.

        Returns:
            One array per image: (H, W) uint8 of 0 and 1 for one text, (T, H, W) for a sequence of T texts.

        Raises:
            ValueError: an image is not (H, W, 3) uint8, there is no prompt, or the threshold is not in (0, 1).
        """
        texts = [prompts] if isinstance(prompts, str) else [self.settings.prompt] if prompts is None else list(prompts)
        for image in images:
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise ValueError(f"an image is {image.dtype} of shape {image.shape}; it must be uint8 (H, W, 3)")
        if len(images) == 0:
            return []
        threshold = self.settings.threshold if threshold is None else threshold
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is {threshold}; it must be a probability between 0 and 1")
        square = self.model.image_spec.square
        resized = np.stack([square.resize_image(image) for image in images])
        all_logits = self.predict_logits(resized, [texts] * len(images))
        masks = [
            np.stack([mask_from_logits(logits, image.shape[:2], threshold, square) for logits in image_logits])
            for image, image_logits in zip(images, all_logits, strict=True)
        ]
        return masks if isinstance(prompts, Sequence) and not isinstance(prompts, str) else [mask[0] for mask in masks]

    @torch.inference_mode()
    def predict_logits(self, images: np.ndarray, prompts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Return logits at the model's size S. If the checkpoint is calibrated, they are divided by its temperature.

        Args:
            images: (N, S, S, 3) uint8, resized by the `square` of the model's `image_spec`.
            prompts: the texts of each image, at least one.

        Returns:
            One array per image: (T, S, S) float32 for its T texts.

        Raises:
            ValueError: images and prompts disagree on N, or an image has no prompt.
        """
        if len(images) != len(prompts) or not all(prompts):
            raise ValueError(
                f"{len(images)} images come with {len(prompts)} lists of prompts; each image needs one prompt or more"
            )
        logits: list[np.ndarray] = []
        for start in range(0, len(images), self.batch_size):
            batch = slice(start, start + self.batch_size)
            logits += self._predict_batch(images[batch], prompts[batch])
        return logits

    def _predict_batch(self, images: np.ndarray, prompts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        image_indices = [index for index, image_prompts in enumerate(prompts) for _ in image_prompts]
        texts = [text for image_prompts in prompts for text in image_prompts]
        distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        text_features = self._prompts.encode(list(distinct))
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            pixel_values = self.model.image_spec.normalize(torch.from_numpy(np.array(images)).to(self.device))
            features = self.model.encode_images(pixel_values)
            pieces = []
            for start in range(0, len(texts), self.batch_size):
                batch = slice(start, start + self.batch_size)
                batch_texts = _take(text_features, [distinct[text] for text in texts[batch]])
                batch_images = _take(features, image_indices[batch])
                pieces.append(self.model.decode(batch_images, batch_texts)[:, 0].float().cpu())
        logits = (torch.cat(pieces) / self._temperature).numpy()  # (sum of T, S, S)
        return np.split(logits, np.cumsum([len(image_prompts) for image_prompts in prompts])[:-1])


def _take(features: tuple[Tensor, ...], rows: list[int]) -> tuple[Tensor, ...]:
    """Return these rows of every tensor, without a copy if all rows are equal or consecutive."""
    if len(set(rows)) == 1:
        return tuple(part[rows[0]].expand(len(rows), *part.shape[1:]) for part in features)
    if rows == [*range(rows[0], rows[0] + len(rows))]:
        return tuple(part[rows[0] : rows[0] + len(rows)] for part in features)
    index = torch.tensor(rows, device=features[0].device)
    return tuple(part[index] for part in features)
