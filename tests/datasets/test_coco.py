"""Datasets in the format of COCO. The masks are compared with those of pycocotools."""

import io
import json
from contextlib import redirect_stdout

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO

from tests.conftest import save_square
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.inspection import examples_table, inspect_record, records_from_table
from vlsm.datasets.read import read_dataset
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ConfigError, ImageError, ManifestError
from vlsm.export.__main__ import main as export_main
from vlsm.runs.results import write_part
from vlsm.segmentation.masks import encode_mask

SIZE = 30, 40
RING = np.zeros(SIZE, np.uint8)
RING[5:20, 10:30] = 1
RING[8:12, 15:20] = 0
PACKED = {"size": list(SIZE), "counts": encode_mask(RING)}
CORNERS = [[2.5, 3.0, 20.25, 4.0, 15.0, 25.5], [30, 1, 39.9, 1, 39.9, 12, 30, 12]]


def unpack(mask):
    """The uncompressed run lengths of a mask."""
    pixels = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(pixels)) + 1
    counts = np.diff(np.concatenate([[0], edges, [pixels.size]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if pixels[0] else counts}


def describe(*segmentations, image_id=1, category_id=1, **more):
    return [
        {"id": number, "image_id": image_id, "category_id": category_id, "segmentation": segmentation} | more
        for number, segmentation in enumerate(segmentations, start=1)
    ]


def content(annotations, names=("a.png",), categories=("polyp", "instrument")):
    return {
        "images": [
            {"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
            for number, name in enumerate(names, start=1)
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(categories, start=1)],
    }


def save(path, made, *images):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made))
    for image in images:
        image.parent.mkdir(parents=True, exist_ok=True)
        save_square(image, size=SIZE)
    return str(path)


def masks(records, **settings):
    reader = ExampleReader(DatasetSettings(**settings))
    return [reader.read(record).target.mask for record in records]


def judge(path):
    """The mask of each annotation, as pycocotools makes it."""
    with redirect_stdout(io.StringIO()):
        opened = COCO(path)
    return [opened.annToMask(annotation) for annotation in opened.dataset["annotations"]]


@pytest.mark.parametrize(
    "segmentation",
    [
        CORNERS,
        CORNERS[:1],
        [[-3.0, -2, 10, -2, 10, 10, -3, 45]],
        PACKED,
        unpack(RING),
        unpack(1 - RING),
        {"size": list(SIZE), "counts": encode_mask(np.zeros(SIZE))},
    ],
)
def test_a_mask_is_that_of_pycocotools(tmp_path, segmentation):
    path = save(tmp_path / "x.json", content(describe(segmentation)), tmp_path / "a.png")
    [record] = read_dataset("mine", path)
    np.testing.assert_array_equal(masks([record])[0], judge(path)[0])


def test_annotations_of_one_category_are_joined_and_categories_are_prompts(tmp_path):
    annotations = [
        *describe(CORNERS[:1], PACKED),
        *describe(unpack(RING), image_id=2, category_id=2, iscrowd=1),
        *describe(CORNERS[1:]),
        *describe(CORNERS[1:], category_id=3),
    ]
    made = content(annotations, ["a.png", "sub\\b.png"], ["polyp", "instrument", "polyp"])
    path = save(tmp_path / "x.json", made, tmp_path / "a.png", tmp_path / "sub" / "b.png")
    first, second = read_dataset("mine", path)
    assert (first.prompts, first.image_uri, first.mask_uri) == ({"p1": ("polyp",)}, f"{tmp_path}/a.png", path)
    assert (second.prompts, second.image_uri) == ({"p1": ("instrument",)}, f"{tmp_path}/sub/b.png")
    assert (first.dataset, first.where) == ("mine", f"{path}, image 1, category 'polyp'")
    judged, (joined, crowd) = judge(path), masks([first, second])
    np.testing.assert_array_equal(joined, judged[0] | judged[1] | judged[3] | judged[4])
    np.testing.assert_array_equal(crowd, RING)


@pytest.mark.parametrize(
    ("file", "image", "split"),
    [
        ("annotations/instances_train2017.json", "train2017/a.png", "train"),
        ("annotations/instances_val.json", "images/val/a.png", "val"),
        ("annotations/instances_default.json", "images/default/a.png", ""),
        ("annotations/instances_trainval.json", "images/a.png", ""),
        ("annotations/test.json", "a.png", "test"),
        ("valid/_annotations.coco.json", "valid/a.png", "val"),
        ("annotations.json", "images/a.png", ""),
        ("coco.json", "data/a.png", ""),
    ],
)
def test_folders_of_the_usual_layouts(tmp_path, file, image, split):
    save(tmp_path / file, content(describe(CORNERS)), tmp_path / image)
    [record] = read_dataset("mine", str(tmp_path))
    assert (record.split, record.image_uri) == (split, f"{tmp_path}/{image}")
    assert read_dataset("mine", str(tmp_path / file)) == [record]


def test_records_survive_their_table(tmp_path):
    path = save(tmp_path / "x.json", content(describe(CORNERS)), tmp_path / "a.png")
    records = read_dataset("mine", path, DatasetSettings(absent_classes="empty"))
    table = examples_table(records, [inspect_record(record, ExampleReader(DatasetSettings())) for record in records])
    assert records_from_table(table) == records


def test_a_folder_with_several_files(tmp_path):
    for split in ("train", "valid", "test"):
        save(tmp_path / split / "_annotations.coco.json", content(describe(CORNERS)), tmp_path / split / "a.png")
    assert [record.split for record in read_dataset("mine", str(tmp_path))] == ["train", "val", "test"]
    assert len({record.image_uri for record in read_dataset("mine", str(tmp_path))}) == 3


def test_other_annotations_beside_the_instances_do_not_count(tmp_path):
    save(tmp_path / "annotations" / "instances_train.json", content(describe(CORNERS)), tmp_path / "train" / "a.png")
    save(tmp_path / "annotations" / "captions_train.json", {"annotations": []})
    assert len(read_dataset("mine", str(tmp_path))) == 1


def test_the_images_may_be_elsewhere_if_the_settings_say_so(tmp_path):
    path = save(tmp_path / "labels" / "x.json", content(describe(CORNERS)), tmp_path / "pictures" / "a.png")
    with pytest.raises(ManifestError, match=r"'a.png', are in none of the folders .*; data.image_folders names"):
        read_dataset("mine", path)
    [record] = read_dataset("mine", path, DatasetSettings(image_folders={"mine": str(tmp_path / "pictures")}))
    assert record.image_uri == f"{tmp_path}/pictures/a.png"


def test_absent_classes_are_left_out_and_counted_or_empty(tmp_path, caplog):
    caplog.set_level("INFO")
    made = content(describe(CORNERS), ["a.png", "normal.png"])
    path = save(tmp_path / "x.json", made, tmp_path / "a.png", tmp_path / "normal.png")
    assert [record.prompts["p1"] for record in read_dataset("mine", path)] == [("polyp",)]
    assert "1 of 2 images have no annotations; they are left out (data.absent_classes=empty keeps" in caplog.text
    records = read_dataset("mine", path, DatasetSettings(absent_classes="empty"))
    assert [record.prompts["p1"][0] for record in records] == ["polyp", "instrument"] * 2
    assert [bool(mask.any()) for mask in masks(records)] == [True, False, False, False]


def test_an_image_whose_size_differs_is_named_when_it_is_read(tmp_path):
    path = save(tmp_path / "x.json", content(describe(CORNERS)))
    Image.new("RGB", (40, 31)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="different sizes, 40 x 31 and 40 x 30"):
        masks(read_dataset("mine", path))


@pytest.mark.parametrize(
    "name",
    ["../a.png", "/etc/passwd", "b/../../a.png", "s3://bucket/a.png", "file:///a", "C:\\a.png", "..\\a", "", None],
)
def test_no_image_lies_outside_of_the_folder(tmp_path, name):
    path = save(tmp_path / "x.json", content(describe(CORNERS), [name]))
    with pytest.raises(ManifestError, match="image 1: file_name is"):
        read_dataset("mine", path)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 2, 3, 4]], "x and y of three or more corners"),
        ([[1, 2, 3, 4, 5, 6, 7]], "x and y of three or more corners"),
        ([["a"] * 6], "x and y of three or more corners"),
        ([1, 2, 3, 4, 5, 6], "x and y of three or more corners"),
        ([[1, 2, 3, 4, 5, 1e9]], "far outside of the image of 40 x 30"),
        ([[0, 0, 40, 30] * 20_000], "an outline of 1,600,000 pixels; 1,000,000 are read"),
        ([[1, 2, 3, 4, 5, float("nan")]], "far outside of the image of 40 x 30"),
        ("x", "must be polygons or run lengths"),
        (None, "must be polygons or run lengths"),
        (PACKED | {"size": [40, 30]}, r"have the size \[40, 30\]; the image has the height 30, width 40"),
        (unpack(RING) | {"counts": [1, 2]}, "have 3 of 1,200 pixels"),
        (unpack(RING) | {"counts": [1201, -1]}, "are damaged"),
        (PACKED | {"counts": PACKED["counts"][:-3]}, "pixels"),
        (PACKED | {"counts": "~~~"}, "are damaged"),
        (PACKED | {"counts": ""}, "have 0 of 1,200 pixels"),
        (PACKED | {"counts": None}, "are damaged"),
    ],
)
def test_a_wrong_segmentation_is_named(tmp_path, segmentation, message):
    path = save(tmp_path / "x.json", content([*describe(CORNERS), *describe(segmentation)]), tmp_path / "a.png")
    with pytest.raises(ManifestError, match=f"x.json, annotation 2: .*{message}"):
        read_dataset("mine", path)


def test_boxes_without_masks_are_counted(tmp_path):
    boxes = describe([], None, bbox=[1, 2, 3, 4])
    path = save(tmp_path / "x.json", content([*describe(CORNERS), *boxes]), tmp_path / "a.png")
    with pytest.raises(ManifestError, match="2 of 3 annotations have a box but no segmentation, the first is number 2"):
        read_dataset("mine", path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": describe(CORNERS, image_id=7)}, "annotation 1: image_id is 7; there is no valid one"),
        ({"annotations": describe(CORNERS, category_id=[1])}, r"annotation 1: category_id is \[1\]"),
        ({"annotations": ["x"]}, "annotation 1: image_id is None"),
        ({"categories": [{"id": 1}]}, "category 1: it needs an id of its own and a name"),
        ({"categories": [{"id": 1, "name": "\ud800"}]}, "category 1: it needs an id of its own and a name"),
        ({"images": [3]}, "image 1: its id is None"),
        ({"images": content([])["images"] * 2}, "image 2: its id is 1; every image needs an id of its own"),
        ({"images": [{"id": 1, "file_name": "a.png"}]}, "image 1: its height and width are None and None"),
        ({"images": [{"id": 1, "file_name": "a", "height": 10**6, "width": 10**6}]}, "at most data.max_pixels"),
        ({"images": {}}, "not in the format of COCO: it has no list of images"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, change, message):
    path = save(tmp_path / "x.json", content(describe(CORNERS)) | change, tmp_path / "a.png")
    with pytest.raises(ManifestError, match=message):
        read_dataset("mine", path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[" * 99_999, "is not JSON"), ("[]", "not in the format"), ("", "empty")],
    ids=["cut", "deep", "list", "empty"],
)
def test_a_file_that_is_not_coco_is_named(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ManifestError, match=message):
        read_dataset("mine", str(tmp_path / "x.json"))


def test_a_large_file_is_not_read(tmp_path):
    path = save(tmp_path / "x.json", content(describe(CORNERS)), tmp_path / "a.png")
    with pytest.raises(ManifestError, match="max_image_bytes is 100"):
        read_dataset("mine", path, DatasetSettings(max_image_bytes=100))


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_dataset("mine", str(tmp_path / "x.json"))


def test_our_own_export_is_a_dataset_again(tmp_path):
    """With the images beside it. One of the masks is empty, so it has no annotation."""
    (tmp_path / "in").mkdir()
    rows, expected = [], {}
    for number, prompt in enumerate(["polyp", "instrument", "polyp"]):
        save_square(tmp_path / "in" / f"{number}.png", size=SIZE)
        mask = np.roll(RING, number, axis=1) * (number < 2)
        expected[f"{number}.png", prompt] = mask
        row = {"image_id": str(number), "image_uri": f"{tmp_path}/in/{number}.png", "selector": None, "prompt": prompt}
        row |= {"height": SIZE[0], "width": SIZE[1], "mask_rle": encode_mask(mask), "area_px": int(mask.sum())}
        rows.append(row | {"kind": "mask", "confidence": 0.5, "model": "m", "status": "ok"})
    write_part(str(tmp_path / "out"), 0, rows, "run", 0)
    record = {"config": {"input": str(tmp_path / "in"), "prompts": ["polyp", "instrument"]}, "plan": {}}
    (tmp_path / "out" / "config.yaml").write_text(yaml.safe_dump(record))
    assert export_main([str(tmp_path / "out"), str(tmp_path / "exported"), "--format", "coco"]) == 0
    settings = DatasetSettings(absent_classes="empty", image_folders={"mine": str(tmp_path / "in")})
    records = read_dataset("mine", str(tmp_path / "exported"), settings)
    assert len(records) == 6
    for record, mask in zip(records, masks(records), strict=True):
        key = record.image_uri.rpartition("/")[2], record.prompts["p1"][0]
        np.testing.assert_array_equal(mask, expected.get(key, np.zeros(SIZE)))


def test_the_mask_of_a_large_polygon_is_that_of_pycocotools():
    """Its corners are on a circle; only run lengths are kept."""
    from vlsm.datasets.coco_shapes import encode_segmentation, join

    angles = np.linspace(0, 2 * np.pi, 5000)
    corners = np.column_stack([4000 + 3900 * np.cos(angles), 4000 + 4500 * np.sin(angles)]).ravel().tolist()
    counts = join([encode_segmentation([corners], (8000, 8000), "x")], (8000, 8000))
    assert counts == coco.merge(coco.frPyObjects([corners], 8000, 8000))["counts"].decode()
