"""Builds the model of a checkpoint, after its sizes have been compared with its weights.

Whatever a hostile configuration says, a model is not built far beyond its weights: the header of the weights states how
many tensors and values there are. The model is first built on torch's meta device, which allocates nothing.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from vlsm.documents import parse_json
from vlsm.errors import CheckpointError, VlsmError
from vlsm.models import find_model, parse_options
from vlsm.models.contract import SegmentationModel
from vlsm.models.options import StackPart
from vlsm.models.stack import Stack

Shapes = Mapping[str, tuple[int, ...]]

_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
_MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors
_MAX_NAME = 300
# Towers are built whole, then the layers above the last tap are cut off: of 64 layers, one may stay.
_SPARE_FACTOR, _SPARE_TENSORS, _SPARE_VALUES = 20, 2_000, 10_000_000

# Of torch.nn.init, and of transformers, which puts its own in their place. The methods of a tensor are left alone: what
# draws by them may draw until the values lie within bounds, as trunc_normal_ does.
_DRAWING = {"normal_", "uniform_", "kaiming_uniform_"}
_DRAWING_MODULES = {"torch.nn.init", "transformers.initialization"}


def read_shapes(data: bytes, name: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a safetensors file, from its header.

    Raises:
        CheckpointError: the header is damaged, names a tensor twice, or has names or types that no model has.
    """
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(len(data) - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(f"{name} is damaged: its header has {length:,} bytes, and the file {len(data):,}")
    header = parse_json(bytes(data[8 : 8 + length]), f"{name} is damaged: its header", CheckpointError)
    if not isinstance(header, dict):
        raise CheckpointError(f"{name} is damaged: its header is a {type(header).__name__}")
    shapes = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        shape, dtype = (entry.get(field) if isinstance(entry, dict) else None for field in ("shape", "dtype"))
        if len(key) > _MAX_NAME or not key.isprintable():
            raise CheckpointError(f"{name} is damaged: a tensor has the name {key[:80]!r}")
        if not isinstance(shape, list) or not all(type(side) is int and 0 <= side < 1 << 48 for side in shape):
            raise CheckpointError(f"{name} is damaged: {key} has the shape {shape!r:.80}")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise CheckpointError(f"{name} is damaged: {key} has the type {dtype!r:.80}")
        shapes[key] = tuple(shape)
    return shapes


def restore_model(
    model_class: type[SegmentationModel], options: Any, folder: Path, shapes: Shapes, uri: str
) -> SegmentationModel:
    """Build the model of a checkpoint on the CPU, with weights that the caller replaces.

    Args:
        model_class: class of the model.
        options: its checked options.
        folder: the files of its towers, as `write_tower_files` has written them.
        shapes: result of `read_shapes`.
        uri: location of the checkpoint, for messages.

    Raises:
        CheckpointError: the configuration describes another model than the weights, or no model at all.
    """
    try:
        return _restore(model_class, options, folder, shapes, uri)
    except BaseException as error:  # of any type: libraries do not expect hostile files
        # a panic of the tokenizers, which are written in Rust, is not even an Exception
        if isinstance(error, VlsmError) or not (isinstance(error, Exception) or "Panic" in type(error).__name__):
            raise
        raise CheckpointError(
            f"the files of checkpoint {uri!r} do not describe {model_class.__name__}: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


def _restore(
    model_class: type[SegmentationModel], options: Any, folder: Path, shapes: Shapes, uri: str
) -> SegmentationModel:
    if issubclass(model_class, Stack):
        return _restore_stack(model_class, options, folder, shapes, uri)
    if model_class.has_sizes:
        with torch.device("meta"), _Undrawn(), _bounded(shapes, uri):
            check_shapes(model_class.restore(options, folder).add_adapters(), shapes, uri)
    with _Undrawn(), _bounded(shapes, uri):
        model = model_class.restore(options, folder).add_adapters()
    check_shapes(model, shapes, uri)
    return model


def _restore_stack(model_class: type[Stack], options: Any, folder: Path, shapes: Shapes, uri: str) -> SegmentationModel:
    """Build each member as the model of a checkpoint of its own, whose weights are its part of the weights."""

    def restore(number: int, part: StackPart, member_folder: Path) -> SegmentationModel:
        prefix = f"members.{number}."
        own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        member_options = parse_options(part.model, part.options)
        return restore_model(find_model(part.model), member_options, member_folder, own, f"{uri}, member {number + 1}")

    model = model_class.restore(options, folder, restore)
    check_shapes(model, shapes, uri)
    return model


def check_shapes(model: nn.Module, shapes: Shapes, uri: str) -> None:
    """Raise a CheckpointError if names or shapes of the weights differ from the model's."""
    known = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    wrong = [key for key in sorted(known.keys() | shapes.keys()) if known.get(key) != shapes.get(key)]
    if wrong:
        shown = "; ".join(f"{key}: {shapes.get(key, 'none')} instead of {known.get(key, 'none')}" for key in wrong[:3])
        raise CheckpointError(f"the weights of checkpoint {uri!r} do not fit its model in {len(wrong)} places: {shown}")


class _Undrawn(TorchFunctionMode):
    """Leaves weights as they were allocated where a library would draw random ones: the caller replaces them all."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return the tensor of a drawing function as it is; call any other function."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) in _DRAWING_MODULES and func.__name__ in _DRAWING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextlib.contextmanager
def _bounded(shapes: Shapes, uri: str) -> Iterator[None]:
    """Raise a CheckpointError when a module that this thread builds gets far more than the weights hold."""
    most_tensors = _SPARE_FACTOR * len(shapes) + _SPARE_TENSORS
    most_values = _SPARE_FACTOR * sum(map(prod, shapes.values())) + _SPARE_VALUES
    thread = threading.get_ident()
    num_tensors = num_values = 0

    def count(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        nonlocal num_tensors, num_values
        if tensor is None or threading.get_ident() != thread:
            return
        num_tensors, num_values = num_tensors + 1, num_values + tensor.numel()
        if num_tensors > most_tensors or num_values > most_values:
            raise CheckpointError(
                f"the files of checkpoint {uri!r} describe a model that is far larger than its weights: with {name} of "
                f"a {type(module).__name__} it has {num_tensors:,} tensors and {num_values:,} values"
            )

    hooks = register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
