"""Settings that decide what is read from labelled datasets: the same for training, calibration and evaluation."""

from typing import Literal

from pydantic import Field

from vlsm.config import MemberSettings, RunSettings, SegmentSettings, Settings, Slices

READING = ("slices", "window", "max_pixels", "max_image_bytes")  # a segment run has the same settings


class DatasetSettings(Settings):
    """How labelled datasets are read."""

    mask_threshold: int = Field(127, ge=0, le=254, description="brighter pixels of a mask file are foreground")
    slices: Slices = Field("axial", description="direction in which volumes are cut into slices; each is an image")
    window: tuple[float, float] | None = Field(
        None, description="grey values to show, above 8 bits: [centre, width], as [40, 400]; null: as the file states"
    )
    absent_classes: Literal["skip", "empty"] | None = Field(
        None,
        description="an image, slice or frame without a class: skip: no example; empty: an example with an empty mask; "
        "null: skip for COCO, volumes and DICOM segmentations",
    )
    image_folders: dict[str, str] = Field(
        {}, description="folder of the images of a COCO file, by dataset, if they are not beside it"
    )
    max_pixels: int = Field(100_000_000, ge=1, description="pixels of an image; larger images are not decoded")
    max_image_bytes: int = Field(1 << 30, ge=1, description="bytes of a file; larger files are not read")

    def reading(self, run: RunSettings) -> SegmentSettings:
        """Return the settings with which a `Reader` reads the files of these datasets."""
        reading = {name: getattr(self, name) for name in READING}
        return SegmentSettings(input="", output="", members=(MemberSettings(checkpoint=""),), run=run, **reading)
