"""Settings: frozen models with the defaults, read strictly from YAML and `key=value` words."""

import difflib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from vlsm import storage
from vlsm.errors import ConfigError

SettingsT = TypeVar("SettingsT", bound="Settings")


class Settings(BaseModel):
    """A frozen group of settings that refuses what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def check_range(value: int | str | None) -> int | str | None:
    """A setting of `parse_range`, for validators: nothing, 1 or more, or from 1 or more to as many or more."""
    low, high = parse_range(value, 1)
    if not 1 <= low <= high:
        raise ValueError("it must be 1 or more, or MIN..MAX such as 2..8")
    return value


def one_is_a_list(value: Any) -> Any:
    """A text or a group of settings where several may stand, for validators: a list of it."""
    return [value] if isinstance(value, (str, dict)) else value


def each_one_is_a_list(value: Any) -> Any:
    """The same of every value of a mapping."""
    return {name: one_is_a_list(own) for name, own in value.items()} if isinstance(value, dict) else value


class RunSettings(Settings):
    """How a run is carried out: nothing here can change a row, so it may differ when a run is resumed."""

    placement: Literal["together", "apart"] = Field(
        "together", description="all members in each actor, or a pool of actors for each"
    )
    actors: int | str | None = Field(
        None, description="model actors, N or MIN..MAX; up to one per GPU of the cluster, or per node, unless told"
    )
    gpus_per_actor: float | None = Field(None, ge=0, description="1 where the cluster has GPUs, else 0, unless told")
    cpus_per_actor: float | None = Field(None, gt=0, description="1 beside a GPU, else most of a node's, unless told")
    batch_size: int = Field(8, ge=1, description="images that go through the model at once")
    fetch_threads: int = Field(16, ge=1, description="images that one CPU task reads at the same time")
    allow: tuple[str, ...] = Field(
        (), description="what image_uris may begin with beside the bucket of a manifest in an object store"
    )
    image_timeout_s: float = Field(120, gt=0, description="to read one image, its tries together, or to decode it")
    outage_patience_s: float = Field(300, ge=0, description="a store that is away for longer ends the run")
    max_failed_fraction: float = Field(0.5, ge=0, le=1, description="a larger share of failed images ends the run")
    judge_after: int = Field(200, ge=1, description="images, before which no share of failed ones ends the run")

    _check_actors = field_validator("actors")(check_range)


class MemberSettings(Settings):
    """One checkpoint of an ensemble; how many actors it has and what they ask for matters where pools are apart."""

    checkpoint: str
    weight: float = Field(1, gt=0, description="among the members")
    flip: bool = Field(False, description="segment the mirrored image as well, and take the mean of both")
    prompts: dict[str, str] = Field({}, description="what this member is told in place of a prompt")
    actors: int | str | None = Field(None, description="as under run")
    gpus_per_actor: float | None = Field(None, ge=0, description="as under run")
    cpus_per_actor: float | None = Field(None, gt=0, description="as under run")

    _check_actors = field_validator("actors")(check_range)


class TileSettings(Settings):
    """How images that are much larger than a model's square are cut into windows."""

    size: int | None = Field(
        None, ge=8, description="side in pixels of the windows into which larger images are cut; null for none"
    )
    overlap: float = Field(0.25, ge=0, le=0.9, description="share of a side that neighbours have in common")
    max_windows: int = Field(4096, ge=1, description="images of more are refused: each takes half a megabyte or more")


class CleanSettings(Settings):
    """What is taken from masks before they are written."""

    fill_holes: bool = Field(False, description="masks have none")
    min_area_px: int = Field(0, ge=0, description="smaller regions of a mask are dropped")
    keep_largest: int | None = Field(None, ge=1, description="regions of a mask that are kept")


class ReviewSettings(Settings):
    """Which masks somebody should look at; a calibrated checkpoint tells what is not told here."""

    min_confidence: float | None = Field(None, ge=0, le=1, description="masks of less are to be reviewed")
    min_agreement: float | None = Field(0.7, ge=0, le=1, description="masks on which members agree less, too")
    area_fraction: tuple[float, float] | None = Field(
        None, description="masks that are smaller or larger than these shares of the image, too"
    )


class SegmentSettings(Settings):
    """Everything that decides a segment run's rows, and under `run` how it is carried out."""

    input: str
    output: str
    members: tuple[MemberSettings, ...] = Field(
        (),
        description="checkpoints with weight, flip, prompts and pools of their own, where --checkpoint says too little",
    )
    combine: Literal["mean", "vote"] = Field(
        "mean", description="of several members: the weighted mean of probabilities, or the weighted majority of masks"
    )
    prompts: tuple[str, ...] | None = Field(
        None, min_length=1, description="of every image; the checkpoint's own unless told"
    )
    classes: dict[str, tuple[str, ...]] = Field(
        {}, description="what stands for a prompt: one text or several, whose probabilities are averaged"
    )
    member_rows: bool = Field(False, description="a row for each member's own mask, beside the one that they agree on")
    label_maps: bool = Field(False, description="a row more per image: which prompt wins in each pixel, as a PNG")
    threshold: float | None = Field(None, gt=0, lt=1, description="a probability; the checkpoint's own unless told")
    tile: TileSettings = TileSettings()
    clean: CleanSettings = CleanSettings()
    review: ReviewSettings = ReviewSettings()
    slices: Literal["axial", "coronal", "sagittal"] = Field(
        "axial", description="of volumes, each of which is an image"
    )
    window: tuple[float, float] | None = Field(
        None, description="centre and width of what is shown of DICOM and NIfTI; the file's own unless told"
    )
    max_pixels: int = Field(100_000_000, ge=1, description="larger images are refused before they are decoded")
    max_image_bytes: int = Field(1 << 30, ge=1, description="larger files are refused before they are read")
    shard_rows: int = Field(
        256, ge=1, description="output rows of one part file at most: the unit of work and of resuming"
    )
    start_over: bool = Field(False, description="forget an earlier run in OUTPUT")
    retry_failed: bool = Field(False, description="do the failed images of the run in OUTPUT again")
    update: bool = Field(False, description="list INPUT again: do what is new or changed, mark what has vanished")
    run: RunSettings = RunSettings()

    _list_prompts = field_validator("prompts", mode="before")(one_is_a_list)
    _list_texts = field_validator("classes", mode="before")(each_one_is_a_list)

    @property
    def has_member_rows(self) -> bool:
        """Whether each member of an ensemble has rows of its own."""
        return self.member_rows and len(self.members) > 1

    @property
    def kinds(self) -> list[str]:
        """The kinds of rows: of each prompt, and at last of all of them together."""
        members = [f"member {number}" for number, _ in enumerate(self.members, start=1)]
        return ["mask", *(members if self.has_member_rows else []), *(["labels"] if self.label_maps else [])]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if empty := [name for name, texts in self.classes.items() if not texts]:
            raise ValueError(f"classes: {empty[0]} has no text")
        if self.window is not None and not self.window[1] > 0:
            raise ValueError(f"window is {list(self.window)}; its width must be above 0")
        if not self.members:
            raise ValueError("give --checkpoint DIR once at least")
        if self.prompts and len(set(self.prompts)) < len(self.prompts):
            raise ValueError("prompts: the same prompt stands there twice; each gives one row per image")
        return self


def load_settings(
    settings: type[SettingsT], config: str | None, assignments: list[str], arguments: dict[str, Any]
) -> SettingsT:
    """Settings from a YAML file, overridden by `key=value` words, overridden by the command's own arguments.

    Args:
        settings: the class to fill.
        config: a YAML file with the same tree, or None.
        assignments: words such as "run.batch_size=4"; the value is read as YAML.
        arguments: fields that the command line gives by position or flag.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a wrong value, or a file that cannot be read.
    """
    tree: dict[str, Any] = _read_yaml(config) if config else {}
    parse_assignments(assignments, tree)
    try:
        return settings.model_validate(tree | arguments)
    except ValidationError as error:
        raise ConfigError(explain(error, settings)) from error


def parse_assignments(assignments: list[str], tree: dict[str, Any] | None = None) -> dict[str, Any]:
    """A tree of settings with `key=value` words put into it, values read as YAML; keys may be dotted."""
    tree = {} if tree is None else tree
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator:
            raise ConfigError(f"--set {assignment!r} is not of the form key=value, such as run.batch_size=4")
        *groups, leaf = key.split(".")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
            if not isinstance(branch, dict):
                raise ConfigError(f"--set {assignment!r}: {group} is a value, not a group of settings")
        branch[leaf] = _parse_yaml(value, f"--set {assignment}")
    return tree


def parse_range(value: int | str | None, default: int) -> tuple[int, int]:
    """The fewest and the most of a setting such as 2 or "2..8".

    Raises:
        ValueError: it is neither.
    """
    if value is None:
        return default, default
    low, dots, high = str(value).partition("..")
    if not low.isdecimal() or (dots and not high.isdecimal()):
        raise ValueError(f"{value!r} is neither a number nor MIN..MAX such as 2..8")
    return int(low), int(high or low)


def dump_yaml(tree: dict[str, Any]) -> str:
    """A tree of plain values as YAML, in the order given."""
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a tree by their dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        text = storage.read_bytes(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path!r} cannot be read: {error}") from error
    tree = _parse_yaml(text, f"--config {Path(path).name}")
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {path!r} must hold keys and values, such as `prompts: [polyp]`")
    return tree


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(io.StringIO(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def explain(error: ValidationError, settings: type[Settings]) -> str:
    """All that is wrong, in one sentence."""
    problems = []
    known = [key for key, _ in _leaves(settings)]
    for detail in error.errors():
        key = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            problems.append(f"unknown key {key!r}; {hint}")
        elif detail["type"] == "missing":
            problems.append(f"{key} is missing")
        elif key:
            message = detail["msg"][0].lower() + detail["msg"][1:]
            problems.append(f"{key} is {detail['input']!r}: {message}")
        else:
            problems.append(detail["msg"].removeprefix("Value error, "))
    return "; ".join(problems)


def describe_settings(settings: type[Settings]) -> list[str]:
    """One line per setting, its default and what it means, for a job's --help."""
    lines = []
    for key, info in _leaves(settings):
        if info.description:
            default = (
                "..."
                if info.is_required()
                else yaml.safe_dump(_plain(info.default), default_flow_style=True, width=1000).partition("\n")[0]
            )
            choices = [str(choice) for choice in get_args(info.annotation) if isinstance(choice, str)]
            among = f" ({', '.join(choices)})" if get_origin(info.annotation) is Literal else ""
            lines.append(f"  {f'{key}={default}':28} {info.description}{among}")
    return lines


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _leaves(settings: type[Settings], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting by its dotted key."""
    for name, info in settings.model_fields.items():
        group = info.annotation
        if isinstance(group, type) and issubclass(group, Settings):
            yield from _leaves(group, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info
