"""Models compiled by torch: a model's two steps as fused kernels, or as they are if compiling fails."""

import functools
import logging
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from vlsm.models.contract import Features, SegmentationModel
from vlsm.models.towers import Towers
from vlsm.temporary import lasting_folder

logger = logging.getLogger("vlsm")

ParamT = ParamSpec("ParamT")
ResultT = TypeVar("ResultT")

_RECOMPILE_LIMIT = 64  # torch's limit of 8 for one function counts all members of an ensemble that share the function


class Network:
    """The steps of a model on its device: images to features once, then features and texts to logits.

    Compiled steps need batches of one size, because each new size takes another minute. Towers are compiled on their
    own, so that models can share one (`vlsm.models.sharing`).

    Args:
        model: a model that is ready for inference.
        is_compiled: whether to compile. The compiler works at the first call, and its results stay on this machine
            (`TORCHINDUCTOR_CACHE_DIR`, by default in the user's cache folder).

    Attributes:
        is_compiled: whether calls use the compiled steps; it may be set to False for a while.
    """

    def __init__(self, model: SegmentationModel, is_compiled: bool = False) -> None:
        self._model = model
        self.is_compiled = is_compiled
        if is_compiled:
            _prepare_compiler()
            self._encode, self._decode = self._compile(model.encode_images), self._compile(model.decode)
            self._towers = [module for module in model.modules() if isinstance(module, Towers)]
            for towers in self._towers:
                towers.encode_images = self._compile(towers.encode_images)  # type: ignore[method-assign]

    def encode(self, pixel_values: Tensor) -> Features:
        """Return the image features, as `SegmentationModel.encode_images`."""
        if not self.is_compiled:
            return self._model.encode_images(pixel_values)
        if not self._towers:
            return self._encode(pixel_values)
        return self._encode(pixel_values, self._model.encode_towers(pixel_values))

    def encode_and_embed(self, pixel_values: Tensor) -> tuple[Features, Tensor]:
        """Return the image features, and the embeddings of `SegmentationModel.embed_images`; the towers run once."""
        activations = self._model.encode_towers(pixel_values)
        step = self._encode if self.is_compiled else self._model.encode_images
        return step(pixel_values, activations), self._model.embed_images(activations)

    def decode(self, image_features: Features, text_features: Features) -> Tensor:
        """Return logits (B, 1, S, S), as `SegmentationModel.decode`."""
        step = self._decode if self.is_compiled else self._model.decode
        return step(image_features, text_features)

    def _compile(self, step: Callable[ParamT, ResultT]) -> Callable[ParamT, ResultT]:
        """Return the compiled step. If it fails, this network runs as it is from then on, with one warning."""
        compiled = torch.compile(step, dynamic=False)

        @functools.wraps(step)
        def run(*args: ParamT.args, **options: ParamT.kwargs) -> ResultT:
            if not self.is_compiled:
                return step(*args, **options)
            try:
                return compiled(*args, **options)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of the compiler, in classes of many kinds; an error of the model comes again
                self.is_compiled = False
                result = step(*args, **options)
                _warn(_explain(getattr(error, "inner_exception", error)))
                return result

        return run


def _explain(error: BaseException) -> str:
    """Return the class of an error and the first line of its message."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


@functools.cache  # members of an ensemble fail for the same reason
def _warn(reason: str) -> None:
    logger.warning("the model cannot be compiled (%s): it runs without, more slowly; run.compile=off", reason)


def _prepare_compiler() -> None:
    """Let the compiler keep its results in a private folder: torch's own, below /tmp, has a name that others can guess.

    The process loads libraries from this folder.
    """
    if not os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(lasting_folder("compiled"))
    import torch._dynamo  # here: it takes seconds, and only processes that compile need it

    torch._dynamo.config.recompile_limit = max(_RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
