"""Settings: frozen models with their defaults, and a strict reader for YAML files and `key=value` words."""

import difflib
import os
import re
import shlex
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from vlsm.documents import MAX_YAML_BYTES, parse_yaml, read_yaml
from vlsm.errors import ConfigError
from vlsm.quotes import is_closed

SettingsT = TypeVar("SettingsT", bound="Settings")

_MAX_PROBLEMS, _MAX_LETTERS = 10, 300  # of a message; a file of others may have more

A_PROBABILITY = "a probability between 0 and 1, such as 0.5"  # words for a threshold

Slices = Literal["axial", "coronal", "sagittal"]


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def check_range(value: int | str | None) -> int | str | None:
    """Return the value if it is None, N or MIN..MAX with 1 <= MIN <= MAX; a field validator.

    Raises:
        ValueError: it is something else.
    """
    low, high = parse_range(value, 1)
    if not 1 <= low <= high:
        raise ValueError("it must be 1 or more, or MIN..MAX such as 2..8")
    return value


def one_is_a_list(value: Any) -> Any:
    """Return a list of one item for a single text or a single group of settings; a field validator for list fields."""
    return [value] if isinstance(value, (str, dict)) else value


def each_one_is_a_list(value: Any) -> Any:
    """Apply `one_is_a_list` to every value of a mapping; a field validator."""
    return {name: one_is_a_list(item) for name, item in value.items()} if isinstance(value, dict) else value


def check_threshold(value: Any) -> Any:
    """Return the value if it is a probability that separates foreground from background, or None; a field validator.

    Raises:
        ValueError: it is something else, such as 50 or a word.
    """
    try:
        is_fine = value is None or 0 < float(value) < 1
    except (TypeError, ValueError):
        is_fine = False
    if not is_fine:
        raise ValueError(f"it must be {A_PROBABILITY}")
    return value


def check_columns(value: dict[str, str]) -> dict[str, str]:
    """Return the value if its keys are columns that a manifest can have; a field validator.

    Raises:
        ValueError: a key is something else.
    """
    known = ("image_uri", "image_id", "selector", "prompt", "prompts", "size_bytes", "etag", "mtime", "image")
    if unknown := [name for name in value if name not in known]:
        raise ValueError(f"{unknown[0]!r} must be one of {', '.join(known)}; the manifest's name is the value")
    return value


class PlaceSettings(Settings):
    """Places that lists may name; `vlsm.archive.places` has the rule."""

    allow: tuple[str, ...] = Field(
        (),
        description="prefixes, beside its own bucket, that a list in an object store may name; HTTP redirects may lead "
        "there too",
    )

    _list_allow = field_validator("allow", mode="before")(one_is_a_list)

    @field_validator("allow")
    @classmethod
    def _check_allow(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(place.strip() for place in value):
            raise ValueError("a place is empty; give prefixes, as in [s3://bucket/images/]")
        return value


class RunSettings(PlaceSettings):
    """How a run is executed. A resumed run may have other values: masks differ only in pixels on the threshold."""

    placement: Literal["together", "apart"] = Field(
        "together", description="all ensemble members in each actor, or one pool of actors per member"
    )
    actors: int | str | None = Field(
        None, description="largest number of model actors, or MIN..MAX; null: one per GPU, or per node without GPUs"
    )
    gpus_per_actor: float | None = Field(None, ge=0, description="GPUs per actor; null: 1 if there are GPUs, else 0")
    cpus_per_actor: float | None = Field(None, gt=0, description="CPUs per actor; null: 1 with a GPU, else most CPUs")
    batch_size: int | str = Field(
        "auto",
        description="images in one model call; auto: the fastest on a GPU, by a short probe; on CPUs, one for two "
        "threads, at most 8",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="compile the models, which takes a minute at the first start on a machine; auto: on GPUs"
    )
    probe: bool = Field(
        True,
        description="check at the start that each model computes on its device as where its checkpoint was written; "
        "false: segment all the same",
    )
    finish: Literal["auto", "device", "cpu"] = Field(
        "auto",
        description="where masks are made from logits: on the models' device, or in the writing tasks; auto: on GPUs. "
        "Masks differ only in pixels within 0.001 of the threshold",
    )
    fetch_threads: int = Field(16, ge=1, description="images that one CPU task reads in parallel")
    image_timeout_s: float = Field(120, gt=0, description="seconds to read an image (all tries), and to decode it")
    outage_patience_s: float = Field(300, ge=0, description="a store outage of more seconds ends the run")
    max_failed_fraction: float = Field(0.5, ge=0, le=1, description="a larger fraction of failed images ends the run")
    judge_after: int = Field(200, ge=1, description="finished images from which max_failed_fraction applies")

    _check_actors = field_validator("actors")(check_range)

    @field_validator("batch_size")
    @classmethod
    def _check_batch_size(cls, value: int | str) -> int | str:
        if value != "auto" and not (isinstance(value, int) and value >= 1):
            raise ValueError("it must be 1 or more, or auto")
        return value

    @field_validator("compile", mode="before")
    @classmethod
    def _name_switch(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value  # YAML: on is true


class MemberSettings(Settings):
    """One checkpoint of an ensemble. Its actor settings apply only with `run.placement=apart`."""

    checkpoint: str
    weight: float = Field(1, gt=0, description="weight of this member in the ensemble")
    flip: bool = Field(False, description="also segment the mirrored image and average both probabilities")
    prompts: dict[str, str] = Field({}, description="for each prompt, the text that this member gets instead")
    actors: int | str | None = Field(None, description="as run.actors, for this member")
    gpus_per_actor: float | None = Field(None, ge=0, description="as run.gpus_per_actor, for this member")
    cpus_per_actor: float | None = Field(None, gt=0, description="as run.cpus_per_actor, for this member")

    _check_actors = field_validator("actors")(check_range)


class TileSettings(Settings):
    """How images that are much larger than the model's input are cut into windows."""

    size: int | None = Field(
        None, ge=8, description="cut larger images into square windows with this side in pixels; null: do not cut"
    )
    overlap: float = Field(0.25, ge=0, le=0.9, description="overlap of neighbouring windows, a fraction of the side")
    max_windows: int = Field(
        4096, ge=1, description="refuse images with more windows; each takes half a megabyte of memory or more"
    )


class CleanSettings(Settings):
    """How masks are cleaned before they are written."""

    fill_holes: bool = Field(False, description="fill the holes of each mask")
    min_area_px: int = Field(0, ge=0, description="remove regions of a mask with a smaller area, in pixels")
    keep_largest: int | None = Field(None, ge=1, description="keep this number of largest regions; null: keep all")


class ReviewSettings(Settings):
    """Which masks are marked for review. A calibrated checkpoint gives the values that are not set here."""

    min_confidence: float | None = Field(
        None,
        ge=0,
        le=1,
        description="mark masks for review below this confidence, the mean probability inside the mask",
    )
    min_agreement: float | None = Field(
        0.7, ge=0, le=1, description="mark masks for review below this agreement, the mean Dice between members"
    )
    min_presence: float | None = Field(
        None,
        ge=0,
        le=1,
        description="mark masks with foreground for review below this presence, if the model computes it (sam3)",
    )
    area_fraction: tuple[float, float] | None = Field(
        None, description="mark masks for review outside [lowest, highest] fraction of the image's area"
    )


class SegmentSettings(Settings):
    """The settings of a segment run: everything that can change its rows, and under `run` how it is executed."""

    input: str
    output: str
    columns: dict[str, str] = Field(
        {},
        description="columns of a manifest with other names, as {image_uri: path}; image: bytes of images in Parquet",
    )
    carry: Literal["all"] | tuple[str, ...] | None = Field(
        None,
        description="further columns of a manifest that images take into their rows: all, or names as [site, view]; "
        "null: all in a new run, else as in the run; update=true changes them without segmenting again",
    )
    fields: tuple[str, ...] = Field(
        (), description="which members of a WebDataset sample are segmented, as [image.png]; empty: all images"
    )
    members: tuple[MemberSettings, ...] = Field(
        (),
        description="ensemble members in place of --checkpoint, each with checkpoint, weight, flip, prompts and actors",
    )
    combine: Literal["mean", "vote"] = Field(
        "mean", description="combine members by weighted mean of probabilities or by weighted majority of masks"
    )
    prompts: tuple[str, ...] | None = Field(
        None, min_length=1, description="prompts for every image; null: the checkpoint's stored prompt"
    )
    classes: dict[str, tuple[str, ...]] = Field(
        {}, description="prompts that stand for one or several texts, whose probabilities are averaged: {name: [texts]}"
    )
    allow_equal_masks: bool = Field(
        False,
        description="take several prompts, or others than the checkpoint's, for models that ignore the text: all "
        "prompts get the same mask",
    )
    member_rows: bool = Field(False, description="write one more row for the mask of each ensemble member")
    label_maps: bool = Field(False, description="write one more row per image: a PNG with the prompt of each pixel")
    probability_maps: Literal["none", "review", "all"] = Field(
        "none", description="which masks keep the probability of each pixel in their row, as an 8-bit PNG"
    )
    embedding: bool = Field(
        False, description="keep a vector per image, of the first member with an image tower, in the image's first row"
    )
    threshold: float | None = Field(
        None, description=f"lowest probability of a foreground pixel, {A_PROBABILITY}; null: the checkpoint's"
    )
    tile: TileSettings = TileSettings()
    clean: CleanSettings = CleanSettings()
    review: ReviewSettings = ReviewSettings()
    slices: Slices = Field(
        "axial", description="direction in which volumes are cut into slices; each slice is an image"
    )
    frames: str | None = Field(
        None,
        pattern=r"^(every [1-9]\d*|[1-9]\d*(\.\d+)? per second|0?\.\d*[1-9]\d* per second)$",
        description="frames that are images: 'every N', or 'N per second'; null: 1 per second of a video, else all",
    )
    window: tuple[float, float] | None = Field(
        None, description="grey values to show, above 8 bits: [centre, width], as [40, 400]; null: as the file states"
    )
    max_pixels: int = Field(100_000_000, ge=1, description="refuse images with more pixels, before decoding")
    max_image_bytes: int = Field(1 << 30, ge=1, description="refuse files with more bytes, before reading")
    decode: Literal["cpu", "gpu"] = Field(
        "cpu",
        description="where JPEGs are decoded and resized; gpu: with vlsm[gpu], beside the model; pixels, and so masks, "
        "differ slightly",
    )
    shard_rows: int = Field(256, ge=1, description="most masks (and windows) in a part file, the unit of work")
    start_over: bool = Field(False, description="discard the earlier run in OUTPUT")
    retry_failed: bool = Field(False, description="segment the failed images of the run in OUTPUT again")
    update: bool = Field(
        False, description="list INPUT again, segment new and changed images, mark removed ones as vanished"
    )
    run: RunSettings = RunSettings()

    _check_columns = field_validator("columns")(check_columns)
    _check_threshold = field_validator("threshold", mode="before")(check_threshold)
    _list_prompts = field_validator("prompts", "fields", mode="before")(one_is_a_list)
    _list_texts = field_validator("classes", mode="before")(each_one_is_a_list)

    @field_validator("carry", mode="before")
    @classmethod
    def _list_carry(cls, value: Any) -> Any:
        return value if value == "all" else one_is_a_list(value)

    @property
    def has_member_rows(self) -> bool:
        """Whether each member of an ensemble has its own rows."""
        return self.member_rows and len(self.members) > 1

    def texts_of(self, prompts: Sequence[str]) -> list[tuple[str, ...]]:
        """The texts that the models see for each prompt."""
        return [self.classes.get(prompt, (prompt,)) for prompt in prompts]

    @property
    def kinds(self) -> list[str]:
        """The kinds of rows: one row of each kind per prompt, except "labels", one row for all prompts together."""
        members = [f"member {number}" for number, _ in enumerate(self.members, start=1)]
        return ["mask", *(members if self.has_member_rows else []), *(["labels"] if self.label_maps else [])]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if empty := [name for name, texts in self.classes.items() if not texts]:
            raise ValueError(f"classes: {empty[0]} has no text; give one text at least")
        if self.window is not None and not self.window[1] > 0:
            raise ValueError(f"window is {list(self.window)}; its width must be above 0")
        if not self.members:
            raise ValueError("give --checkpoint DIR once at least")
        if self.prompts and len(set(self.prompts)) < len(self.prompts):
            raise ValueError("prompts: the same prompt stands there twice; give each prompt once")
        return self


def load_settings(
    settings: type[SettingsT], config: str | None, assignments: list[str], arguments: dict[str, Any]
) -> SettingsT:
    """Return validated settings: arguments override assignments, assignments override the YAML file.

    Args:
        settings: the class of the settings.
        config: a YAML file with the same tree of keys, or None.
        assignments: words such as "run.batch_size=4". The value is read as YAML.
        arguments: fields that the command line gives by position or flag.

    Raises:
        ConfigError: a key is unknown (the message has the nearest known one), a value is wrong, or the file cannot be
            read.
    """
    tree: dict[str, Any] = _read_yaml(config) if config else {}
    parse_assignments(assignments, tree)
    try:
        return settings.model_validate(tree | arguments)
    except ValidationError as error:
        raise ConfigError(explain(error, settings)) from error


def parse_assignments(assignments: list[str], tree: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a tree of settings with `key=value` words added. Keys may be dotted; values are read as YAML.

    Raises:
        ConfigError: a word is not of this form, its value is not YAML, or its key goes through a value.
    """
    tree = {} if tree is None else tree
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator:
            raise ConfigError(
                f"--set {assignment!r} is not of the form key=value without blanks; it must be as run.batch_size=4, or "
                "with quotes as 'prompts=[polyp, flat polyp]'"
            )
        *groups, leaf = key.split(".")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
            if not isinstance(branch, dict):
                raise ConfigError(f"--set {assignment!r}: {group} is already a value; it must be a group of settings")
        try:
            branch[leaf] = parse_yaml(value, f"--set {' '.join(assignment[:80].split())}", ConfigError)
        except ConfigError as error:
            if is_closed(value):
                raise
            example = shlex.quote(f"{assignment[:80].rstrip(', ')} ...")
            raise ConfigError(f"{error}; a value with blanks needs quotes, as in --set {example}") from error
    return tree


def parse_range(value: int | str | None, default: int) -> tuple[int, int]:
    """Return the (lowest, highest) number of a setting such as 2 or "2..8".

    Raises:
        ValueError: it is neither a number nor a range.
    """
    if value is None:
        return default, default
    low, dots, high = str(value).partition("..")
    if not low.isdecimal() or (dots and not high.isdecimal()):
        raise ValueError(f"{value!r} is neither a number nor MIN..MAX such as 2..8")
    return int(low), int(high or low)


def dump_yaml(tree: dict[str, Any]) -> str:
    """Return a tree of plain values as YAML. The keys keep their order."""
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a tree by their dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        tree = _read_pipe(path) if _is_pipe(path) else read_yaml(path, f"--config {Path(path).name}", ConfigError)
    except OSError as error:
        raise ConfigError(f"--config {path!r} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {path!r} must hold keys and values, such as `prompts: [polyp]`")
    return tree


def _is_pipe(path: str) -> bool:
    """Return whether a path is an open pipe of this process, as `--config <(command)` gives it.

    A named pipe on the disk is none: somebody else may have put it there, and no one may ever write to it.
    """
    return re.fullmatch(r"/dev/(fd/\d{1,9}|stdin)", path) is not None and stat.S_ISFIFO(os.stat(path).st_mode)


def _read_pipe(path: str) -> Any:
    with open(path, "rb") as pipe:
        return parse_yaml(pipe.read(MAX_YAML_BYTES + 1), f"--config {path}", ConfigError)


def explain(error: ValidationError, settings: type[Settings]) -> str:
    """Return all problems of a validation error as one line."""
    problems = []
    known = {key: info.description for key, info in _leaves(settings)}
    details = error.errors(include_url=False)
    for detail in details[:_MAX_PROBLEMS]:
        key = ".".join(str(part) for part in detail["loc"])[:_MAX_LETTERS]
        if detail["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            problems.append(f"unknown key {key!r}; {hint}")
        elif detail["type"] == "missing":
            problems.append(f"{key} is missing")
        elif key:
            text = detail["msg"].removeprefix("Value error, ")
            message = text[0].lower() + text[1:]
            is_range = detail["type"] in ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
            meaning = known.get(key, "") if is_range else ""
            problems.append(f"{key} is {detail['input']!r:.{_MAX_LETTERS}}: {message}{meaning and f' ({meaning})'}")
        else:
            problems.append(detail["msg"].removeprefix("Value error, "))
    more = len(details) - _MAX_PROBLEMS
    return "; ".join(problems) + (f"; and {more:,} more" if more > 0 else "")


def describe_settings(settings: type[Settings], keys: Sequence[str] | None = None) -> list[str]:
    """Return one line per setting with its default and description, for the help of a command.

    Args:
        settings: the class of the settings.
        keys: dotted keys of the settings to describe, in this order; None: all.
    """
    lines = []
    leaves = dict(_leaves(settings))
    for key in leaves if keys is None else keys:
        info = leaves[key]
        if info.description:
            default = (
                "..."
                if info.is_required()
                else yaml.safe_dump(_plain(info.default), default_flow_style=True, width=1000).partition("\n")[0]
            )
            choices = [str(choice) for choice in get_args(info.annotation) if isinstance(choice, str)]
            known = f" ({', '.join(choices)})" if get_origin(info.annotation) is Literal else ""
            lines.append(f"  {f'{key}={default}':28} {info.description}{known}")
    return lines


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _leaves(settings: type[Settings], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every setting with its dotted key."""
    for name, info in settings.model_fields.items():
        group = info.annotation
        if isinstance(group, type) and issubclass(group, Settings):
            yield from _leaves(group, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info
