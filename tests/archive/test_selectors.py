"""Lists that name images inside of files by their selectors."""

import io
import json
import re
import zipfile

import nibabel
import numpy as np
import pytest
from PIL import Image

from vlsm.archive.archive import open_archive
from vlsm.config import RunSettings, SegmentSettings
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.read import read_dataset
from vlsm.datasets.settings import DatasetSettings
from vlsm.images.formats import Look
from vlsm.images.reader import Reader

VOLUME = np.zeros((6, 5, 4), np.uint8) + 10 * np.arange(4, dtype=np.uint8)


def grey_png(value):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (value, value, value)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A volume whose slices have the values 0, 10, 20 and 30, and a zip with two images."""
    nibabel.Nifti1Image(VOLUME, np.eye(4)).to_filename(tmp_path / "volume.nii.gz")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for value in (50, 60):
            archive.writestr(f"in/{value}.png", grey_png(value))
    (tmp_path / "single.png").write_bytes(grey_png(70))
    (tmp_path / "broken.nii").write_bytes(b"no volume")
    return tmp_path


def read_list(folder, rows):
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    archive = open_archive(str(folder / "list.jsonl"), ("default",), look=Look())
    rows = list(archive.rows)
    assert not archive.skipped
    return rows


def test_a_row_with_a_selector_stands_for_this_image(folder):
    rows = read_list(
        folder,
        [
            {"image_uri": "volume.nii.gz", "selector": "slice=2", "image_id": "two", "prompts": ["a", "b"]},
            {"image_uri": "volume.nii.gz", "selector": "slice=0"},
            {"image_uri": "images.zip", "selector": "in/60.png"},
            {"image_uri": "single.png", "selector": None},
        ],
    )
    assert [row["image_id"] for row in rows] == [
        "two",
        "volume.nii.gz#slice=0",
        "images.zip#in/60.png",
        "single.png",
    ]
    assert [row["prompts"] for row in rows] == [["a", "b"], *[["default"]] * 3]
    assert [row["problem"] for row in rows] == [None] * 4
    settings = SegmentSettings(input="", output="", members=[{"checkpoint": ""}], window=(128, 256), run=RunSettings())
    reader = Reader(settings)
    contents = [reader.open(row) for row in rows]
    means = [content.decode(frame).pixels.mean() for content, frame in contents]
    assert means == pytest.approx([20, 0, 60, 70], abs=1)


def test_without_a_selector_a_row_stands_for_all_images_of_its_file(folder):
    rows = read_list(folder, [{"image_uri": "volume.nii.gz", "selector": None}])
    assert [row["selector"] for row in rows] == [f"slice={number}" for number in range(4)]


def test_a_labelled_list_names_slices_and_their_masks(folder):
    nibabel.Nifti1Image((VOLUME > 10).astype(np.uint8), np.eye(4)).to_filename(folder / "mask.nii.gz")
    rows = [
        {"image_uri": "volume.nii.gz", "selector": f"slice={number}", "split": "test", "mask_uri": "mask.nii.gz"}
        | {"mask_selector": f"slice={number}"}
        for number in range(4)
    ]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = read_dataset("d", str(folder / "labels.jsonl"))
    data = DatasetSettings(mask_threshold=0, window=(128, 256))
    examples = [ExampleReader(data).read(record) for record in records]
    assert [example.image.mean() for example in examples] == pytest.approx([0, 10, 20, 30], abs=1)
    assert [example.target.mask.mean() for example in examples] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("uri", "selector", "problem"),
    [
        ("volume.nii.gz", "slice=4", "missing: .*volume.nii.gz has no image slice=4"),
        ("images.zip", "../in/60.png", "missing: .*images.zip has no image"),
        ("single.png", "page=1", "missing: .*single.png has no image page=1"),
        ("broken.nii", "slice=0", "corrupt: .*broken.nii"),
    ],
)
def test_a_selector_of_no_image_is_a_row_that_says_so(folder, uri, selector, problem):
    (row,) = read_list(folder, [{"image_uri": uri, "selector": selector}])
    assert row["selector"] == selector
    assert re.match(problem, row["problem"])
