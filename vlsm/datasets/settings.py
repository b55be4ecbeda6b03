"""Settings that decide what is read from labelled datasets: the same for training, calibration and evaluation."""

import difflib
from collections.abc import Iterable
from typing import Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from vlsm.config import (
    MemberSettings,
    RunSettings,
    SegmentSettings,
    Settings,
    Slices,
    each_one_is_a_list,
    one_is_a_list,
)
from vlsm.datasets.classes import Named, check_classes
from vlsm.errors import ConfigError

READING = ("slices", "window", "max_pixels", "max_image_bytes")  # a segment run has the same settings
COLUMNS = ("image_uri", "mask_uri", "split", "group", "dataset", "prompt", "prompts")


class DatasetSettings(Settings):
    """How labelled datasets are read."""

    mask_threshold: int = Field(127, ge=0, le=254, description="brighter pixels of a mask file are foreground")
    prompts: dict[str, tuple[str, ...]] = Field(
        {}, description="prompt p1 of a dataset whose records have none: --set data.prompts.kvasir=polyp"
    )
    classes: dict[int | str, str | Named] = Field(
        {},
        description="a record for each class of a mask, by its value or colour: {1: polyp} or {'#ff0000': polyp}; "
        "or these per dataset",
    )
    absent_classes: Literal["skip", "empty"] | None = Field(
        None,
        description="an image, slice or frame without a class: skip: no example; empty: an example with an empty mask; "
        "null: skip for COCO, volumes and DICOM segmentations, else empty",
    )
    allow_empty_masks: bool = Field(
        False, description="train although nearly all masks of a dataset's split are empty, or full"
    )
    join_masks: bool = Field(False, description="several masks of one image and one prompt are one mask")
    skip_unpaired: bool = Field(
        False, description="leave out images without a mask and masks without an image instead of stopping"
    )
    unmasked_images: Literal["negative"] | None = Field(
        None,
        description="negative: in a folder of images and masks, an image without a mask does not show the finding: its "
        "mask is empty; null: see skip_unpaired",
    )
    columns: dict[str, str] = Field(
        {}, description=f"columns of a list with other names, as {{mask_uri: label}}: {', '.join(COLUMNS)}"
    )
    carry: tuple[str, ...] = Field(
        (),
        description="further columns of lists that records keep, as [patient_id, site]: examples.parquet has them for "
        "an evaluation with groups",
    )
    slices: Slices = Field("axial", description="direction in which volumes are cut into slices; each is an image")
    window: tuple[float, float] | None = Field(
        None, description="grey values to show, above 8 bits: [centre, width], as [40, 400]; null: as the file states"
    )
    image_folders: dict[str, str] = Field(
        {}, description="folder of the images of a COCO file, by dataset, if they are not beside it"
    )
    max_pixels: int = Field(100_000_000, ge=1, description="pixels of an image; larger images are not decoded")
    max_image_bytes: int = Field(1 << 30, ge=1, description="bytes of a file; larger files are not read")

    _list_prompts = field_validator("prompts", mode="before")(each_one_is_a_list)
    _list_carry = field_validator("carry", mode="before")(one_is_a_list)
    _check_classes = field_validator("classes", mode="before")(check_classes)

    @field_validator("prompts")
    @classmethod
    def _check_prompts(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        if empty := [name for name, texts in value.items() if not texts or not all(map(str.strip, texts))]:
            raise ValueError(f"{empty[0]} has an empty prompt; give words, as in data.prompts.{empty[0]}=polyp")
        return value

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, value: dict[str, str]) -> dict[str, str]:
        if unknown := [name for name in value if name not in COLUMNS]:
            raise ValueError(f"{unknown[0]!r} must be one of {', '.join(COLUMNS)}; the list's name is the value")
        return value

    _allow: tuple[str, ...] = PrivateAttr(())

    @property
    def allow(self) -> tuple[str, ...]:
        """The job's setting `run.allow`. It is no setting of this group, because it may differ when a run resumes."""
        return self._allow

    _groups: tuple[str, ...] = PrivateAttr(())

    @property
    def further(self) -> tuple[str, ...]:
        """The further columns of lists to read: those of `carry`, and those that an evaluation groups scores by."""
        return tuple(dict.fromkeys((*self.carry, *self._groups)))

    def grouping(self, names: Iterable[str]) -> Self:
        """Return these settings for an evaluation that groups scores by columns of lists."""
        settings = self.model_copy()
        settings._groups = tuple(names)
        return settings

    _others: tuple[str, ...] = PrivateAttr(())

    def beside(self, names: Iterable[str]) -> Self:
        """Return these settings for one of several jobs with equal settings, whose datasets have these names."""
        settings = self.model_copy()
        settings._others = tuple(names)
        return settings

    def refuse_unknown(self, names: Iterable[str]) -> None:
        """Raise a ConfigError if a setting by dataset has a name that no dataset of the job has.

        Args:
            names: of the datasets, those in the column `dataset` of their lists included.
        """
        known = list(dict.fromkeys((*names, *self._others)))
        own_classes = [name for name, item in self.classes.items() if isinstance(item, dict)]
        for key, keys in (("prompts", self.prompts), ("classes", own_classes), ("image_folders", self.image_folders)):
            if unknown := [str(name) for name in keys if name not in known]:
                near = difflib.get_close_matches(unknown[0], known, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ConfigError(
                    f"data.{key} names {', '.join(unknown)}, but there is no such dataset; {hint}"
                    f"{'datasets are' if len(known) > 1 else 'the dataset is'} {', '.join(known)}"
                )

    def allowing(self, allow: tuple[str, ...]) -> Self:
        """Return these settings with permission for the places of `run.allow`; see `vlsm.archive.places`."""
        settings = self.model_copy()
        settings._allow = allow
        return settings

    def reading(self, run: RunSettings) -> SegmentSettings:
        """Return the settings with which a `Reader` reads the files of these datasets."""
        reading = {name: getattr(self, name) for name in READING}
        run = run.model_copy(update={"allow": (*run.allow, *self.allow)})
        return SegmentSettings(input="", output="", members=(MemberSettings(checkpoint=""),), run=run, **reading)


class SplitSettings(Settings):
    """Splits for records that have none. `vlsm.datasets.splits` says how they are made."""

    val: float = Field(0, ge=0, lt=1, description="share of the records without a split that becomes val")
    test: float = Field(0, ge=0, lt=1, description="share that becomes test; if val and test are 0, none are made")
    by: Literal["group", "image"] = Field(
        "group", description="group: records of one group (patient, video) stay together; image: those of one image"
    )
    look_alikes: bool = Field(True, description="images that look alike stay together too")
    seed: int = Field(0, ge=0, description="seed of the draw; it does not follow the seed of the training")

    @property
    def is_off(self) -> bool:
        """Whether no splits are made."""
        return not self.val and not self.test

    @property
    def shares(self) -> dict[str, float]:
        """The share of each split, without splits that have none."""
        shares = {"train": 1 - self.val - self.test, "val": self.val, "test": self.test}
        return {split: share for split, share in shares.items() if share}

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.val + self.test >= 1:
            raise ValueError(
                f"data.split.val and data.split.test are {self.val} and {self.test}; "
                "together they must be below 1, so that records remain for train"
            )
        return self
