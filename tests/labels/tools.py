"""Reads exports with the annotation tools' own libraries, and writes files as they would.

It runs in an environment of its own, because these libraries need other versions than the package: `python tools.py
FOLDER`. FOLDER holds the exports, by their formats, and masks.json: the run lengths of all masks. Nothing of vlsm is
imported here.
"""

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
from pycocotools import mask as coco


def read_masks(folder):
    masks = json.loads((folder / "masks.json").read_text())
    return {
        (row["image_id"], row["prompt"]): coco.decode({"size": row["size"], "counts": row["counts"].encode()})
        for row in masks
    }


def expect(found, masks):
    """Masks without foreground are in no file."""
    for key, mask in masks.items():
        np.testing.assert_array_equal(found.get(key, np.zeros_like(mask)), mask, err_msg=str(key))


def check_label_studio(folder, masks):
    from label_studio_sdk.converter import brush
    from label_studio_sdk.label_interface import LabelInterface

    interface = LabelInterface((folder / "label-studio/labeling_interface.xml").read_text())
    interface.validate()
    tasks = [task for path in (folder / "label-studio").glob("tasks-*.json") for task in json.loads(path.read_text())]
    found, project = {}, []
    for task in tasks:
        (prediction,) = task["predictions"]
        assert not (errors := interface.validate_prediction(prediction, return_errors=True)), errors
        for region in prediction["result"]:
            (label,) = region["value"]["brushlabels"]
            size = (region["original_height"], region["original_width"])
            opacity = brush.decode_rle(region["value"]["rle"]).reshape(*size, 4)
            assert (opacity == opacity[:, :, 3:]).all()
            found[task["data"]["image_id"], label] = opacity[:, :, 3] > 127
            # as the tool's own encoder would write it
            region["value"]["rle"] = brush.encode_rle(np.repeat((opacity[:, :, 3] > 127).ravel() * 255, 4))
        project.append(
            {"data": task["data"], "annotations": [{"result": prediction["result"], "was_cancelled": False}]}
        )
    expect(found, masks)
    (folder / "project.json").write_text(json.dumps(project))
    for path in (folder / "polygons").glob("tasks-*.json"):
        for task in json.loads(path.read_text()):
            for prediction in task["predictions"]:
                assert not interface.validate_prediction(prediction, return_errors=True)


def check_datumaro(folder, masks):
    import datumaro
    from datumaro.components.annotation import AnnotationType

    with zipfile.ZipFile(folder / "cvat/cvat.zip") as archive:
        archive.extractall(folder / "unpacked")
    dataset = datumaro.Dataset.import_from(str(folder / "unpacked"), "coco_instances")
    names = [label.name for label in dataset.categories()[AnnotationType.label]]
    found, ids = {}, {image_id.rpartition(".")[0]: image_id for image_id, _ in masks}
    assert len(dataset) == len(ids)
    for item in dataset:
        for shape in item.annotations:
            if shape.type == AnnotationType.mask:
                found[ids[item.id], names[shape.label]] = shape.image
                assert 0 < shape.attributes["score"] < 1 and shape.attributes["patient_id"]
    expect(found, masks)
    # datumaro writes what CVAT writes: uncompressed run lengths, or polygons
    dataset.export(str(folder / "exported"), "coco_instances", save_media=False)
    voc = datumaro.Dataset.import_from(str(folder / "voc"), "voc_segmentation")
    names = [label.name for label in voc.categories()[AnnotationType.label]]
    for item in voc:
        first, second = (masks[ids[item.id], prompt] for prompt in sorted({prompt for _, prompt in masks}))
        both = sum(shape.image for shape in item.annotations if names[shape.label] != "background")
        np.testing.assert_array_equal(both + np.zeros_like(first) > 0, first | second > 0)


def check_geojson(folder, masks):
    import geojson
    from shapely.geometry import shape

    for (image_id, prompt), mask in masks.items():
        collection = geojson.loads((folder / "qupath" / f"{image_id}.geojson").read_text())
        assert collection.is_valid, collection.errors()
        area = 0
        for feature in collection["features"]:
            if feature["properties"]["classification"]["name"] == prompt:
                polygons = shape(feature["geometry"])
                assert polygons.is_valid
                area += polygons.area
        assert area == mask.sum()


if __name__ == "__main__":
    root = Path(sys.argv[1])
    known = read_masks(root)
    check_label_studio(root, known)
    check_datumaro(root, known)
    check_geojson(root, known)
    print("checked")
