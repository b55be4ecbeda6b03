"""Makes a labelled dataset of reviewed masks, and compares them with the predictions of the run.

The outcomes of a mask:

- accepted: the reviewed mask has the pixels of the prediction. Two empty masks are equal.
- corrected: it has other pixels. "emptied" counts those of them that have none any more.
- rejected: the annotator has rejected the image. It is not in the list.
- refused: its image or its shapes cannot be told. It is not in the list; `index.csv` beside the masks has the reason.
- not reviewed: the tool says nothing about it.

A reviewed mask without foreground is a negative example: its `mask_uri` is `none`.
"""

import logging
import os
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlsm import storage
from vlsm.archive.places import lies_outside
from vlsm.datasets.records import NO_MASK
from vlsm.errors import ConfigError, ImageError
from vlsm.export.folder import ExportFolder
from vlsm.export.links import read_images
from vlsm.export.origins import Filters
from vlsm.labels.files import MARKS, read_reviews
from vlsm.labels.geojson import UNLABELLED
from vlsm.labels.manifest import ListWriter
from vlsm.labels.marks import read_mark_reviews
from vlsm.labels.masks import make_mask_reader, read_mask
from vlsm.labels.matching import Match, Matches, match_reviews
from vlsm.labels.reviews import MaskFile, Prediction, Review, draw_shapes
from vlsm.runs.carried import CARRIED, carried_fields
from vlsm.runs.links import refuse_inside
from vlsm.runs.marks import digest_mask
from vlsm.runs.results import choose_rows, decode_ok_row, open_results, read_rows
from vlsm.segmentation.metrics import dice_score
from vlsm.shown import escape

logger = logging.getLogger("vlsm")

OUTCOMES = ("accepted", "corrected", "rejected")
_URIS_AT_ONCE = 1000  # of one filter

Row = dict[str, Any]


@dataclass
class Counts:
    """Outcomes of the masks of one prompt.

    Attributes:
        outcomes: number of masks by outcome, and "emptied".
        dice: Dice between prediction and reviewed mask, of accepted and corrected masks.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    dice: "array[float]" = field(default_factory=lambda: array("d"))


@dataclass
class Summary:
    """Outcome of an import.

    Attributes:
        prompts: the counts of each prompt.
        num_refused: number of masks, and of reviews without an image, that were refused.
        num_planned: number of masks of the run that the filters choose.
    """

    prompts: dict[str, Counts] = field(default_factory=dict)
    num_refused: int = 0
    num_planned: int = 0

    def total(self, outcome: str) -> int:
        """Return the number of masks with an outcome."""
        return sum(counts.outcomes[outcome] for counts in self.prompts.values())


def import_labels(  # noqa: PLR0913 - the options of the command
    uri: str, format_name: str, output: str, manifest: str, filters: Filters = None, allow: Sequence[str] = ()
) -> Summary:
    """Write the list of reviewed masks and, beside it, the masks as PNGs with values 0 and 255.

    The masks lie in a folder with the name of the list and `_masks`. Memory holds the reviews of one file of the tool.

    Args:
        uri: the file or folder of the tool.
        format_name: one of `vlsm.labels.files.FORMATS`.
        output: OUTPUT of the segment run whose masks were reviewed.
        manifest: the list to write, local.
        filters: the filters of the export. Other masks of the run were not reviewed.
        allow: places whose images the list may name, if OUTPUT is in a store and they lie outside of it.

    Raises:
        ConfigError: there is no such file or run, the list or its masks exist, or a filter names an unknown column.
        ManifestError: a file is not in the format, or is beyond a limit.
    """
    output = storage.absolute(output)
    refuse_inside("MANIFEST", manifest, output)
    masks = Path(manifest).with_suffix("").as_posix() + "_masks"
    for place in (manifest, masks):
        if "://" not in manifest and os.path.lexists(place):
            raise ConfigError(
                f"{place!r} exists, and may hold the work of people: remove it or choose another MANIFEST"
            )
    carried = carried_fields(open_results(output).schema)
    folder = ExportFolder(masks, allow, verb="imported")
    chosen = choose_rows(filters, ("mask",))
    prompts = Counter(row["prompt"] for row in read_rows(output, chosen, ["prompt"]))
    summary = Summary({prompt: Counts() for prompt in prompts}, num_planned=prompts.total())
    with ListWriter(manifest, carried) as rows, folder:
        importer = _Importer(output, filters, rows, folder, summary, [one.name for one in carried])
        reader = read_mark_reviews(uri, output) if format_name == MARKS else read_reviews(uri, format_name)
        for reviews in reader:
            importer.add(match_reviews(reviews, output))
        summary.num_refused = folder.num_failed
    return summary


class _Importer:
    """Imports the reviews of one file after the other.

    Args:
        output: OUTPUT of the run.
        filters: the filters of the export.
        rows: the list.
        folder: the folder of the masks.
        summary: is updated.
        carried: names of the columns of the list that was INPUT.
    """

    def __init__(  # noqa: PLR0913 - see the class
        self,
        output: str,
        filters: Filters,
        rows: ListWriter,
        folder: ExportFolder,
        summary: Summary,
        carried: Sequence[str],
    ) -> None:
        self._output, self._filters, self._rows, self._folder = output, filters, rows, folder
        self._summary, self._no_values = summary, dict.fromkeys(carried)
        self._reader = make_mask_reader()
        self._seen: set[int] = set()  # hashes of the imported masks

    def add(self, matches: Matches) -> None:
        """Import the reviews of one file."""
        uris = sorted({uri for uri, _ in matches.by_image})
        done: set[int] = set()
        for start in range(0, len(uris), _URIS_AT_ONCE):
            condition = ("image_uri", "in", uris[start : start + _URIS_AT_ONCE])
            for rows in read_images(self._output, [condition, *(self._filters or ())]):
                for match in matches.by_image.get((rows[0]["image_uri"], rows[0]["selector"]), ()):
                    done.add(id(match))
                    self._add_image(match, rows)
        for match in (each for found in matches.by_image.values() for each in found if id(each) not in done):
            self._refuse(
                match.review, f"{match.review.where}: the run has no mask of this image, or --filter excludes it"
            )
        for review, problem in matches.problems:
            self._refuse(review, problem)

    def _refuse(self, review: Review, problem: str) -> None:
        """Note a review without a mask in the run."""
        nobody = {"image_id": review.names[0] if review.names else "", "image_uri": review.where, "selector": None}
        self._folder.fail(nobody | {"prompt": "", "kind": "", CARRIED: self._no_values}, problem)

    def _add_image(self, match: Match, rows: list[Row]) -> None:
        review, chosen = match.review, rows
        if review.prompts is not None:
            chosen = [row for row in rows if row["prompt"] in review.prompts]
        if review.is_mask_file:
            chosen = [row for row in rows if row["prompt"] == match.prompt] if match.prompt is not None else rows
        known = {text for row in rows for text in (row["prompt"], escape(row["prompt"]), UNLABELLED)}
        unknown = [] if review.is_mask_file else [label for label in review.shapes if label not in known]
        for row in chosen:
            with self._folder.attempt([row]):
                self._check(match, row, len(rows))
                if review.is_rejected:
                    self._summary.prompts[row["prompt"]].outcomes["rejected"] += 1
                    continue
                mask = self._draw(review, row, len(rows) == 1)
                if unknown and row["area_px"] and not mask.any():  # a label with another name is no emptied mask
                    reason = (
                        f"{review.where} has no {row['prompt']!r}, but {unknown[0]!r}, which is no prompt of the run"
                    )
                    raise ImageError("corrupt", reason)
                self._add_mask(row, mask)
        for label in unknown:
            self._refuse(review, f"{review.where}: the label {label!r} is no prompt of the run")

    def _check(self, match: Match, row: Row, num_prompts: int) -> None:
        """Raise an ImageError if a review cannot be used for a row."""
        review, size = match.review, (row["height"], row["width"])
        if review.problem:
            raise ImageError("corrupt", f"{review.where}: {review.problem}")
        if review.size not in (None, size):
            stated = f"{review.size[1]} x {review.size[0]}" if review.size else ""
            raise ImageError("size", f"{review.where} has {stated} pixels; the image has {size[1]} x {size[0]}")
        if review.is_mask_file and match.prompt is None and num_prompts > 1:
            raise ImageError("corrupt", f"{review.where} does not tell its prompt; name it as the export does")
        if UNLABELLED in review.shapes and not review.is_mask_file and num_prompts > 1:
            raise ImageError("corrupt", f"{review.where} has objects without a class")
        if lies_outside(row["image_uri"], self._output, self._folder.allow):
            message = f"{row['image_uri']} lies outside of the bucket of OUTPUT; --allow FOLDER lets the list name it"
            raise ImageError("forbidden", message)
        if (key := hash((row["image_uri"], row["selector"], row["prompt"], row["kind"]))) in self._seen:
            raise ImageError("corrupt", f"{review.where}: an earlier file has a review of this image")
        self._seen.add(key)

    def _draw(self, review: Review, row: Row, is_only: bool) -> np.ndarray:
        """Return the reviewed mask of a row, (H, W) uint8 of 0 and 1."""
        size = (row["height"], row["width"])
        if isinstance(shape := next(iter(review.shapes.get(row["prompt"], ())), None), Prediction):
            if shape.digest not in (None, digest_mask(row["mask_rle"])):
                raise ImageError("corrupt", f"{review.where}: the mask was made again after the mark")
            return decode_ok_row(row)
        labels = dict.fromkeys([row["prompt"], escape(row["prompt"]), *([UNLABELLED] if is_only else [])])
        if review.is_mask_file:
            (shape,) = review.shapes[UNLABELLED]
            if not isinstance(shape, MaskFile):
                raise TypeError(shape)
            return read_mask(shape, self._reader, size)
        return draw_shapes([shape for label in labels for shape in review.shapes.get(label, ())], size, review.where)

    def _add_mask(self, row: Row, mask: np.ndarray) -> None:
        """Write a mask and its row of the list."""
        predicted, counts = decode_ok_row(row), self._summary.prompts[row["prompt"]]
        outcome = "accepted" if np.array_equal(predicted, mask) else "corrected"
        dice = dice_score(predicted, mask)
        mask_uri = NO_MASK
        if mask.any():
            with self._folder.file(row) as path:
                Image.fromarray(mask * 255).save(path)
            mask_uri = f"{self._folder.directory.name}/{path.relative_to(self._folder.directory).as_posix()}"
        else:
            self._folder.note("", row)
        stated = {"mask_uri": mask_uri, "outcome": outcome, "prediction_dice": dice}
        self._rows.write(row[CARRIED] | row | stated)
        counts.outcomes[outcome] += 1
        counts.outcomes["emptied"] += outcome == "corrected" and not mask.any()
        counts.dice.append(dice)
