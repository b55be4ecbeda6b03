"""What a Segmenter returns for an image: its masks as an array, with what they belong to."""

import base64
import html
import io
import textwrap
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from PIL import Image

from vlsm.images.overlays import draw_overlay, shrink_mask
from vlsm.images.preprocess import Square
from vlsm.segmentation.masks import logit, probabilities, values_inside
from vlsm.shown import show

# one for each prompt of an overlay, from the start again if there are more
_COLOURS = ((0, 230, 118), (64, 156, 255), (255, 171, 0), (255, 82, 82), (179, 136, 255), (0, 229, 255))
_PREVIEW_PX = 640  # longest side of the picture in a notebook
_MOST_TOLD = 3  # prompts in a repr


class Segmentation(np.ndarray):
    """The mask of an image: an array (H, W) uint8 of 0 and 1, or (T, H, W) for a sequence of T prompts.

    It is used like any array. Whatever is computed from it is a plain array; `segmentation[0]` of a sequence of prompts
    is the Segmentation of the first.

    Attributes:
        image: (H, W, 3) uint8, the image as the model saw it before it was resized.
        prompts: the texts, T of them.
        confidences: for each text the mean probability inside the mask; None if the mask is empty.
        probability: as the mask, float32: the probability of each pixel, after calibration; None if it was not kept.
        embedding: (D,) float16, the vector of the image; None if it was not kept.
        presences: for each text the probability that the image shows it at all; empty if the model does not compute it.
    """

    image: np.ndarray | None = None  # None for a view or copy of a Segmentation, which no longer belongs to an image
    prompts: tuple[str, ...] = ()
    confidences: tuple[float | None, ...] = ()
    probability: np.ndarray | None = None
    embedding: np.ndarray | None = None
    presences: tuple[float, ...] = ()

    def __new__(  # noqa: PLR0913 - the attributes
        cls,
        mask: np.ndarray,
        image: np.ndarray,
        prompts: Sequence[str],
        confidences: Sequence[float | None],
        probability: np.ndarray | None = None,
        embedding: np.ndarray | None = None,
        presences: Sequence[float] = (),
    ) -> Self:
        """Return the masks as an array of this class; arguments are the attributes."""
        result = mask.view(cls)
        result.image, result.probability = image, probability
        result.prompts, result.confidences, result.presences = tuple(prompts), tuple(confidences), tuple(presences)
        result.embedding = embedding
        return result

    @property
    def mask(self) -> np.ndarray:
        """The same values as a plain array."""
        return np.asarray(self)

    @property
    def prompt(self) -> str | tuple[str, ...]:
        """The text, or all texts if a sequence was given."""
        return self.prompts[0] if self._is_single else self.prompts

    @property
    def confidence(self) -> float | tuple[float | None, ...] | None:
        """The mean probability inside the mask, or one for each text if a sequence was given; None if it is empty."""
        return self.confidences[0] if self._is_single else self.confidences

    @property
    def presence(self) -> float | tuple[float, ...] | None:
        """The probability that the image shows the text at all, or one for each text; None if it was not computed."""
        is_single = self._is_single
        return None if not self.presences else self.presences[0] if is_single else self.presences

    def overlay(self) -> Image.Image:
        """Return a picture of the image's size with the mask drawn on it; each of several prompts has its own colour.

        Raises:
            AttributeError: this array was computed from a Segmentation, and belongs to no image.
        """
        return Image.fromarray(_draw(self._image(), self._masks()))

    @property
    def _is_single(self) -> bool:
        self._image()
        return self.ndim == 2

    def _image(self) -> np.ndarray:
        if self.image is None:
            raise AttributeError("this array was computed from a segmentation; ask the segmentation itself")
        return self.image

    def _masks(self) -> np.ndarray:
        return self.mask.reshape(-1, *self.shape[-2:])

    def _describe(self, number: int) -> str:
        """Return how large and how certain a mask is, in words."""
        share, confidence = float(np.mean(self._masks()[number])), self.confidences[number]
        return "empty" if confidence is None else f"{share:.1%} of the image, confidence {confidence:.2f}"

    def __repr__(self) -> str:
        if self.image is None:
            return repr(self.mask)
        height, width = self.shape[-2:]
        parts = [
            f"{_short(prompt)}: {self._describe(number)}" for number, prompt in enumerate(self.prompts[:_MOST_TOLD])
        ]
        more = [f"{len(self.prompts) - _MOST_TOLD} more"] if len(self.prompts) > _MOST_TOLD else []
        return f"<Segmentation {width} x {height} pixels; {'; '.join([*parts, *more])}>"

    def _repr_html_(self) -> str | None:
        """Return the overlay for a notebook, at most 640 pixels wide and high, with one line for each prompt."""
        if self.image is None:
            return None
        small = Image.fromarray(np.ascontiguousarray(self.image))
        small.thumbnail((_PREVIEW_PX, _PREVIEW_PX))
        masks = [shrink_mask(np.ascontiguousarray(mask), small.size) for mask in self._masks()]
        file = io.BytesIO()
        Image.fromarray(_draw(np.asarray(small), masks)).save(file, "PNG")
        lines = [
            f'<div><span style="color:rgb{_COLOURS[number % len(_COLOURS)]}">&#9632;</span> '
            f"{html.escape(_short(prompt))}: {self._describe(number)}</div>"
            for number, prompt in enumerate(self.prompts)
        ]
        source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
        return f'<figure style="margin:0"><img src="{source}" alt="overlay">{"".join(lines)}</figure>'

    def __getitem__(self, key: Any) -> Any:
        is_number = isinstance(key, int | np.integer) and not isinstance(key, bool | np.bool_)
        if self.image is None or self.ndim != 3 or not is_number:
            return self.mask[key]
        probability = None if self.probability is None else self.probability[key]
        presences = [self.presences[key]] if self.presences else []
        prompts, confidences = [self.prompts[key]], [self.confidences[key]]
        return Segmentation(self.mask[key], self.image, prompts, confidences, probability, self.embedding, presences)

    def __array_wrap__(self, array: np.ndarray, context: Any = None, return_scalar: bool = False) -> Any:
        """Return what NumPy has computed from this array as a plain array or number."""
        return array[()] if return_scalar else np.asarray(array)

    def __reduce__(self) -> Any:
        if self.image is None:
            return self.mask.__reduce__()
        attributes = self.image, self.prompts, self.confidences, self.probability, self.embedding, self.presences
        return Segmentation, (self.mask, *attributes)


def segmentation_of(  # noqa: PLR0913 - what a mask depends on
    logits: np.ndarray,
    image: np.ndarray,
    prompts: str | Sequence[str],
    threshold: float,
    square: Square,
    probability_maps: bool = False,
    presence: np.ndarray | None = None,
) -> Segmentation:
    """Return the masks of one image at its original size.

    Logits are enlarged before thresholding, so that edges follow the image and not the model's grid.

    Args:
        logits: (T, S, S) float, one for each text.
        image: (H, W, 3) uint8.
        prompts: the text, or a sequence of T texts.
        threshold: a probability in (0, 1); at or above it a pixel is foreground.
        square: the input square of the model.
        probability_maps: whether to keep the probability of each pixel.
        presence: (T,) float, the probability that the image shows each text; None if the model does not compute it.
    """
    masks, confidences, maps = [], [], []
    for text_logits in logits:
        enlarged = square.enlarge_logits(text_logits, image.shape[:2])
        mask = enlarged >= logit(threshold)
        inside = probabilities(values_inside(enlarged, mask))
        masks.append(mask.view(np.uint8))
        confidences.append(float(np.mean(inside, dtype=np.float64)) if inside.size else None)
        if probability_maps:
            maps.append(probabilities(enlarged))
    stacked, stacked_maps = np.stack(masks), np.stack(maps) if maps else None
    presences = [] if presence is None else presence.tolist()
    if isinstance(prompts, str):
        first_map = None if stacked_maps is None else stacked_maps[0]
        return Segmentation(stacked[0], image, [prompts], confidences, first_map, presences=presences)
    return Segmentation(stacked, image, prompts, confidences, stacked_maps, presences=presences)


def _draw(image: np.ndarray, masks: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    picture = image
    for number, mask in enumerate(masks):
        picture = draw_overlay(picture, mask, colour=_COLOURS[number % len(_COLOURS)])
    return picture


def _short(prompt: str) -> str:
    return repr(show(textwrap.shorten(prompt, 40, placeholder="...")))
