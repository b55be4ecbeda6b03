"""Probes of models: `vlsm.models.probe` says what they are for. Here the arrays are computed."""

import contextlib
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from vlsm.errors import CheckpointError
from vlsm.images.decode import decode_image
from vlsm.models.contract import Features, SegmentationModel
from vlsm.models.probe import SIDE, TEXT_VALUES

_PROMPT = "Flat polyp, 2 left!"  # beside the checkpoint's own: capitals and signs, which tokenizers treat differently
# operations of torch that take and give bfloat16 under autocast; attention has several names
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear", "convolution", "_convolution"}


def make_probe(model: SegmentationModel, prompt: str = "") -> bytes:
    """Return the content of probe.safetensors for a model, on the model's device. Its mode stays as it is.

    Args:
        model: a whole model without adapters.
        prompt: the default prompt of its checkpoint, or "".

    Raises:
        CheckpointError: its logits are no numbers.
    """
    prompts = list(dict.fromkeys(text for text in (prompt, _PROMPT) if text.strip()))
    sink = io.BytesIO()
    Image.fromarray(draw_image(model.image_spec.size)).save(sink, "PNG")
    image = decode_image(sink.getvalue(), "the probe")
    with _served(model), torch.no_grad():
        square = np.array(model.image_spec.square.resize_image(image)[None])
        pixel_values = model.image_spec.normalize(torch.from_numpy(square).to(model.device))
        texts = model.encode_prompts(prompts)
        values = measure(pixel_values, texts, _predict(model, pixel_values, texts))
        with _ShortProducts():  # type: ignore[no-untyped-call]
            rounded = measure(pixel_values, texts, _predict(model, pixel_values, texts))
    if not all(np.isfinite(array).all() for array in (*values.values(), rounded["logits"])):
        raise CheckpointError("the model gives logits that are no numbers: it is of no use as a checkpoint")
    rounding = np.abs(rounded["logits"] - values["logits"]).max()
    texts_and_image = {"prompts": json.dumps(prompts).encode(), "image": sink.getvalue()}
    return safetensors.numpy.save(
        {name: np.frombuffer(data, np.uint8) for name, data in texts_and_image.items()}
        | values
        | {"rounding": np.array([rounding], np.float32)}
    )


def _predict(model: SegmentationModel, pixel_values: Tensor, texts: Features) -> Tensor:
    """Return the logits (T, S, S) of one image with all texts."""
    num_texts = len(texts[0])
    image_features = tuple(part.expand(num_texts, *part.shape[1:]) for part in model.encode_images(pixel_values))
    return model.decode(image_features, texts)[:, 0]


def measure(pixel_values: Tensor, texts: Features, logits: Tensor) -> dict[str, np.ndarray]:
    """Return the arrays of a probe, float32.

    Args:
        pixel_values: (B, 3, S, S), whose first image is the probe.
        texts: features of T prompts.
        logits: (T, S, S).
    """
    side = pixel_values.shape[-1]
    places = _spread(side, min(SIDE, side))
    words = torch.cat([part.flatten(1).float() for part in texts], dim=1)
    blocks = torch.nn.functional.adaptive_avg_pool2d(logits.float(), len(places))
    arrays = {
        "pixels": pixel_values[0][:, places][:, :, places],
        "texts": words[:, _spread(words.shape[1], min(words.shape[1], TEXT_VALUES))],
        "logits": blocks,
    }
    return {name: array.cpu().numpy().astype(np.float32, order="C") for name, array in arrays.items()}


def _spread(length: int, count: int) -> list[int]:
    """Return indices that are spread evenly from the first one to the last."""
    return np.linspace(0, length - 1, count).round().astype(int).tolist() if count else []


@contextlib.contextmanager
def _served(model: SegmentationModel) -> Iterator[None]:
    """Enclose a computation as in a Segmenter: without dropout, with the statistics of batch norms."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class _ShortProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rounds what products take and give to bfloat16, as under autocast, but in float32's arithmetic.

    So it needs no processor that knows bfloat16: on others, torch's own is slower by orders of magnitude.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: torch would import its compiler to keep it away from this class."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name not in _PRODUCTS and "attention" not in name:
            return func(*args, **kwargs)
        return _shorten(func(*_shorten(args), **_shorten(kwargs)))


def _shorten(values: Any) -> Any:
    """Return values of any structure with their float32 tensors rounded to bfloat16."""

    def shorten_one(value: Tensor) -> Tensor:
        return value.bfloat16().float() if value.dtype == torch.float32 else value

    return tree_map_only(Tensor, shorten_one, values)


def draw_image(size: int) -> np.ndarray:
    """Return a picture for a model of this input side, (H, W, 3) uint8, of at most 256 x 1024 pixels.

    It is enlarged along its height and made smaller along its width, it has other colours and shapes at each side, and
    its fine stripes become others if a library resizes without antialiasing.
    """
    height, width = min(max(size // 2, 8), 256), min(max(2 * size, 16), 1024)
    y, x = (np.mgrid[:height, :width] + 0.5) / np.array([height, width])[:, None, None]
    image = np.stack([255 * x, 40 + 190 * y, 220 * (1 - x) * (1 - y)], axis=2)
    image[(x - 0.3) ** 2 + (y - 0.35) ** 2 < 0.03] = 225, 105, 70
    image[4 * (x - 0.72) ** 2 + (y - 0.5) ** 2 < 0.05] = 25, 30, 60
    period = 2 + np.floor(5 * x)  # of the stripes, in pixels
    is_bright = np.arange(width) % period < period / 2
    stripes = np.where(is_bright[..., None], [250, 240, 150], [10, 60, 90])
    image[y > 0.75] = stripes[y > 0.75]
    return image.astype(np.uint8)
