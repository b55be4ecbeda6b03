"""The masks of DICOM images by segment, as a SEG or an RTSTRUCT has them."""

from collections.abc import Iterator

import numpy as np

from vlsm.errors import ImageError
from vlsm.export.dicom_source import DicomImage, ImageRows
from vlsm.export.folder import ExportFolder
from vlsm.export.labels import class_names, decode_labels
from vlsm.export.origins import MAX_EXPORT_BYTES, Numbering, Row, source_of
from vlsm.runs.results import decode_ok_row


def stack_masks(
    entries: list[ImageRows], numbering: Numbering, folder: ExportFolder
) -> tuple[dict[str, np.ndarray], list[Row]]:
    """Return the masks of all frames of some images by segment, and the rows that have them.

    A segment is a prompt, or a prompt of one member of an ensemble: "polyp (member 1)". If there are label maps, their
    classes are the segments, and the masks of whole ensembles are not used. A row whose mask is damaged, or does not
    fit its image, is noted as failed. Frames without a mask are 0.

    Args:
        entries: images of the same size, in the order of their frames.
        numbering: of the prompts: the order of the segments.
        folder: notes the failed rows.

    Returns:
        (frames, H, W) uint8 of 0 and 1 for each segment, and the rows.

    Raises:
        ImageError: there is no mask, or there are more than MAX_EXPORT_BYTES of them.
    """
    size = sum(entry.image.size[0] for entry in entries), *entries[0].image.size[1:]
    has_labels = any(row["kind"] == "labels" for entry in entries for row in entry.rows)
    masks: dict[tuple[int, str, str], np.ndarray] = {}  # by number and text of the prompt, and kind
    rows: list[Row] = []
    start = 0
    for entry in entries:
        chosen = [row for row in entry.rows if not (has_labels and row["kind"] == "mask")]
        for row, frame, values, prompts in _decode_rows(chosen, entry.image, folder):
            rows.append(row)
            for number, prompt in enumerate(prompts, start=1):
                segment = numbering[prompt], prompt, row["kind"]
                if segment not in masks:
                    masks[segment] = _allocate(size, len(masks) + 1, entry.image.name)
                masks[segment][start + frame] = values == number
        start += entry.image.size[0]
    if not masks:
        raise ImageError("corrupt", f"no mask of {entries[0].image.name} can be exported")
    names = {key: key[1] if key[2] in ("mask", "labels") else f"{key[1]} ({key[2]})" for key in sorted(masks)}
    return {name: masks[key] for key, name in names.items()}, rows


def _decode_rows(
    rows: list[Row], image: DicomImage, folder: ExportFolder
) -> Iterator[tuple[Row, int, np.ndarray, list[str]]]:
    """Yield each row that can be decoded, its frame, its values (H, W), and the prompts of the values from 1."""
    for row in rows:
        with folder.attempt([row]):
            is_labels = row["kind"] == "labels"
            values = decode_labels(row) if is_labels else decode_ok_row(row)
            prompts = class_names(row) if is_labels else [row["prompt"]]
            frame = int((source_of(row)[1] or "frame=0").removeprefix("frame="))
            if not 0 <= frame < image.size[0] or values.shape != image.size[1:]:
                raise ImageError("corrupt", f"{image.name} changed its shape after segmentation")
            yield row, frame, values, prompts


def _allocate(size: tuple[int, ...], num_segments: int, name: str) -> np.ndarray:
    """Return zeros for one more segment, (frames, H, W) uint8."""
    if num_segments * np.prod(size, dtype=np.int64) > MAX_EXPORT_BYTES:
        limit = f"{MAX_EXPORT_BYTES:,} pixels in all segments"
        raise ImageError("too_large", f"{name} or its series has more than {limit}")
    return np.zeros(size, np.uint8)
