"""Segment images with a checkpoint: arrays in, arrays out, no cluster needed."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vlsm.checkpoints import Checkpoint
from vlsm.models.folding import fold_batch_norms
from vlsm.models.prompts import PromptCache
from vlsm.segmentation.masks import mask_from_logits


class Segmenter:
    """A checkpoint on a device. Each distinct prompt is encoded once, each image goes through the image tower once.

    The checkpoint's model is taken over: its batch norms are folded for speed. Load it anew to train or save it.

    Args:
        checkpoint: from `vlsm.load_checkpoint`.
        device: "cpu", "cuda", "cuda:1"; the GPU if there is one unless told.
        batch_size: images, and then (image, prompt) pairs, that go through the model at once. It changes speed only.
    """

    def __init__(self, checkpoint: Checkpoint, device: str | None = None, batch_size: int = 8) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if not isinstance(checkpoint, Checkpoint):
            raise TypeError(f"a Segmenter takes what load_checkpoint gives, not a {type(checkpoint).__name__}")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
        # torch's shortcut for nn.MultiheadAttention makes attention maps; without it the attention is fused
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
        """One mask per image and prompt, at the image's own size.

        Args:
            images: arrays (H, W, 3) uint8, each of its own size.
            prompts: one text or several, for every image; the checkpoint's own unless told.
            threshold: a probability; the checkpoint's own unless told.

        Returns:
            One array per image: (H, W) uint8 of 0 and 1 for one text, (T, H, W) for a sequence of T texts.

        Raises:
            ValueError: an image is not (H, W, 3) uint8, there is no prompt, or the threshold is no probability.
        """
        texts = [prompts] if isinstance(prompts, str) else [self.settings.prompt] if prompts is None else list(prompts)
        for image in images:
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise ValueError(f"an image is {image.dtype} of shape {image.shape}; images are uint8 (H, W, 3)")
        if len(images) == 0:
            return []
        threshold = self.settings.threshold if threshold is None else threshold
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is {threshold}; it must be a probability between 0 and 1")
        square = self.model.image_spec.square
        resized = np.stack([square.resize_image(image) for image in images])
        all_logits = self.predict_logits(resized, [texts] * len(images))
        masks = [
            np.stack([mask_from_logits(one, image.shape[:2], threshold, square) for one in logits])
            for image, logits in zip(images, all_logits, strict=True)
        ]
        return masks if isinstance(prompts, Sequence) and not isinstance(prompts, str) else [mask[0] for mask in masks]

    @torch.inference_mode()
    def predict_logits(self, images: np.ndarray, prompts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Logits at the model's own size, divided by the checkpoint's temperature where it is calibrated.

        Args:
            images: (N, S, S, 3) uint8, resized by the `square` of the model's `image_spec`.
            prompts: the texts of each image, one at least.

        Returns:
            One array per image: (T, S, S) float32, T the number of its texts.

        Raises:
            ValueError: images and prompts disagree on N, or an image has no prompt.
        """
        if len(images) != len(prompts) or not all(prompts):
            raise ValueError(
                f"{len(images)} images and {len(prompts)} lists of prompts; each image needs one prompt or more"
            )
        logits: list[np.ndarray] = []
        for start in range(0, len(images), self.batch_size):
            batch = slice(start, start + self.batch_size)
            logits += self._predict_batch(images[batch], prompts[batch])
        return logits

    def _predict_batch(self, images: np.ndarray, prompts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        owners = [index for index, texts in enumerate(prompts) for _ in texts]
        texts = [text for own in prompts for text in own]
        distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        text_features = self._prompts.encode(list(distinct))
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            pixel_values = self.model.image_spec.normalize(torch.from_numpy(np.array(images)).to(self.device))
            features = self.model.encode_images(pixel_values)
            pieces = []
            for start in range(0, len(owners), self.batch_size):
                batch = slice(start, start + self.batch_size)
                wanted = _take(text_features, [distinct[text] for text in texts[batch]])
                pieces.append(self.model.decode(_take(features, owners[batch]), wanted)[:, 0].float().cpu())
        logits = (torch.cat(pieces) / self._temperature).numpy()  # (sum of T, S, S)
        return np.split(logits, np.cumsum([len(own) for own in prompts])[:-1])


def _take(features: tuple[Tensor, ...], rows: list[int]) -> tuple[Tensor, ...]:
    """Rows of every tensor, without a copy where one image has all the prompts, or each image one."""
    if len(set(rows)) == 1:
        return tuple(part[rows[0]].expand(len(rows), *part.shape[1:]) for part in features)
    if rows == [*range(rows[0], rows[0] + len(rows))]:
        return tuple(part[rows[0] : rows[0] + len(rows)] for part in features)
    index = torch.tensor(rows, device=features[0].device)
    return tuple(part[index] for part in features)
