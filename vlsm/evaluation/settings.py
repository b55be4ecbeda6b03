"""Settings of an evaluation: all that decides its scores, and under `run` how it is carried out."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vlsm import storage
from vlsm.config import (
    CleanSettings,
    MemberSettings,
    RunSettings,
    SegmentSettings,
    Settings,
    TileSettings,
    each_one_is_a_list,
    one_is_a_list,
)

_NOT_SHARED = {"output", "prompts", "start_over"}  # with a segment run, though of one name
OWN = "own"  # the name of the prompt that a checkpoint brings with it


class EvaluateSettings(Settings):
    """What is compared, on which labelled images, with which prompts."""

    output: str
    datasets: dict[str, str] = Field({}, description="by name, as --dataset gives them")
    checkpoints: tuple[str, ...] = Field((), description="each a system of its own, as --checkpoint gives them")
    systems: dict[str, tuple[MemberSettings, ...]] = Field(
        {}, description="ensembles by name: lists of members with checkpoint, weight, flip, prompts"
    )
    masks: dict[str, str] = Field({}, description="OUTPUT of finished segment runs by name, as --masks gives them")
    baseline: str | None = Field(
        None, description="the system with which the others are compared; the first unless told"
    )
    split: Literal["train", "val", "test"] = Field("test", description="of the datasets")
    limit: int | None = Field(None, ge=1, description="records of each dataset: the first so many")
    prompts: tuple[str, ...] = Field(
        (OWN,),
        min_length=1,
        description="own (the checkpoint's), kinds that records have (p0, p1, ...; of several texts the first) or "
        "text:WORDS; each gives every record a row",
    )
    prompt_robustness: bool = Field(
        False, description="try the robustness_prompts as well, against the first of prompts"
    )
    robustness_prompts: dict[str, str] = Field(
        {
            "empty": "",
            "generic": "an image",
            "wrong class": "{other}",
            "paraphrase 1": "a picture of {prompt}",
            "paraphrase 2": "the area that shows {prompt}",
        },
        description="by name; {prompt} is the first of prompts, {other} what another dataset's p1 is, or 'a car'",
    )
    mask_threshold: int = Field(127, ge=0, le=254, description="brighter pixels of a label file are foreground")
    combine: Literal["mean", "vote"] = Field("mean", description="of several members, as in segment")
    threshold: float | None = Field(None, gt=0, lt=1, description="a probability; the checkpoint's own unless told")
    tile: TileSettings = TileSettings()
    clean: CleanSettings = CleanSettings()
    max_pixels: int = Field(100_000_000, ge=1, description="larger images are refused before they are decoded")
    max_image_bytes: int = Field(1 << 30, ge=1, description="larger files are refused before they are read")
    shard_rows: int = Field(64, ge=1, description="masks of one part file at most: the unit of work and of resuming")
    resamples: int = Field(2000, ge=100, description="of the bootstrap that gives intervals")
    seed: int = Field(0, ge=0, description="of the bootstrap")
    start_over: bool = Field(False, description="forget an earlier evaluation in OUTPUT, its masks included")
    retry_failed: bool = Field(False, description="do failed images again, and score everything anew")
    run: RunSettings = RunSettings()

    _list_prompts = field_validator("prompts", mode="before")(one_is_a_list)
    _list_members = field_validator("systems", mode="before")(each_one_is_a_list)

    @field_validator("datasets", "masks", "checkpoints")
    @classmethod
    def _make_absolute(cls, value: Any) -> Any:
        """A rerun may start in another working directory."""
        if isinstance(value, dict):
            return {name: storage.absolute(uri) for name, uri in value.items()}
        return tuple(map(storage.absolute, value))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.datasets:
            raise ValueError("there is nothing to score on: give --dataset NAME=URI once at least")
        if not (self.checkpoints or self.systems or self.masks):
            raise ValueError(
                "there is nothing to score: give --checkpoint DIR once at least, systems or --masks NAME=OUTPUT"
            )
        if empty := [name for name, members in self.systems.items() if not members]:
            raise ValueError(f"systems: {empty[0]} has no members")
        if "random" in self.prompts:
            raise ValueError("prompts: random is for training; name the prompts that are to be scored")
        names = [*self.prompts, *(self.robustness_prompts if self.prompt_robustness else ())]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"prompts: {twice[0]} stands there twice")
        return self

    def segment_settings(
        self, source: str, output: str, members: tuple[MemberSettings, ...], own: str
    ) -> SegmentSettings:
        """Those of the segment run that makes a system's masks.

        Args:
            source: its INPUT, a list that gives each image its prompts.
            output: its OUTPUT.
            members: the system's.
            own: the system's own prompt.
        """
        shared = (EvaluateSettings.model_fields.keys() & SegmentSettings.model_fields.keys()) - _NOT_SHARED
        settings: dict[str, Any] = {name: getattr(self, name) for name in shared}
        return SegmentSettings(input=source, output=output, members=members, prompts=(own,), **settings)
