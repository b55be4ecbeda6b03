"""Masks that leave for a tool and come back have the same pixels, in every format that `vlsm.labels` reads."""

import csv
import json
import shutil
import zipfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.labels.conftest import PROMPTS, submit, write_json
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.read import read_dataset
from vlsm.datasets.settings import DatasetSettings


def through_label_studio(run, *words):
    folder = run.export("label-studio", *words)
    (file,) = folder.glob("tasks-*.json")
    return write_json(run.folder / "project.json", submit(json.loads(file.read_text()))), "label-studio"


def through_geojson(run):
    folder = run.export("qupath")
    target = run.folder / "flat"  # QuPath names its files after the image
    for path in folder.rglob("*.geojson"):
        target.mkdir(exist_ok=True)
        shutil.copy(path, target / path.name.replace(".png.", ".").replace(".jpg.", "."))
    return target, "geojson"


ROUTES = {
    "brush": through_label_studio,
    "polygons": lambda run: through_label_studio(run, "--polygons"),
    "cvat": lambda run: (run.export("cvat") / "cvat.zip", "cvat"),
    "cvat, components": lambda run: (run.export("cvat", "--components") / "cvat.zip", "cvat"),
    "coco": lambda run: (run.export("coco") / "coco.json", "coco"),
    "fiftyone": lambda run: (run.export("fiftyone") / "labels.json", "coco"),
    "masks": lambda run: (run.export("masks"), "masks"),
    "qupath": lambda run: (run.export("qupath"), "geojson"),
    "qupath, other names": through_geojson,
}


@pytest.mark.parametrize("route", ROUTES)
def test_equal_pixels_come_back(run, route, capsys):
    source, format_name = ROUTES[route](run)
    name = f"from {route}/corrected.{'parquet' if route == 'brush' else 'csv'}"
    path = run.read(source, format_name, "--json", name=name)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["accepted"], found["refused"], found["corrected"]) == (len(run.masks), 0, 0)
    assert all(prompt["dice_mean"] == prompt["dice_median"] == 1 for prompt in found["prompts"].values())
    records = read_dataset("new", str(path))
    reader = ExampleReader(DatasetSettings())
    assert len(records) == len(run.masks)
    for record in records:
        image_id = record.image_uri.removeprefix(f"{run.folder}/in/")
        expected = run.masks[image_id, record.prompt]
        assert record.is_negative == (not expected.any())
        np.testing.assert_array_equal(reader.read(record).target.mask, expected)


def test_the_list_has_the_columns_of_the_list_before(run):
    for name in ("columns/a.csv", "columns/a.parquet", "columns/a.jsonl"):
        path = run.read(run.export("masks"), "masks", name=name)
        if name.endswith("csv"):
            rows = list(csv.DictReader(path.open(newline="")))
        elif name.endswith("parquet"):
            rows = pq.read_table(path).to_pylist()
        else:
            rows = [json.loads(line) for line in path.read_text().splitlines()]
        row = next(row for row in rows if (row["image_id"], row["prompt"]) == ("drawn/islands.png", "polyp"))
        assert (row["patient_id"], str(row["age"]), row["outcome"]) == ("001", "42", "accepted")
        assert row["mask_uri"] == "a_masks/drawn/islands.png.polyp.png"
        assert float(row["prediction_dice"]) == 1
    records = read_dataset("new", str(path))
    assert {record.group for record in records} == {""}


def test_yolo_as_ultralytics_fills_it(run):
    import cv2

    folder = run.export("yolo")
    assert '  0: "polyp"' in (folder / "data.yaml").read_text()
    for number, prompt in enumerate(PROMPTS):
        for (image_id, known), expected in run.masks.items():
            if known != prompt:
                continue
            lines = (folder / "labels" / image_id).with_suffix(".txt").read_text().splitlines()
            height, width = expected.shape
            filled = np.zeros(expected.shape, np.uint8)
            for label, *shares in (line.split() for line in lines):
                if int(label) == number:
                    corners = np.array(shares, np.float64).reshape(-1, 2)
                    assert len(corners) >= 3 and (0 <= corners).all() and (corners <= 1).all()
                    cv2.fillPoly(filled, [(corners * (width, height)).astype(np.int32)], 1)
            np.testing.assert_array_equal(filled, expected)


def test_voc_has_the_label_maps_and_their_names(run):
    folder = run.export("voc")
    names = (folder / "ImageSets/Segmentation/train.txt").read_text().splitlines()
    assert len(names) == len({image_id for image_id, _ in run.masks})
    for image_id in ("drawn/rings.png", "empty, all.png"):
        with Image.open(folder / "SegmentationClass" / image_id) as picture:
            assert picture.mode == "P" and image_id.removesuffix(".png") in names
            np.testing.assert_array_equal(np.asarray(picture) == 1, run.masks[image_id, "polyp"] == 1)
    lines = (folder / "labelmap.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["background", *PROMPTS]


def test_fiftyone_finds_each_image_and_the_zip_of_cvat_has_no_images(run):
    folder = run.export("fiftyone")
    places = json.loads((folder / "data.json").read_text())
    images = json.loads((folder / "labels.json").read_text())["images"]
    assert {image["file_name"]: f"{run.folder}/in/{image['file_name']}" for image in images} == places
    with zipfile.ZipFile(run.export("cvat") / "cvat.zip") as archive:
        assert archive.namelist() == ["annotations/instances_default.json", "images/"]
    labels = json.loads((run.folder / "cvat/labels.json").read_text())
    assert [label["name"] for label in labels] == list(PROMPTS)


def test_geojson_has_the_area_of_the_masks_and_a_class_for_each_prompt(run):
    folder = run.export("qupath")
    collection = json.loads((folder / "drawn/rings.png.geojson").read_text())
    polyp, *_ = collection["features"]
    assert polyp["properties"]["classification"]["name"] == "polyp"
    assert polyp["properties"]["metadata"] == {"patient_id": "000", "age": "40"}
    area = 0
    for polygon in polyp["geometry"]["coordinates"]:
        for ring in polygon:
            x, y = np.array(ring[:-1]).T
            area += (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2
            assert ring[0] == ring[-1]
    assert area == run.masks["drawn/rings.png", "polyp"].sum()


def test_a_prefix_that_no_image_has_is_told(run, caplog):
    words = [f"--link-prefix={run.folder}/{name}=https://a/" for name in ("inn/", "in/", "in/drawn/")]
    run.export("label-studio", *words)
    (told,) = [record.getMessage() for record in caplog.records if "--link-prefix" in record.getMessage()]
    assert told.startswith(f"--link-prefix: no link begins with {run.folder}/inn/; the first one is {run.folder}/in/")


def test_tasks_have_links_scores_and_columns_and_no_secret(run):
    prefix = f"{run.folder}/in/"
    folder = run.export("label-studio", "--link-prefix", f"{prefix}=/data/local-files/?d=scans/")
    (file,) = folder.glob("tasks-*.json")
    tasks = {task["data"]["image_id"]: task for task in json.loads(file.read_text())}
    task = tasks["empty, all.png"]
    assert task["data"]["image"] == "/data/local-files/?d=scans/empty%2C%20all.png"
    assert task["data"]["prompts"] == list(PROMPTS) and task["predictions"][0]["result"] == []
    task = tasks["drawn/noise.png"]
    assert (task["data"]["patient_id"], task["data"]["age"]) == ("000", 41)
    (prediction,) = task["predictions"]
    assert (prediction["score"], prediction["model_version"]) == (0.51, "m")
    assert [region["value"]["brushlabels"] for region in prediction["result"]] == [[prompt] for prompt in PROMPTS]
    assert all(region["value"]["format"] == "rle" for region in prediction["result"])


def test_the_labelling_interface_is_xml_with_all_prompts(run):
    import xml.etree.ElementTree as ElementTree

    tree = ElementTree.parse(run.export("label-studio") / "labeling_interface.xml")
    for tag in ("BrushLabels", "PolygonLabels"):
        group = tree.find(tag)
        assert group.get("toName") == "image" == tree.find("Image").get("name")
        assert [label.get("value") for label in group] == list(PROMPTS)
