"""The state of a training on storage: last.safetensors, the checkpoint of the best epoch, and the metrics."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlsm import storage
from vlsm.checkpoints import SETTINGS_NAME, save_checkpoint
from vlsm.documents import parse_json
from vlsm.errors import ConfigError, DamageError, StorageError
from vlsm.temporary import PrivateFolder
from vlsm.training.history import METRICS_NAME, History, parse_rows, parse_ties
from vlsm.version import FORMAT, newer_format

if TYPE_CHECKING:
    from torch import Tensor

    from vlsm.models.contract import SegmentationModel

CHECKPOINT_NAME, LAST_NAME, CURVES_NAME = "checkpoint", "last.safetensors", "curves.png"
ADVICE = "remove it, and the training begins anew with the same command"


@dataclass
class State:
    """The state of a run, from which it can be resumed.

    Attributes:
        epoch: current epoch, from 0.
        step: next step of this epoch, from 0.
        steps: optimiser steps of the run so far.
        scores: example, loss and Dice of this epoch's finished steps.
        history: metrics of the finished epochs.
        weights, optimizer: result of `Learner.state`, or None.
    """

    epoch: int = 0
    step: int = 0
    steps: int = 0
    scores: list[tuple[int, float, float]] = field(default_factory=list)
    history: History = field(default_factory=History)
    weights: "dict[str, Tensor] | None" = None
    optimizer: dict[str, Any] | None = None


def pack_state(state: State) -> bytes:
    """Return the bytes of last.safetensors."""
    import safetensors.torch

    optimizer = dict(state.optimizer or {})
    tensors = {f"weights {name}": value.contiguous() for name, value in (state.weights or {}).items()}
    for name, values in optimizer.pop("state", {}).items():
        tensors |= {f"optimizer {name} {key}": value.contiguous() for key, value in values.items()}
    progress: dict[str, Any] = {name: getattr(state, name) for name in ("epoch", "step", "steps", "scores")}
    progress |= {"format": FORMAT, "ties": state.history.ties}
    progress |= {"history": [asdict(row) for row in state.history.rows], "optimizer": optimizer}
    return safetensors.torch.save(tensors, {"progress": json.dumps(progress)})


def read_state(output: str) -> State:
    """Return the state of a run from last.safetensors, or the initial state if the file does not exist.

    Raises:
        ConfigError: a newer version has written it.
        ResultError: it is damaged.
    """
    from safetensors import SafetensorError

    uri = storage.join(output, LAST_NAME)
    if not storage.exists(uri):
        return State()
    data = storage.read_bytes(uri)
    try:
        return _unpack_state(data, uri)
    except (
        SafetensorError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        text = " ".join(str(error).split())[:200]
        raise DamageError(f"{uri} is damaged: {type(error).__name__}: {text!r}; {ADVICE}") from error


def _unpack_state(data: bytes, uri: str) -> State:
    """Return the state in the bytes of last.safetensors. Damaged bytes raise errors of several types."""
    import safetensors.torch

    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")], f"the header of {uri}", DamageError)
    progress = parse_json(header["__metadata__"]["progress"], f"the progress in {uri}", DamageError)
    if message := newer_format(progress.get("format"), uri):
        raise ConfigError(message)
    numbers = {name: progress[name] for name in ("epoch", "step", "steps")}
    if not all(type(number) is int and 0 <= number < 1 << 31 for number in numbers.values()):
        raise ValueError(f"there is no such progress: {numbers}")
    state = State(**numbers)
    state.scores = [(int(example), float(loss), float(dice)) for example, loss, dice in progress["scores"]]
    state.history = History(parse_rows(progress["history"]), parse_ties(progress.get("ties")))
    state.weights, moments = {}, dict[str, dict[str, "Tensor"]]()
    for name, value in safetensors.torch.load(data).items():
        kind, _, rest = name.partition(" ")
        if kind == "weights":
            state.weights[rest] = value
        else:
            parameter, _, key = rest.rpartition(" ")
            moments.setdefault(parameter, {})[key] = value
    state.optimizer = progress["optimizer"] | {"state": moments}
    return state


def copy_best(model: "SegmentationModel", prompt: str, weights: "dict[str, Tensor] | None" = None) -> PrivateFolder:
    """Save the model as it is now as a checkpoint in a temporary folder, and return the folder.

    Args:
        model: model to copy.
        prompt: default prompt of the checkpoint.
        weights: the complete weights, if the model itself holds only shards of them.

    Raises:
        StorageError: the disk of temporary files is full.
    """
    from safetensors import SafetensorError

    folder = PrivateFolder("checkpoint")
    try:
        save_checkpoint(model, folder.path, prompt, weights=weights)
    except (OSError, SafetensorError) as error:
        folder.remove()
        raise StorageError(
            f"{folder.path} could not be written: {error}; make room there or set TMPDIR to a larger disk, and the "
            "same command goes on from here"
        ) from error
    return folder


def put_progress(
    output: str,
    packed: bytes,
    best: PrivateFolder | None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write the best model to OUTPUT/checkpoint (checkpoint.yaml last), then write last.safetensors.

    If the run dies between the two writes, it repeats the epoch and gets the same result.

    Args:
        output: OUTPUT of the run.
        packed: result of `pack_state`.
        best: result of `copy_best`, or None.
        check: is called before each of the two writes; it raises an error if the run has lost its lease.
    """
    if best is not None:
        with best as folder:
            check()
            files = [path for path in folder.rglob("*") if path.is_file()]
            for path in sorted(files, key=lambda path: path.name == SETTINGS_NAME):
                target = storage.join(output, CHECKPOINT_NAME, *path.relative_to(folder).parts)
                storage.write_bytes(target, path.read_bytes())
    check()
    storage.write_bytes(storage.join(output, LAST_NAME), packed)


def write_metrics(output: str, history: History) -> None:
    """Write metrics.parquet, curves.png and the TensorBoard events."""
    from vlsm.training.curves import draw_curves
    from vlsm.training.trackers import write_events

    sink = pa.BufferOutputStream()
    pq.write_table(history.table(), sink, compression="zstd")
    storage.write_bytes(storage.join(output, METRICS_NAME), sink.getvalue().to_pybytes())
    storage.write_bytes(storage.join(output, CURVES_NAME), draw_curves(history))
    write_events(output, history)
