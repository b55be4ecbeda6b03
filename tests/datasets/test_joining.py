from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.joining import find_several_masks, join_masks
from vlsm.datasets.read import read_dataset
from vlsm.datasets.records import Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ManifestError

FIRST = Record("d", "train", "1", "a.png", "m1.png", {"p0": ("",), "p1": ("tumour",), "p2": ("left tumour",)})
SECOND = replace(FIRST, where="2", mask_uri="m2.png", prompts=FIRST.prompts | {"p2": ("right tumour",)})
OTHERS = {
    "another prompt": replace(SECOND, prompts={"p1": ("cyst",)}),
    "another image": replace(SECOND, image_uri="b.png"),
    "another slice": replace(SECOND, image_selector="slice=2"),
    "another split": replace(SECOND, split="val"),
    "another dataset": replace(SECOND, dataset="e"),
}


@pytest.fixture
def listed(tmp_path):
    for name, columns in (("m1.png", slice(0, 2)), ("m2.png", slice(3, 4))):
        pixels = np.zeros((3, 5), np.uint8)
        pixels[:, columns] = 255
        Image.fromarray(pixels).save(tmp_path / name)
    Image.new("RGB", (5, 3)).save(tmp_path / "a.png")
    rows = "a.png,m1.png,train,tumour\na.png,m2.png,train,tumour\n"
    (tmp_path / "list.csv").write_text("image_uri,mask_uri,split,prompt\n" + rows)
    return str(tmp_path / "list.csv")


def test_several_masks_of_one_image_and_prompt_are_told(listed, caplog):
    assert len(read_dataset("busi", listed)) == 2
    assert "dataset busi: several masks in 1 record, such as" in caplog.text
    assert "row 2: " in caplog.text and "row 1 has the same image and prompt, but another mask" in caplog.text
    assert "--set data.join_masks=true" in caplog.text


def test_joined_masks_are_one_mask(listed, caplog):
    (record,) = read_dataset("busi", listed, DatasetSettings(join_masks=True))
    assert ExampleReader(DatasetSettings()).read(record).target.mask.tolist() == [[1, 1, 0, 1, 0]] * 3
    assert not caplog.text


def test_prompts_that_describe_one_of_the_masks_do_not_stay():
    (joined,) = join_masks([FIRST, SECOND])
    assert joined == replace(FIRST, more_masks=("m2.png",), prompts={"p0": ("",), "p1": ("tumour",)})
    assert [index for _, index, _ in find_several_masks([FIRST, SECOND])] == [1]


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_records_of_other_images_or_prompts_stay_apart(other):
    assert join_masks([FIRST, other]) == [FIRST, other]
    assert not list(find_several_masks([FIRST, other]))


def test_the_same_mask_twice_is_no_case_of_several_masks():
    again = replace(FIRST, where="2")
    assert not list(find_several_masks([FIRST, again]))
    assert join_masks([FIRST, again]) == [FIRST]


def test_labels_of_one_mask_file_are_joined():
    one, two = replace(FIRST, labels=(1,)), replace(FIRST, where="2", labels=(2, 3))
    assert join_masks([one, two]) == [replace(FIRST, labels=(1, 2, 3))]


def test_run_lengths_are_joined():
    masks = [np.asfortranarray(np.eye(4, dtype=np.uint8)), np.asfortranarray(np.eye(4, dtype=np.uint8)[::-1])]
    records = [
        replace(FIRST, where=str(number), mask_rle=coco.encode(mask)["counts"].decode(), mask_size=(4, 4))
        for number, mask in enumerate(masks)
    ]
    (joined,) = join_masks(records)
    np.testing.assert_array_equal(ExampleReader(DatasetSettings()).read_mask(joined).mask, masks[0] | masks[1])


@pytest.mark.parametrize(
    "other",
    [
        replace(SECOND, labels=(1,)),
        replace(SECOND, mask_selector="slice=1"),
        replace(SECOND, mask_rle="04", mask_size=(2, 2)),
    ],
)
def test_masks_of_different_kinds_are_not_joined(other):
    with pytest.raises(ManifestError, match="1: the masks of a.png cannot be joined"):
        join_masks([FIRST, other])
