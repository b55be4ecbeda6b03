"""Checkpoint directories: all that a model needs to be used, and nothing that could run code.

    checkpoint.yaml     model name, options, image size, mean and std, threshold, prompt, versions
    model.safetensors   every weight
    clipseg/...         what the model's own library needs besides, such as its configuration and tokenizer

`python -m vlsm.checkpoints DIR --model clipseg` makes one from pretrained weights.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field, ValidationError

from vlsm import storage
from vlsm.config import Settings, dump_yaml, explain, parse_assignments
from vlsm.errors import CheckpointError, ConfigError, VlsmError
from vlsm.images.preprocess import ImageSpec, Resize
from vlsm.models import MODELS, build_model, check_name, find_model, parse_options
from vlsm.version import FORMAT, __version__, newer_format

if TYPE_CHECKING:
    from torch import Tensor

    from vlsm.models.contract import SegmentationModel

SETTINGS_NAME = "checkpoint.yaml"
_WEIGHTS_NAME = "model.safetensors"
_PACKAGES = ("torch", "transformers", "open_clip_torch", "timm", "segmentation_models_pytorch")
_TOWER_FOLDERS = ("clipseg", "openclip")
_SUFFIXES = (".yaml", ".safetensors", ".json", ".txt", ".model", ".jinja")


class _ImageSettings(Settings):
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Resize = "squeeze"  # absent in checkpoints of version 0

    @property
    def spec(self) -> ImageSpec:
        """The input of the model."""
        return ImageSpec(**self.model_dump())


class Calibration(Settings):
    """What was found on validation images (`vlsm.calibration`).

    Attributes:
        temperature: by which logits are divided.
        threshold: a probability, after that.
        num_images: that were used.
        error_before, error_after: expected calibration error, without and with the temperature.
        dice_at_half, dice: mean over the images, at a threshold of 0.5 and at the one found.
        min_confidence: below it masks are mostly bad; None where there were no bad ones.
        area_fraction: between which nearly all masks lie.
        reliability: mean probability, share of foreground and share of all pixels, bin by bin.
    """

    temperature: float = Field(gt=0)
    threshold: float = Field(gt=0, lt=1)
    num_images: int
    error_before: float
    error_after: float
    dice_at_half: float
    dice: float
    min_confidence: float | None
    area_fraction: tuple[float, float]
    reliability: list[tuple[float, float, float]]


class CheckpointSettings(Settings):
    """The content of checkpoint.yaml."""

    format: int = 0
    model: str
    options: dict[str, Any]
    image: _ImageSettings
    threshold: float = Field(0.5, gt=0, lt=1)
    prompt: str = ""
    versions: dict[str, str] = {}
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A model ready for inference with what it was saved with.

    `name` is the model's name and the beginning of the checkpoint's digest: it tells two trainings of one model apart.
    """

    model: "SegmentationModel"
    settings: CheckpointSettings
    name: str


def save_checkpoint(
    model: "SegmentationModel",
    directory: str | Path,
    prompt: str = "",
    threshold: float | None = None,
    weights: "dict[str, Tensor] | None" = None,
) -> None:
    """Write a checkpoint directory on the local disk; checkpoint.yaml last, so that its presence means complete.

    Args:
        model: one of `vlsm.models.MODELS`; LoRA adapters are merged into the weights that are written.
        directory: made where it does not exist; a checkpoint there is replaced.
        prompt: what to segment where a run names no prompt.
        threshold: a probability; at or above it a pixel is foreground; the published model's own unless told.
        weights: all of the model's, where it holds only shards of them itself.

    Raises:
        CheckpointError: the threshold is no probability, the directory is a file or not on the local disk, or the model
            was prepared for inference only.
    """
    import safetensors.torch

    from vlsm.models.towers import merged_copy

    if model.is_folded:
        raise CheckpointError("a Segmenter has folded the model's batch norms; save it before, or load it anew")
    if "://" in str(directory):
        raise CheckpointError(f"{directory} is not on the local disk; write it there, then copy the directory")
    folder = Path(directory)
    threshold = model.threshold if threshold is None else threshold
    if not 0 < threshold < 1:
        raise CheckpointError(f"threshold is {threshold}; it must be a probability between 0 and 1")
    kind = f"{type(model).__module__}:{type(model).__qualname__}"
    name = next(name for name, home in MODELS.items() if home == kind)
    settings = CheckpointSettings(
        format=FORMAT,
        model=name,
        options=model.options.model_dump(mode="json"),
        image=_ImageSettings(**asdict(model.image_spec)),
        threshold=threshold,
        prompt=prompt,
        versions={"vlsm": __version__} | {package: version(package) for package in _PACKAGES},
    )
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a checkpoint is a directory")
    model = merged_copy(model)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS_NAME).unlink(missing_ok=True)
    for stale in _TOWER_FOLDERS:  # of a checkpoint that is replaced
        shutil.rmtree(folder / stale, ignore_errors=True)
    model.save_files(folder)
    weights = model.state_dict() if weights is None else weights
    state = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    safetensors.torch.save_file(state, folder / _WEIGHTS_NAME)
    # written last; the weights get its mode, since safetensors writes for the owner alone
    (folder / SETTINGS_NAME).write_text(dump_yaml(settings.model_dump(mode="json")), encoding="utf-8")
    shutil.copymode(folder / SETTINGS_NAME, folder / _WEIGHTS_NAME)


def read_checkpoint(uri: str) -> dict[str, bytes]:
    """The files of a checkpoint directory, by their names within it.

    Raises:
        CheckpointError: there is no checkpoint at the location, or a file in it is of a kind that none needs.
    """
    uri = storage.absolute(uri)
    return {name: storage.read_bytes(storage.join(uri, name)) for name in _list_files(uri)}


def read_settings(uri: str) -> CheckpointSettings:
    """What checkpoint.yaml says, checked without reading the weights.

    Raises:
        CheckpointError: as `read_checkpoint` and `parse_settings` raise it.
    """
    uri = storage.absolute(uri)
    files = dict.fromkeys(_list_files(uri), b"")
    return parse_settings(files | {SETTINGS_NAME: storage.read_bytes(storage.join(uri, SETTINGS_NAME))}, uri)


def _list_files(uri: str) -> list[str]:
    """The names of a checkpoint's files, sorted."""
    fs, path = storage.open_uri(uri)
    if not fs.exists(f"{path}/{SETTINGS_NAME}"):
        raise CheckpointError(f"there is no checkpoint at {uri!r}; it must be a directory with {SETTINGS_NAME}")
    names = sorted(found.removeprefix(path).lstrip("/") for found in fs.find(path))
    for name in names:
        if not name.endswith(_SUFFIXES):
            raise CheckpointError(
                f"checkpoint {uri!r} holds {name!r}; only {', '.join(_SUFFIXES)} are allowed (a pickle could run code)"
            )
    return names


def digest_files(files: dict[str, bytes]) -> str:
    """SHA-256 over names and contents: equal digests, equal checkpoints, wherever they lie."""
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def parse_settings(files: dict[str, bytes], uri: str) -> CheckpointSettings:
    """What checkpoint.yaml says, checked without building the model.

    Raises:
        CheckpointError: it is malformed, or the model or its options are unknown.
    """
    try:
        tree = yaml.safe_load(files[SETTINGS_NAME])
        if message := newer_format(tree.get("format") if isinstance(tree, dict) else None, f"checkpoint {uri!r}"):
            raise CheckpointError(message)
        settings = CheckpointSettings.model_validate(tree)
    except (yaml.YAMLError, ValidationError) as error:
        why = explain(error, CheckpointSettings) if isinstance(error, ValidationError) else " ".join(str(error).split())
        raise CheckpointError(f"{SETTINGS_NAME} of checkpoint {uri!r}: {why}") from error
    check_name(settings.model)
    if _WEIGHTS_NAME not in files:
        raise CheckpointError(f"checkpoint {uri!r} has no {_WEIGHTS_NAME}")
    return settings


def build_checkpoint(files: dict[str, bytes], uri: str) -> Checkpoint:
    """The model of a checkpoint's files, on the CPU, in eval mode.

    Raises:
        CheckpointError: the settings are wrong, or the weights do not fit the model.
    """
    import safetensors.torch  # the driver of a run reads checkpoints without loading torch

    settings = parse_settings(files, uri)
    for name, data in files.items():
        if name.endswith(".json") and b'"auto_map"' in data:
            raise CheckpointError(
                f"{name} of checkpoint {uri!r} has an auto_map, which asks to run code from elsewhere"
            )
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            if name != _WEIGHTS_NAME:
                target = Path(folder, *[part for part in PurePosixPath(name).parts if part not in ("..", "/")])
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
        options = parse_options(settings.model, settings.options)
        from vlsm.models.towers import LOAD_ERRORS

        try:
            model = find_model(settings.model).restore(options, Path(folder))
        except LOAD_ERRORS as error:
            raise CheckpointError(
                f"the files of checkpoint {uri!r} do not describe {settings.model}: "
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            ) from error
    try:
        weights = safetensors.torch.load(bytes(files[_WEIGHTS_NAME]))
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{_WEIGHTS_NAME} of checkpoint {uri!r} is damaged: {error}") from error
    _check_weights(model, weights, uri)
    model.load_state_dict(weights)
    if settings.image.size != model.image_spec.size:
        raise CheckpointError(
            f"{SETTINGS_NAME} of checkpoint {uri!r}: image.size is {settings.image.size}; "
            f"its {settings.model} takes {model.image_spec.size} pixels"
        )
    # the statistics travel with the weights: a checkpoint may be normalised otherwise than its model's default
    model.image_spec = settings.image.spec
    return Checkpoint(model.eval(), settings, f"{settings.model}@{digest_files(files)[:12]}")


def load_checkpoint(uri: str | Path) -> Checkpoint:
    """A checkpoint directory, local or on an object store, as a model ready for inference.

    Raises:
        CheckpointError: there is no usable checkpoint at the location.
    """
    return build_checkpoint(read_checkpoint(str(uri)), str(uri))


def _check_weights(model: "SegmentationModel", weights: dict[str, Any], uri: str) -> None:
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    wrong = [key for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]
    if wrong:
        shown = "; ".join(
            f"{key}: {found.get(key, 'none')} instead of {expected.get(key, 'none')}" for key in wrong[:3]
        )
        raise CheckpointError(f"the weights of checkpoint {uri!r} do not fit its model in {len(wrong)} places: {shown}")


def main(argv: list[str] | None = None) -> int:
    """Make a checkpoint directory: pretrained towers as far as there are any, the rest untrained."""
    parser = argparse.ArgumentParser(prog="python -m vlsm.checkpoints", description=main.__doc__)
    parser.add_argument("directory", metavar="DIR", help="the checkpoint directory to write")
    parser.add_argument("--model", required=True, metavar="NAME", help="`python -m vlsm.models` lists them")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        help="an option of the model; `python -m vlsm.models NAME` lists them",
    )
    parser.add_argument("--prompt", default="", help="what to segment where a run names no prompt")
    parser.add_argument("--threshold", type=float, help="a probability (default: the published model's, mostly 0.5)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    args = parser.parse_args(argv)
    try:
        if Path(args.directory, SETTINGS_NAME).exists() and not args.overwrite:
            raise CheckpointError(f"there is a checkpoint at {args.directory} already; --overwrite replaces it")
        if args.threshold is not None and not 0 < args.threshold < 1:
            raise CheckpointError(f"--threshold is {args.threshold}; it must be a probability between 0 and 1")
        save_checkpoint(
            build_model(args.model, **parse_assignments(args.set)), args.directory, args.prompt, args.threshold
        )
    except (VlsmError, ValidationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | CheckpointError | ValidationError) else 1
    print(args.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
