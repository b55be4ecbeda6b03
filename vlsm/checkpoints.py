"""Checkpoint directories: all files that a model needs, and no file that could run code.

    checkpoint.yaml     model name, options, image size, mean and std, threshold, prompt, versions
    model.safetensors   all weights
    probe.safetensors   an image, and what the model makes of it; see vlsm.models.probe
    clipseg/...         other files of the model's library, such as its configuration and tokenizer

`python -m vlsm.checkpoints DIR --model clipseg` writes one from pretrained weights.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from vlsm import models, storage
from vlsm.commands import new_parser
from vlsm.config import A_PROBABILITY, Settings, dump_yaml, explain, parse_assignments
from vlsm.documents import parse_yaml
from vlsm.errors import CheckpointError, ConfigError, VlsmError
from vlsm.hints import hint_at_checkpoint
from vlsm.limits import MAX_JSON_BYTES
from vlsm.models import BLIND, MODELS, check_name, find_model, ignores_text, parse_options
from vlsm.models.options import STACK, ImageSettings, StackOptions, StackPart
from vlsm.models.probe import PROBE_NAME, Probe, parse_probe
from vlsm.models.tower_files import MEMBER_FOLDERS, TOWER_FOLDERS, check_tower_files, write_tower_files
from vlsm.shown import say, say_error, show
from vlsm.version import FORMAT, __version__, newer_format

if TYPE_CHECKING:
    from torch import Tensor

    from vlsm.models.contract import SegmentationModel
    from vlsm.models.options import Trainable

SETTINGS_NAME = "checkpoint.yaml"
_WEIGHTS_NAME = "model.safetensors"
_PACKAGES = ("torch", "transformers", "open_clip_torch", "timm", "segmentation_models_pytorch")
_MAX_FILES = 100  # of a folder that is none, such as a whole bucket
_SUFFIXES = (".yaml", ".safetensors", ".json", ".txt", ".model", ".jinja")


class Calibration(Settings):
    """The result of a calibration on validation images (`vlsm.calibration`).

    Attributes:
        temperature: logits are divided by it.
        threshold: a probability, compared after that division.
        num_images: number of validation images.
        error_before, error_after: expected calibration error without and with the temperature.
        dice_at_half, dice: mean Dice over the images, at a threshold of 0.5 and at `threshold`.
        min_confidence: masks with a lower confidence are mostly bad; None if all masks were bad, or none.
        area_fraction: (low, high); the area fractions of nearly all target masks lie between them.
        reliability: for each bin the mean probability, the share of foreground and the share of all pixels; the record
            of a run leaves it out.
        presence_threshold: an image whose presence, or else highest probability, reaches it counts as showing the
            finding; None if no specificity was asked for.
        specificity, sensitivity: shares of the validation images without and with the finding that this threshold
            judges right.
        num_negatives: number of validation images without the finding.
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
    reliability: list[tuple[float, float, float]] = []
    presence_threshold: float | None = Field(None, gt=0, lt=1)
    specificity: float | None = None
    sensitivity: float | None = None
    num_negatives: int = 0


class CheckpointSettings(Settings):
    """The content of checkpoint.yaml."""

    format: int = 0
    model: str
    options: dict[str, Any]
    image: ImageSettings
    threshold: float = Field(0.5, gt=0, lt=1)
    prompt: str = ""
    versions: dict[str, str] = {}
    calibration: Calibration | None = None

    @property
    def is_blind(self) -> bool:
        """Whether the model ignores the text of prompts."""
        return ignores_text(self.model, self.options)

    @property
    def summary(self) -> str:
        """Input size, threshold, prompt and calibration, in words."""
        side, prompt = self.image.size, show(textwrap.shorten(self.prompt, 40, placeholder="..."))
        calibrated = "calibrated" if self.calibration else "not calibrated"
        return f"{side} x {side} pixels, threshold {self.threshold:g}, prompt {prompt!r}, {calibrated}"


@dataclass(frozen=True)
class Checkpoint:
    """A model that is ready for inference, with its settings.

    Attributes:
        model: the model, in eval mode.
        settings: the content of checkpoint.yaml.
        name: the model's name and the start of the checkpoint's digest, so two trainings of one model have two names.
        probe: checks the machine that runs the model; None in checkpoints of earlier versions.
    """

    model: "SegmentationModel"
    settings: CheckpointSettings
    name: str
    probe: Probe | None = None

    def __repr__(self) -> str:
        return f"<Checkpoint {self.name}: {self.settings.summary}>"


def save_checkpoint(
    model: "SegmentationModel",
    directory: str | Path,
    prompt: str = "",
    threshold: float | None = None,
    weights: "dict[str, Tensor] | None" = None,
) -> None:
    """Write a checkpoint directory on the local disk. checkpoint.yaml comes last: its presence means complete.

    Args:
        model: one of `vlsm.models.MODELS`. The written weights contain its merged LoRA adapters.
        directory: created if missing; a checkpoint in it is replaced.
        prompt: default prompt for runs without prompts.
        threshold: a probability in (0, 1); at or above it a pixel is foreground. Default: the model's threshold.
        weights: all weights, if the model holds only shards of them. Then the probe comes from the written files.

    Raises:
        CheckpointError: the threshold is not in (0, 1), the directory is a file or not on the local disk, a Segmenter
            has changed the model, or its logits are no numbers.
    """
    import safetensors.torch

    from vlsm.models.probe_making import make_probe
    from vlsm.models.towers import merged_copy

    if model.is_folded:
        raise CheckpointError("a Segmenter has folded the model's batch norms; load the checkpoint again to save it")
    if "://" in str(directory):
        raise CheckpointError(
            f"{directory} is not on the local disk; write the checkpoint to the local disk, then copy it"
        )
    folder = Path(directory)
    threshold = model.threshold if threshold is None else threshold
    if not 0 < threshold < 1:
        raise CheckpointError(f"threshold is {threshold}; it must be {A_PROBABILITY}")
    settings = _settings_of(model, prompt, threshold)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a checkpoint is a directory")
    model = merged_copy(model)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS_NAME).unlink(missing_ok=True)
    for stale in (*TOWER_FOLDERS, *MEMBER_FOLDERS):  # of the replaced checkpoint
        shutil.rmtree(folder / stale, ignore_errors=True)
    model.save_files(folder)
    is_sharded = weights is not None
    weights = model.state_dict() if weights is None else weights
    state = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    safetensors.torch.save_file(state, folder / _WEIGHTS_NAME)
    content = dump_yaml(settings.model_dump(mode="json")).encode()
    (folder / PROBE_NAME).unlink(missing_ok=True)
    if is_sharded:  # one process alone cannot run it
        paths = [path for path in folder.rglob("*") if path.suffix in _SUFFIXES]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        model = build_checkpoint(files | {SETTINGS_NAME: content}, str(folder)).model
    (folder / PROBE_NAME).write_bytes(make_probe(model, prompt))
    # written last; the weights get the mode of this file, because safetensors lets only the owner read them
    (folder / SETTINGS_NAME).write_bytes(content)
    shutil.copymode(folder / SETTINGS_NAME, folder / _WEIGHTS_NAME)


def _settings_of(model: "SegmentationModel", prompt: str, threshold: float) -> CheckpointSettings:
    names = {class_path: name for name, class_path in MODELS.items()}
    paths = (f"{kind.__module__}:{kind.__qualname__}" for kind in type(model).__mro__)  # FSDP derives a class
    return CheckpointSettings(
        format=FORMAT,
        model=next(names[path] for path in paths if path in names),
        options=model.options.model_dump(mode="json"),
        image=ImageSettings(**asdict(model.image_spec)),
        threshold=threshold,
        prompt=prompt,
        versions={"vlsm": __version__} | {package: version(package) for package in _PACKAGES},
    )


def checkpoint_of(model: "SegmentationModel", name: str) -> Checkpoint:
    """Return a checkpoint of a model in memory, as if it had been saved without a prompt and loaded again.

    Args:
        model: it is set to eval mode.
        name: for its `repr` and messages.
    """
    return Checkpoint(model.eval(), _settings_of(model, "", model.threshold), name)


def read_checkpoint(uri: str) -> dict[str, bytes]:
    """Return the content of each file of a checkpoint directory, by its path within the directory.

    Raises:
        CheckpointError: there is no checkpoint at the location, or it has a file of a kind that is not allowed.
    """
    uri = storage.absolute(uri)
    return {name: storage.read_bytes(storage.join(uri, name)) for name in _list_files(uri)}


def read_settings(uri: str) -> CheckpointSettings:
    """Return the checked content of checkpoint.yaml, without reading the weights.

    Raises:
        CheckpointError: as for `read_checkpoint` and `parse_settings`.
    """
    uri = storage.absolute(uri)
    files = dict.fromkeys(_list_files(uri), b"")
    return parse_settings(files | {SETTINGS_NAME: storage.read_bytes(storage.join(uri, SETTINGS_NAME))}, uri)


def _list_files(uri: str) -> list[str]:
    """Return the sorted paths of a checkpoint's files within its directory."""
    fs, path = storage.open_uri(uri)
    if not fs.exists(f"{path}/{SETTINGS_NAME}"):
        hint = hint_at_checkpoint(fs, uri, path, SETTINGS_NAME, {name: name not in (*BLIND, STACK) for name in MODELS})
        raise CheckpointError(f"there is no checkpoint at {uri!r}; it must be a directory with {SETTINGS_NAME}{hint}")
    infos = {name.removeprefix(path).lstrip("/"): info for name, info in fs.find(path, detail=True).items()}
    names = [name for name in sorted(infos) if not storage.is_temporary(name.rpartition("/")[2])]  # of a killed process
    if len(names) > _MAX_FILES:
        raise CheckpointError(f"checkpoint {uri!r} has {len(names):,} files; a checkpoint has {_MAX_FILES} at most")
    for name in names:
        if (size := infos[name].get("size") or 0) > MAX_JSON_BYTES and name != _WEIGHTS_NAME:
            raise CheckpointError(f"{name} of checkpoint {uri!r} has {size:,} bytes; only {_WEIGHTS_NAME} may")
        if not name.endswith(_SUFFIXES):
            raise CheckpointError(
                f"checkpoint {uri!r} has {name!r}; only {', '.join(_SUFFIXES)} are allowed (a pickle could run code)"
            )
    return names


def digest_files(files: dict[str, bytes]) -> str:
    """Return the SHA-256 of names and contents. Copies of a checkpoint have the same digest."""
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def parse_settings(files: dict[str, bytes], uri: str) -> CheckpointSettings:
    """Return the checked content of checkpoint.yaml, without building the model.

    Raises:
        CheckpointError: the file is malformed or of a newer format, the model is unknown, or the weights are missing.
    """
    try:
        tree = parse_yaml(files[SETTINGS_NAME], f"{SETTINGS_NAME} of checkpoint {uri!r}", CheckpointError)
        if message := newer_format(tree.get("format") if isinstance(tree, dict) else None, f"checkpoint {uri!r}"):
            raise CheckpointError(message)
        settings = CheckpointSettings.model_validate(tree)
    except ValidationError as error:
        reason = explain(error, CheckpointSettings)
        raise CheckpointError(f"{SETTINGS_NAME} of checkpoint {uri!r}: {reason}") from error
    check_name(settings.model)
    if _WEIGHTS_NAME not in files:
        raise CheckpointError(f"checkpoint {uri!r} has no {_WEIGHTS_NAME}; copy the whole directory")
    return settings


def check_files(files: dict[str, bytes], uri: str) -> None:
    """Check all files of a checkpoint but its weights, without torch and transformers, before a job starts Ray.

    Raises:
        CheckpointError: the settings or other files are invalid, or ask to run code.
    """
    settings = parse_settings(files, uri)
    parse_options(settings.model, settings.options)
    _parse_probe(files, settings, uri)
    check_tower_files({name: data for name, data in files.items() if name != _WEIGHTS_NAME}, uri)


def _parse_probe(files: dict[str, bytes], settings: CheckpointSettings, uri: str) -> Probe | None:
    if PROBE_NAME not in files:
        return None
    return parse_probe(bytes(files[PROBE_NAME]), f"{PROBE_NAME} of checkpoint {uri!r}", settings.image.size)


def build_checkpoint(files: dict[str, bytes], uri: str) -> Checkpoint:
    """Return the checkpoint of these files, its model on the CPU in eval mode.

    Raises:
        CheckpointError: the settings or other files are invalid, or the weights do not fit the model.
    """
    import safetensors.torch  # here: the driver of a run reads checkpoints without loading torch

    settings = parse_settings(files, uri)
    options = parse_options(settings.model, settings.options)
    probe = _parse_probe(files, settings, uri)
    from vlsm.models.restoring import read_shapes, restore_model

    shapes = read_shapes(files[_WEIGHTS_NAME], f"{_WEIGHTS_NAME} of checkpoint {uri!r}")
    with tempfile.TemporaryDirectory() as folder:
        write_tower_files({name: data for name, data in files.items() if name != _WEIGHTS_NAME}, Path(folder), uri)
        model = restore_model(find_model(settings.model), options, Path(folder), shapes, uri)
    try:
        weights = safetensors.torch.load(bytes(files[_WEIGHTS_NAME]))
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{_WEIGHTS_NAME} of checkpoint {uri!r} is damaged: {error}") from error
    model.load_state_dict(weights)
    if settings.image.size != model.image_spec.size:
        raise CheckpointError(
            f"{SETTINGS_NAME} of checkpoint {uri!r}: image.size is {settings.image.size}; "
            f"its {settings.model} takes {model.image_spec.size} pixels"
        )
    # the checkpoint's mean and std may differ from the default of its model
    model.image_spec = settings.image.spec
    return Checkpoint(model.eval(), settings, f"{settings.model}@{digest_files(files)[:12]}", probe)


def load_checkpoint(uri: str | Path) -> Checkpoint:
    """Return a checkpoint, ready for inference, from a local directory or an object store.

    Raises:
        CheckpointError: there is no usable checkpoint at the location.
    """
    return build_checkpoint(read_checkpoint(str(uri)), str(uri))


def build_model(name: str, /, trainable: "Trainable" = "decoder", **options: Any) -> "SegmentationModel":
    """Build a model of the table, in training mode. The members of a stack are read from their checkpoints.

    Args:
        name: a key of MODELS.
        trainable: the parts that learn besides the decoder; see `SegmentationModel.set_trainable`.
        options: fields of the model's option class in `vlsm.models.options`.

    Raises:
        CheckpointError: the name or an option is unknown, pretrained weights cannot be loaded, or a member of a stack
            cannot be used.
    """
    if name != STACK:
        return models.build_model(name, trainable, **options)
    from vlsm.models.stack import Stack

    checked: StackOptions = parse_options(name, options)
    members = [load_checkpoint(uri) for uri in checked.members]
    check_members(checked, [member.settings for member in members])
    if twice := [uri for uri, one in zip(checked.members, members, strict=True) if _count(members, one.name) > 1]:
        raise CheckpointError(f"two members of the stack are the same checkpoint: {twice[0]} and {twice[1]}")
    parts = tuple(
        StackPart(model=one.settings.model, options=one.model.options.model_dump(mode="json"), image=one.settings.image)
        for one in members
    )
    described = {"members": tuple(one.name for one in members), "parts": parts}
    calibrations = [one.settings.calibration for one in members]
    temperatures = [one.temperature if one else 1.0 for one in calibrations]
    stack = Stack(checked.model_copy(update=described), [one.model for one in members], temperatures)
    return stack.set_trainable(trainable).train()


def _count(members: "list[Checkpoint]", name: str) -> int:
    return sum(member.name == name for member in members)


def check_members(options: StackOptions, members: Sequence[CheckpointSettings]) -> None:
    """Check that checkpoints can be the members of a stack.

    Args:
        options: the options of the stack.
        members: the content of the checkpoint.yaml of each member that is there already.

    Raises:
        CheckpointError: a member is a stack, or some members squeeze images and others letterbox them.
    """
    if options.parts:
        raise CheckpointError(f"options of {STACK}: parts is for its checkpoint; give members alone")
    if any(member.model == STACK for member in members):
        raise CheckpointError("a member of the stack is a stack itself; name the members of that one instead")
    if len({member.image.resize for member in members}) > 1:
        shown = ", ".join(f"{member.model}: {member.image.resize}" for member in members)
        raise CheckpointError(f"the members of a stack must resize images in the same way; these differ ({shown})")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(
        "vlsm.checkpoints",
        str(main.__doc__),
        (
            "checkpoint --model clipseg --prompt polyp",
            "checkpoint --model unet_d --set image_size=352",
            "checkpoint --model stack --set 'members=[first/checkpoint, second/checkpoint]'",
        ),
    )
    parser.add_argument("directory", metavar="DIR", help="the checkpoint directory to write")
    parser.add_argument("--model", required=True, metavar="NAME", help="`vlsm models` lists them")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        help="an option of the model; `vlsm models NAME` lists them",
    )
    parser.add_argument("--prompt", default="", help="default prompt for runs without prompts")
    parser.add_argument("--threshold", type=float, help="a probability (default: the model's threshold, mostly 0.5)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Write a checkpoint directory with pretrained towers, if the model has any; all other weights are untrained."""
    args = make_parser().parse_args(argv)
    try:
        if Path(args.directory, SETTINGS_NAME).exists() and not args.overwrite:
            raise CheckpointError(f"there is a checkpoint at {args.directory} already; --overwrite replaces it")
        if args.threshold is not None and not 0 < args.threshold < 1:
            raise CheckpointError(f"--threshold is {args.threshold}; it must be {A_PROBABILITY}")
        save_checkpoint(
            build_model(args.model, **parse_assignments(args.set)), args.directory, args.prompt, args.threshold
        )
    except (VlsmError, ValidationError, OSError) as error:
        say_error(error if isinstance(error, VlsmError) else " ".join(str(error).split()))
        return 2 if isinstance(error, ConfigError | CheckpointError | ValidationError) else 1
    say(args.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
