"""Settings of an evaluation. `run` holds how the job executes; every other setting can change the scores."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vlsm import storage
from vlsm.config import (
    A_PROBABILITY,
    CleanSettings,
    MemberSettings,
    RunSettings,
    SegmentSettings,
    Settings,
    TileSettings,
    check_threshold,
    each_one_is_a_list,
    one_is_a_list,
)
from vlsm.datasets.records import RECORD
from vlsm.datasets.settings import READING, DatasetSettings

TOLERANCE_PX = 2.0  # of the normalised surface distance; the outlines of two people differ by as much
_NOT_SHARED = {"output", "prompts", "start_over"}  # a segment run has settings of these names with other values


class EvaluateSettings(Settings):
    """Systems to compare, labelled images and prompts."""

    output: str
    datasets: dict[str, str] = Field({}, description="locations of labelled datasets by name, as in --dataset")
    checkpoints: tuple[str, ...] = Field((), description="checkpoints, one system each, as in --checkpoint")
    systems: dict[str, tuple[MemberSettings, ...]] = Field(
        {}, description="ensembles by name: lists of members with checkpoint, weight, flip, prompts"
    )
    masks: dict[str, str] = Field({}, description="OUTPUT of finished segment runs by name, as in --masks")
    marks: str | None = Field(
        None,
        description="file of a reviewer's marks, saved by the report of a run of --masks: rejected images are left out "
        "for all systems, and counted",
    )
    baseline: str | None = Field(
        None, description="the system that the other systems are compared with; default: the first system"
    )
    split: Literal["train", "val", "test", "all"] = Field(
        "test", description="the split of the datasets to score; all: also records without a split"
    )
    limit: int | None = Field(None, ge=1, description="number of records to score per dataset, the first of the split")
    prompts: tuple[str, ...] = Field(
        (RECORD,),
        min_length=1,
        description="prompts to score, one row per record and prompt: record (the record's own prompt, its p1; if it "
        "has none, the checkpoint's), own (stored in the checkpoint, for every record), p0, p1, ... (from the record; "
        "the first text if there are several) or text:WORDS",
    )
    prompt_robustness: bool = Field(
        False,
        description="also score the robustness_prompts and compare their masks with those of the first of prompts",
    )
    robustness_prompts: dict[str, str] = Field(
        {
            "empty": "",
            "generic": "an image",
            "wrong class": "{other}",
            "paraphrase 1": "a picture of {prompt}",
            "paraphrase 2": "the area that shows {prompt}",
        },
        description="templates by name; {prompt} is the first of prompts, {other} a p1 of another dataset, or 'a car'",
    )
    data: DatasetSettings = DatasetSettings()
    combine: Literal["mean", "vote"] = Field("mean", description="how to combine the members, as in jobs.segment")
    threshold: float | None = Field(
        None, description=f"lowest probability of a foreground pixel, {A_PROBABILITY}; default: the checkpoint's"
    )
    nsd_tolerance_px: float = Field(
        TOLERANCE_PX, ge=0, description="tolerance of the normalised surface distance nsd, in pixels"
    )
    nsd_tolerance_mm: float | None = Field(
        None, ge=0, description="also nsd_mm with this tolerance in millimetres, for DICOM images and volumes"
    )
    presence_threshold: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="presence, or else highest probability, from which an image counts as showing the finding, for "
        "sensitivity and specificity; default: stored in the checkpoint (vlsm calibrate with specificity=0.95), else "
        "any foreground",
    )
    tile: TileSettings = TileSettings()
    clean: CleanSettings = CleanSettings()
    shard_rows: int = Field(64, ge=1, description="masks per part file at most; a rerun repeats incomplete part files")
    groups: tuple[str, ...] = Field(
        (), description="columns of lists whose values are groups with scores of their own, as [site, sex]"
    )
    patient: str | None = Field(
        None,
        description="column of the patient: intervals and tests take patients for samples, not images; group: that of "
        "each record",
    )
    small_group: int = Field(
        10, ge=1, description="a group with fewer patients (or images) is marked; it is not the worst or best group"
    )
    resamples: int = Field(2000, ge=100, description="number of bootstrap samples for the intervals")
    seed: int = Field(0, ge=0, description="random seed of the bootstrap")
    start_over: bool = Field(False, description="delete an earlier evaluation in OUTPUT, including its masks")
    retry_failed: bool = Field(False, description="segment failed images again, and score all images again")
    run: RunSettings = RunSettings()

    @model_validator(mode="before")
    @classmethod
    def _read_earlier_names(cls, value: Any) -> Any:
        """Move settings that had no group in earlier versions to `data`."""
        if not isinstance(value, dict):
            return value
        moved = {name: value[name] for name in ("mask_threshold", "max_pixels", "max_image_bytes") if name in value}
        others = {name: item for name, item in value.items() if name not in moved}
        return others | {"data": moved | dict(others.get("data") or {})} if moved else value

    _check_threshold = field_validator("threshold", mode="before")(check_threshold)
    _list_prompts = field_validator("prompts", "groups", mode="before")(one_is_a_list)
    _list_members = field_validator("systems", mode="before")(each_one_is_a_list)

    @field_validator("datasets", "masks", "checkpoints", "marks")
    @classmethod
    def _make_absolute(cls, value: Any) -> Any:
        """Return absolute locations, because a rerun may start in another working directory."""
        if value is None or isinstance(value, str):
            return value and storage.absolute(value)
        if isinstance(value, dict):
            return {name: storage.absolute(uri) for name, uri in value.items()}
        return tuple(map(storage.absolute, value))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.datasets:
            raise ValueError("there is no dataset to score on; give --dataset NAME=URI at least once")
        if not (self.checkpoints or self.systems or self.masks):
            raise ValueError(
                "there is no system to score; give --checkpoint DIR, --masks NAME=OUTPUT or systems at least once"
            )
        if empty := [name for name, members in self.systems.items() if not members]:
            raise ValueError(f"systems: {empty[0]} has no members; give it one or more checkpoints")
        if "random" in self.prompts:
            raise ValueError("prompts: random is only for training; name the prompts to score")
        names = [*self.prompts, *(self.robustness_prompts if self.prompt_robustness else ())]
        if twice := [name for name in self.groups if self.groups.count(name) > 1]:
            raise ValueError(f"groups: {twice[0]} is repeated; list each column once")
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"prompts: {repeated[0]} is repeated; list each prompt once")
        return self

    @property
    def columns_of_groups(self) -> tuple[str, ...]:
        """The columns whose values the scores have: those of `groups`, and `patient`."""
        return tuple(dict.fromkeys((*self.groups, *((self.patient,) if self.patient else ()))))

    def segment_settings(
        self, source: str, output: str, members: tuple[MemberSettings, ...], own_prompt: str
    ) -> SegmentSettings:
        """Return the settings of the segment run that makes the masks of a system.

        Args:
            source: INPUT of the segment run: a manifest with the prompts of each image.
            output: OUTPUT of the segment run.
            members: members of the system.
            own_prompt: the prompt that is stored in the system's checkpoints.
        """
        shared = (EvaluateSettings.model_fields.keys() & SegmentSettings.model_fields.keys()) - _NOT_SHARED
        settings: dict[str, Any] = {name: getattr(self, name) for name in shared}
        settings |= {name: getattr(self.data, name) for name in READING}
        settings |= {"prompts": (own_prompt,), "allow_equal_masks": True}  # the scores tell what each mask is worth
        return SegmentSettings(input=source, output=output, members=members, **settings)
