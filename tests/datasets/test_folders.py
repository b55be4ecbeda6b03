import json
import logging

import numpy as np
import pytest
from PIL import Image

from tests.conftest import SHARED
from vlsm import storage
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.read import read_dataset
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ConfigError, ManifestError

DATA = SHARED / "data"
KVASIR = DatasetSettings(prompts={"kvasir": "polyp"})


def write(folder, *names, value=255):
    """Write small images; those with a word for masks in the path have one bright row."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((4, 6), np.uint8)
        pixels[1] = value
        Image.fromarray(pixels).save(path)


def triples(records, folder):
    return [
        (record.split, record.image_uri.removeprefix(f"{folder}/"), record.mask_uri.removeprefix(f"{folder}/"))
        for record in records
    ]


def test_a_folder_as_it_is_published_is_read(tmp_path):
    write(tmp_path, "images/b.jpg", "images/a.jpg", "masks/a.png", "masks/b.png")
    (tmp_path / "SOURCE.txt").write_text("a text")
    records = read_dataset("kvasir", str(tmp_path), KVASIR)
    assert triples(records, tmp_path) == [("", "images/a.jpg", "masks/a.png"), ("", "images/b.jpg", "masks/b.png")]
    assert all((record.dataset, record.prompts) == ("kvasir", {"p1": ("polyp",)}) for record in records)
    assert [record.where for record in records] == [f"{tmp_path}, images/{name}.jpg" for name in "ab"]
    assert ExampleReader(KVASIR).read(records[0]).target.mask.sum() == 6


def test_a_prompt_for_a_dataset_does_not_replace_those_of_records(tmp_path, caplog):
    write(tmp_path, "a.png", "m.png")
    (tmp_path / "list.csv").write_text("image_uri,mask_uri,prompt\na.png,m.png,fold\na.png,m.png,\n")
    records = read_dataset("kvasir", str(tmp_path / "list.csv"), KVASIR)
    assert [record.prompts["p1"] for record in records] == [("fold",), ("polyp",)]
    assert not caplog.text
    (tmp_path / "list.csv").write_text("image_uri,mask_uri,prompt\na.png,m.png,fold\n")
    assert read_dataset("kvasir", str(tmp_path / "list.csv"), KVASIR)[0].prompts == {"p1": ("fold",)}
    assert "data.prompts.kvasir is not used: all records have a prompt of their own" in caplog.text


def test_a_prompt_for_a_dataset_stands_beside_an_empty_one(tmp_path):
    write(tmp_path, "images/a.png", "masks/a.png")
    (tmp_path / "anns").mkdir()
    row = {"img_name": "a.png", "mask_name": "a.png", "prompts": {"p0": ""}}
    (tmp_path / "anns" / "val.json").write_text(json.dumps([row]))
    (record,) = read_dataset("kvasir", str(tmp_path), KVASIR)
    assert record.prompts == {"p0": ("",), "p1": ("polyp",)}


def test_numbered_masks_beside_their_image_are_one_mask(tmp_path):
    write(tmp_path, "benign/b (1).png", "benign/b (1)_mask.png", "benign/b (1)_mask_1.png")
    other = np.zeros((4, 6), np.uint8)
    other[:, 0] = 255
    Image.fromarray(other).save(tmp_path / "benign" / "b (1)_mask_1.png")
    (record,) = read_dataset("busi", str(tmp_path))
    assert ExampleReader(KVASIR).read(record).target.mask.sum() == 6 + 3


def test_nnunets_layout_and_its_classes_are_read(tmp_path, caplog):
    write(tmp_path, "imagesTr/a_0000.png", "imagesTr/a_0001.png", "labelsTr/a.png", "imagesTs/b_0000.png", value=2)
    labels = {"background": 0, "colon_polyp": 1, "whole": [1, 2], "ignore": 3}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    with caplog.at_level(logging.INFO, "vlsm"):
        records = read_dataset("kvasir", str(tmp_path))
    assert [(record.prompts["p1"], record.labels) for record in records] == [
        (("colon polyp",), (1,)),
        (("whole",), (1, 2)),
    ]
    assert triples(records[:1], tmp_path) == [("train", "imagesTr/a_0000.png", "labelsTr/a.png")]
    reader = ExampleReader(KVASIR)
    assert [int(reader.read(record).target.mask.sum()) for record in records] == [0, 6]
    assert "1 image of split test without masks: left out" in caplog.text
    assert "only the first channel of each image is read, not imagesTr/a_0001.png" in caplog.text
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "2": "polyp"}}))  # version 1
    (record,) = read_dataset("kvasir", str(tmp_path))
    assert (record.prompts, record.labels) == ({"p1": ("polyp",)}, (2,))
    (tmp_path / "dataset.json").write_text("[1]")
    with pytest.raises(ManifestError, match="dataset.json is no dataset.json of nnU-Net"):
        read_dataset("kvasir", str(tmp_path))


def test_images_without_masks_are_told_and_left_out_on_request(tmp_path, caplog):
    write(tmp_path, *(f"images/{number}.png" for number in range(9)), "masks/0.png", "masks/x.png")
    message = r"no mask for 8 of 9 images \(images/1.png, .*images/5.png and 3 more\); --set data.skip_unpaired=true"
    with pytest.raises(ManifestError, match=message + r".*no image for 1 mask \(masks/x.png\)"):
        read_dataset("kvasir", str(tmp_path))
    (record,) = read_dataset("kvasir", str(tmp_path), DatasetSettings(skip_unpaired=True))
    assert record.image_uri.endswith("images/0.png")
    assert "no mask for 8 of 9 images: left out (data.skip_unpaired): images/1.png" in caplog.text


def test_links_to_folders_are_followed_and_circles_are_not(tmp_path):
    write(tmp_path, "there/images/a.png", "there/masks/a.png")
    (tmp_path / "here").mkdir()
    for name in ("images", "masks"):
        (tmp_path / "here" / name).symlink_to(tmp_path / "there" / name)
        (tmp_path / "there" / name / "circle").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "broken").symlink_to(tmp_path / "nowhere")
    (record,) = read_dataset("kvasir", str(tmp_path / "here"))
    assert record.image_uri == f"{tmp_path}/here/images/a.png"


def test_two_images_of_one_name_are_refused(tmp_path):
    write(tmp_path, "images/a.png", "images/a.jpg", "images/b.png", "masks/b.png")
    with pytest.raises(ManifestError, match="images/a.jpg and images/a.png compete for one name"):
        read_dataset("kvasir", str(tmp_path), DatasetSettings(skip_unpaired=True))


def test_hidden_files_are_no_images_and_what_is_not_read_is_told(tmp_path, caplog):
    write(tmp_path, "images/a.png", "masks/a.png", "edges/a.png", "images/.thumbs/a.png", "__MACOSX/images/b.png")
    (tmp_path / "images" / "._a.png").write_bytes(b"x")
    (tmp_path / "list.csv").write_text("image_uri,mask_uri\n")
    with caplog.at_level(logging.INFO, "vlsm"):
        assert len(read_dataset("kvasir", str(tmp_path))) == 1
    assert "files in no folder for images or masks are not read: edges/a.png" in caplog.text
    assert "files that are no images are not read: 1 .csv" in caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "it has no files"),
        (["a.png", "b.png", "c/d.jpg"], r"it has 2 \.png in it, 1 \.jpg in c\."),
        (["images/a.png", "masks/b.png"], "no image and mask have equal names: images/a.png; masks/b.png"),
        (["images/a.png", "masks/a.png", "masks/a.jpg"], "masks/a.jpg and masks/a.png compete for one name"),
    ],
)
def test_a_folder_that_is_no_dataset_is_described(tmp_path, names, message):
    write(tmp_path, *names)
    with pytest.raises(ConfigError, match=rf"has none of the known layouts: {message}.*Known are: anns/"):
        read_dataset("kvasir", str(tmp_path))


def test_masks_that_no_one_reads_are_named(tmp_path):
    write(tmp_path, "images/a.png")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.npy").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"it has 1 \.png in images, 1 \.npy in masks"):
        read_dataset("kvasir", str(tmp_path))


def test_a_file_that_is_no_list_is_named(tmp_path):
    write(tmp_path, "a.png")
    with pytest.raises(ConfigError, match="a.png' is no folder, no list"):
        read_dataset("kvasir", str(tmp_path / "a.png"))


def test_a_store_is_read_as_a_disk(tmp_path, s3_folder):
    names = ["train/images/a b.jpg", "train/images/c#1.jpg", "train/masks/a b_mask.png", "train/masks/c#1_mask.png"]
    write(tmp_path, *names)
    for name in names:
        storage.write_bytes(f"{s3_folder}/{name}", (tmp_path / name).read_bytes())
    on_disk, stored = (read_dataset("kvasir", uri, KVASIR) for uri in (str(tmp_path), s3_folder))
    assert triples(on_disk, tmp_path) == triples(stored, s3_folder)
    assert len(stored) == 2 and stored[0].image_uri == f"{s3_folder}/train/images/a b.jpg"
    assert all(ExampleReader(KVASIR).read(record).target.mask.sum() == 6 for record in stored)


@pytest.mark.skipif(not DATA.exists(), reason="the real images lie outside the repository")
@pytest.mark.parametrize("name", ["busi", "cvc_clinicdb", "dsb2018_nuclei", "kvasir_seg"])
def test_published_folders_without_their_annotations_have_the_same_pairs(tmp_path, name):
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
        for path in (DATA / name / part).iterdir():
            (tmp_path / part / path.name).symlink_to(path)
    records = read_dataset(name, str(tmp_path))
    listed = read_dataset(name, str(DATA / name))

    def pairs(records):
        return {(record.image_uri.rsplit("/", 1)[1], record.mask_uri.rsplit("/", 1)[1]) for record in records}

    assert pairs(records) == pairs(listed)
