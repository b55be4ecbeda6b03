"""Export masks in the layout of Pascal VOC: label maps with a palette, and lists of images."""

import re
from pathlib import Path, PurePosixPath

from vlsm.errors import ConfigError
from vlsm.export.folder import ExportFolder, open_folder
from vlsm.export.labels import paint_labels, save_labels
from vlsm.export.links import ImageLinks, read_images
from vlsm.export.origins import Filters, Numbering, read_settings
from vlsm.images.overlays import prompt_colors

_MOST_CLASSES = 254  # 0 is background, and 255 is not counted by readers of VOC


def export_voc(
    output: str, directory: str | Path | ExportFolder, filters: Filters = None, limit: int | None = None
) -> int:
    """Write `DIR/SegmentationClass/IMAGE.png`, `DIR/ImageSets/Segmentation/train.txt`, `DIR/labelmap.txt`, the index.

    The values and colours of the label maps are those of `export_labels`: 0 is background, k is the k-th prompt; where
    masks overlap, the mask with the higher confidence is used. No pixel has the value 255, which means "not labelled".
    The names are those of the images below the folder that the log names, without their ending. The images belong into
    `DIR/JPEGImages`.

    Arguments and errors are as for `export_labels`, but there may be 254 prompts.

    Returns:
        Number of written label maps.
    """
    numbering, links = Numbering(read_settings(output)), ImageLinks(output)
    with open_folder(directory) as folder:
        description = folder.new("labelmap.txt")
        with folder.new("ImageSets/Segmentation/train.txt").open("w", encoding="utf-8") as file:
            for rows in read_images(output, [("kind", "==", "mask"), *(filters or [])], limit):
                name = PurePosixPath(links.name(rows[0])[0]).with_suffix("").as_posix()
                with (
                    folder.attempt(rows),
                    folder.file(rows[0], rows=rows, path=folder.claim(f"SegmentationClass/{name}.png")) as path,
                ):
                    save_labels(paint_labels(rows, numbering), path)
                    if len(numbering.numbers) > _MOST_CLASSES:
                        raise ConfigError(f"there are {len(numbering.numbers)} prompts; VOC can hold {_MOST_CLASSES}")
                    file.write(f"{name}\n")
        description.write_text(_describe(numbering), encoding="utf-8")
        links.report()
        return folder.num_written


def _describe(numbering: Numbering) -> str:
    """Return labelmap.txt, which CVAT and datumaro read. Colons separate its fields."""
    colors = [(0, 0, 0), *prompt_colors(len(numbering.numbers))]
    names = ["background", *(re.sub(r"[\s:#]+", " ", prompt) for prompt in numbering.numbers)]
    lines = [f"{name}:{','.join(map(str, color))}::" for name, color in zip(names, colors, strict=True)]
    return "\n".join(["# label:color_rgb:parts:actions", *lines, ""])
