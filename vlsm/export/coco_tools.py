"""Export masks as COCO files in the layouts of CVAT and of FiftyOne."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

from vlsm.export.coco import write_coco
from vlsm.export.folder import ExportFolder, open_folder
from vlsm.export.links import LinkPrefix
from vlsm.export.origins import Filters
from vlsm.images.overlays import prompt_colors

_IN_ZIP = "annotations/instances_default.json"  # where CVAT and datumaro look for it


def export_cvat(
    output: str,
    directory: str | Path | ExportFolder,
    filters: Filters = None,
    limit: int | None = None,
    components: bool = False,
) -> int:
    """Write `DIR/cvat.zip`, which CVAT imports as "COCO 1.0", `DIR/labels.json`, and `DIR/index.csv`.

    The zip has the file of `export_coco`; arguments, result and errors are as there. `labels.json` is the list of
    labels that the task needs: it is pasted into the raw form of the labels. CVAT finds the frame of an image by its
    `file_name`: the task must have the images under these names, or in a folder that holds them so.
    """
    with open_folder(directory) as folder:
        zipped, listed = folder.new("cvat.zip"), folder.new("labels.json")
        path = folder.new("instances_default.json")
        try:
            number, prompts = write_coco(output, folder, filters, limit, path.name, components, iscrowd=1)
            with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.write(path, _IN_ZIP)
                archive.mkdir("images")  # datumaro asks for the folder, even if it is empty
        finally:
            path.unlink(missing_ok=True)
        colors = ["#{:02x}{:02x}{:02x}".format(*color) for color in prompt_colors(len(prompts))]
        labels = [
            {"name": prompt, "color": color, "attributes": []} for prompt, color in zip(prompts, colors, strict=True)
        ]
        text = json.dumps(labels, indent=2, ensure_ascii=False) + "\n"
        listed.write_text(text, encoding="utf-8")
        return number


def export_fiftyone(
    output: str,
    directory: str | Path | ExportFolder,
    filters: Filters = None,
    limit: int | None = None,
    prefixes: Sequence[LinkPrefix] = (),
) -> int:
    """Write `DIR/labels.json`, `DIR/data.json` and `DIR/index.csv`: a COCODetectionDataset of FiftyOne.

    `labels.json` is the file of `export_coco`, without "./" in front of a name; arguments, result and errors are as
    there. `data.json` maps each name to the image, which stays where it is.

    Args:
        output: as for `export_coco`.
        directory: as for `export_coco`.
        filters: as for `export_coco`.
        limit: as for `export_coco`.
        prefixes: other beginnings of the links to the images.
    """
    with open_folder(directory) as folder:
        folder.new("labels.json")
        with folder.new("data.json").open("w", encoding="utf-8") as file:

            def use_image(name: str, link: str) -> str:
                plain = name.removeprefix("./")
                file.write(f"{',' if file.tell() > 1 else ''}\n{json.dumps(plain)}: {json.dumps(link)}")
                return plain

            file.write("{")
            number, _ = write_coco(
                output, folder, filters, limit, "labels.json", use_image=use_image, prefixes=prefixes
            )
            file.write("\n}\n")
        return number
