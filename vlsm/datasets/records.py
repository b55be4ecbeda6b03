"""A record: an image, one of its masks, and the prompts for that mask."""

from dataclasses import MISSING, dataclass, fields
from typing import Any

from vlsm.errors import ManifestError
from vlsm.shown import hide_secrets, public_uri

SPLITS = ("train", "val", "test")
# choices of a prompt in calibration and evaluation, beside the kinds of a record's prompts and text:WORDS
RECORD = "record"  # the record's own prompt, `Record.prompt`; where it has none, the one stored in the checkpoint
LABELS = {"record": "each image's own", "own": "the checkpoint's own"}  # what tables for people call them
OWN = "own"  # the prompt stored in the checkpoint, for every record
NO_MASK = "none"  # instead of a location: the image does not show the finding; a file of this name is ./none


@dataclass(frozen=True)
class Record:
    """An image, one of its masks, and the prompts for that mask. An image with several findings has several records.

    A negative record says that its image does not show what the prompt names: its mask_uri is NO_MASK, and its mask is
    empty. A mask file without foreground means the same, but may be an accident: the checks of the data look at it.

    Attributes:
        dataset: name of the dataset.
        split: one of SPLITS, or "" if the dataset does not state it: not yet assigned.
        where: the annotation file and the position in it, for messages.
        image_uri: location of the image.
        mask_uri: location of the mask, or of the file that describes its shape; or NO_MASK.
        prompts: kinds of prompts, such as p1, each with at least one alternative text.
        image_selector: which image of the file it is, such as "slice=17", as in the manifest of a run; None if the file
            has one image.
        mask_selector: the same for the mask.
        labels: stored values of the mask file that are foreground: entries of its palette, if it has one, or
            `vlsm.images.stored.COLOURS` + 0xRRGGBB for colours. Empty: the values above data.mask_threshold.
        more_masks: locations of further mask files; a pixel is foreground if it is so in any of them.
        mask_rle: the mask itself as COCO run lengths; None if it is in a file.
        mask_size: (height, width) of mask_rle in pixels.
        group: images of one patient or video have the same group; empty if unknown.
        further: names and values of further columns of its list, as texts, where `data.carry` or `groups` ask for them.
    """

    dataset: str
    split: str
    where: str
    image_uri: str
    mask_uri: str
    prompts: dict[str, tuple[str, ...]]
    image_selector: str | None = None
    mask_selector: str | None = None
    labels: tuple[int, ...] = ()
    more_masks: tuple[str, ...] = ()
    mask_rle: str | None = None
    mask_size: tuple[int, int] | None = None
    group: str = ""
    further: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        # the name of the record in messages and scores, and that of its group, which may be its image
        object.__setattr__(self, "where", hide_secrets(self.where))
        object.__setattr__(self, "group", public_uri(self.group))

    @property
    def is_negative(self) -> bool:
        """Whether the dataset states that the image does not show the finding."""
        return self.mask_uri == NO_MASK

    @property
    def mask_uris(self) -> tuple[str, ...]:
        """The locations of all masks; none of a negative record."""
        return () if self.is_negative else (self.mask_uri, *self.more_masks)

    @property
    def has_words(self) -> bool:
        """Whether a prompt is more than an empty text."""
        return any(text.strip() for texts in self.prompts.values() for text in texts)

    @property
    def prompt(self) -> str | None:
        """The text that names the object of the mask: the first p1. None if the record has no p1."""
        return next(iter(self.prompts.get("p1", ())), None)

    def stated(self) -> dict[str, Any]:
        """Return the fields as a dict, without those that have their default value."""
        return {
            one.name: value
            for one, value in ((one, getattr(self, one.name)) for one in fields(self))
            if one.default is MISSING or value != one.default
        }


def locations_of(record: Record) -> tuple[str, ...]:
    """Return the locations of all files of a record."""
    return record.image_uri, *record.mask_uris


def check_texts(value: Any, where: str) -> tuple[str, ...]:
    """Return the alternative texts of a prompt.

    Args:
        value: a text or a list of texts.
        where: the record, for the message.

    Raises:
        ManifestError: the value is something else, or an empty list.
    """
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else ()
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ManifestError(f"{where} is {value!r}; it must be a text or a list of texts")
    return texts
