"""Probes: with each checkpoint an image, its prompts, and what the model made of them where it was written.

A model that computes otherwise on another machine gives masks that look like masks. So each checkpoint has
`probe.safetensors`: a drawn image as a PNG, prompts, and three arrays that the model gave in float32:

    pixels  (3, P, P)  values of pixel_values at the places of an even grid: decoding, resizing, normalisation
    texts   (T, N)     every n-th value of the text features: tokenizer and text tower
    logits  (T, P, P)  means of the logits in P x P blocks, P = min(32, S): all the rest

`vlsm.segmentation.segmenter.Segmenter.check_probe` makes the arrays again on its device, by the path of any image.
Pixels and texts are computed in float32 everywhere. They may differ by 2 % of their largest value: two and a half of
255 levels, where two libraries that resize differ by one, and far more than float32 differs between devices. Another
normalisation, another filter or another token differs by more.

Logits depend on the precision, and deep models multiply its errors. So the probe states how far this model's logits
move if all matrix products, convolutions and attention take and give bfloat16, `rounding`. It is the unit of the
tolerances in PRECISIONS. float32 gets one unit: it rounds 65,536 times finer, TF32 in the convolutions of a GPU 8 times
finer, and one of 255 levels is about the rounding of the input. float16 rounds 8 times finer than bfloat16, but its
small numbers are coarser: 2 units. bfloat16 gets 4: kernels add in other orders, and round more or fewer results.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from vlsm.errors import CheckpointError, ImageError, ProbeError
from vlsm.images.decode import decode_image
from vlsm.limits import MAX_NAME_BYTES, MAX_PROBE_BYTES, MAX_PROBE_PIXELS, MAX_PROBE_PROMPTS

PROBE_NAME = "probe.safetensors"
Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: dict[Precision, float] = {"fp32": 1, "fp16": 2, "bf16": 4}  # tolerances of logits, in `Probe.rounding`
_SHARE = 0.02  # tolerance of pixels and texts, in their largest absolute value
_FLOOR = 1e-3  # least unit of logits, in their largest absolute value: of a model that bfloat16 hardly moves
SIDE, TEXT_VALUES = 32, 256
_PNG = b"\x89PNG\r\n\x1a\n"
# what may differ, and the usual reasons; the first one that differs is the cause of the others
_STAGES = {
    "pixels": ("resized and normalised pixels", "a library decodes or resizes otherwise, or mean and std were changed"),
    "texts": ("text features", "a tokenizer or a text tower is another one"),
    "logits": ("logits", "weights were changed, or a GPU, a driver or a library computes otherwise"),
}


class Agreement(NamedTuple):
    """The largest difference between the logits of a probe and the stored ones, and its tolerance."""

    difference: float
    tolerance: float

    def __str__(self) -> str:
        return f"the logits of its probe differ by {self.difference:.2g}; {self.tolerance:.2g} may be"


@dataclass(frozen=True, eq=False)
class Probe:
    """The content of probe.safetensors.

    Attributes:
        image: a PNG file.
        prompts: texts, T of them.
        pixels, texts, logits: the expected arrays, float32.
        rounding: how far bfloat16 moves the logits.
    """

    image: bytes
    prompts: tuple[str, ...]
    pixels: np.ndarray
    texts: np.ndarray
    logits: np.ndarray
    rounding: float

    def decode(self) -> np.ndarray:
        """Return the image, (H, W, 3) uint8."""
        return decode_image(self.image, "the probe", MAX_PROBE_PIXELS)

    def compare(self, found: Mapping[str, np.ndarray], precision: Precision, machine: str) -> Agreement:
        """Compare the arrays of `measure` with the expected ones.

        Args:
            found: the arrays that a machine gives.
            precision: of its computation.
            machine: its name, for messages.

        Raises:
            ProbeError: they differ by more than the tolerance, or are no numbers.
        """
        agreement = Agreement(0, 0)
        for name, (words, reason) in _STAGES.items():
            expected: np.ndarray = getattr(self, name)
            largest = float(np.abs(expected).max(initial=0))
            tolerance = _SHARE * largest
            if name == "logits":
                tolerance = PRECISIONS[precision] * max(self.rounding, _FLOOR * largest)
            is_alike = found[name].shape == expected.shape
            difference = float(np.abs(found[name] - expected).max(initial=0)) if is_alike else np.inf
            if not difference <= tolerance:  # NaN is no number that is smaller
                raise ProbeError(
                    f"the model does not compute on {machine} as where its checkpoint was written: the {words} of its "
                    f"probe differ by {difference:.3g}, and {tolerance:.3g} is the most for {precision}; {reason}"
                )
            agreement = Agreement(difference, tolerance)
        return agreement


def parse_probe(data: bytes, name: str, size: int) -> Probe:
    """Return the checked content of a probe.safetensors that anybody may have written; it needs no torch.

    Args:
        data: its content.
        name: its name, for messages.
        size: side S of the model's input.

    Raises:
        CheckpointError: it is damaged, or beyond the limits.
    """
    import safetensors.numpy

    if len(data) > MAX_PROBE_BYTES:
        raise CheckpointError(f"{name} has {len(data):,} bytes; a probe has {MAX_PROBE_BYTES:,} at most")
    try:
        arrays = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name} is damaged: {' '.join(str(error).split())[:200]}") from error
    if arrays.keys() != {"image", "prompts", "pixels", "texts", "logits", "rounding"}:
        raise CheckpointError(f"{name} is no probe: it has {', '.join(sorted(arrays))[:200]}")
    prompts = _parse_prompts(arrays.pop("prompts"), name)
    side = min(SIDE, size)
    num_values = arrays["texts"].shape[-1] if arrays["texts"].ndim == 2 else 0
    shapes = {"pixels": (3, side, side), "texts": (len(prompts), min(num_values, TEXT_VALUES)), "rounding": (1,)}
    shapes["logits"] = (len(prompts), side, side)
    for key, shape in shapes.items():
        array = arrays[key]
        if array.shape != shape or array.dtype != np.float32:
            raise CheckpointError(
                f"{name} is no probe: {key} is {array.dtype} of shape {array.shape!s:.80}; it must be float32 of shape "
                f"{shape}"
            )
        if not np.isfinite(array).all():
            raise CheckpointError(f"{name} is no probe: {key} has values that are no numbers")
    if not (rounding := float(arrays.pop("rounding")[0])) >= 0:
        raise CheckpointError(f"{name} is no probe: rounding is {rounding}; it must be 0 or more")
    return Probe(_parse_image(arrays.pop("image"), name), prompts, **arrays, rounding=rounding)


def _parse_prompts(array: np.ndarray, name: str) -> tuple[str, ...]:
    try:
        prompts = json.loads(_bytes_of(array)) if array.size < MAX_PROBE_PROMPTS * 2 * MAX_NAME_BYTES else None
    except (ValueError, RecursionError):
        prompts = None
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= MAX_PROBE_PROMPTS:
        raise CheckpointError(f"{name} is no probe: its prompts must be a list of 1 to {MAX_PROBE_PROMPTS} texts")
    if not all(isinstance(text, str) and len(text) <= MAX_NAME_BYTES for text in prompts):
        raise CheckpointError(f"{name} is no probe: a prompt must be a text of {MAX_NAME_BYTES:,} letters at most")
    return tuple(prompts)


def _parse_image(array: np.ndarray, name: str) -> bytes:
    data = _bytes_of(array)
    if not data.startswith(_PNG):
        raise CheckpointError(f"{name} is no probe: its image is {array.dtype} and no PNG")
    try:
        decode_image(data, "its image", MAX_PROBE_PIXELS)
    except ImageError as error:
        raise CheckpointError(f"{name} is no probe: {error}") from error
    return data


def _bytes_of(array: np.ndarray) -> bytes:
    return array.tobytes() if array.dtype == np.uint8 and array.ndim == 1 else b""
