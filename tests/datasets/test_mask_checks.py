"""What masks say before a training: values, empty and full masks, orientation, several masks, small lesions."""

import numpy as np
import pytest
from PIL import Image

from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.inspection import check_facts, inspect_record
from vlsm.datasets.mask_checks import (
    describe_foreground,
    describe_values,
    find_useless_masks,
    list_values,
)
from vlsm.datasets.records import Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.images.preprocess import Square

SQUARE = np.zeros((16, 24), np.uint8)
SQUARE[4:10, 6:12] = 1
PROMPTS = {"p0": ("",), "p1": ("polyp",)}


@pytest.fixture
def inspect(tmp_path):
    """A function that writes one record per mask, each with its own image, and inspects the records."""

    def run(masks, *, ending=".png", square=None, orientation=None, changes=({},), **settings):
        records = []
        for number, mask in enumerate(masks):
            change = dict(changes[number % len(changes)])
            place = change.pop("image", number)
            image = np.random.default_rng(place).integers(0, 255, (*np.shape(mask), 3), np.uint8)
            exif = Image.Exif()
            if orientation:
                exif[0x0112] = orientation
                image = np.zeros((*change.pop("stored", image.shape[:2]), 3), np.uint8)
            Image.fromarray(image).save(tmp_path / f"{place}.jpg", exif=exif)
            Image.fromarray(mask).save(tmp_path / f"mask{number}{ending}")
            uris = str(tmp_path / f"{place}.jpg"), str(tmp_path / f"mask{number}{ending}")
            fields = {"dataset": "kvasir", "split": "train", "where": f"record {number}", "prompts": PROMPTS} | change
            records.append(Record(image_uri=uris[0], mask_uri=uris[1], **fields))
        reader = ExampleReader(DatasetSettings(**settings))
        return records, [inspect_record(record, reader, square) for record in records]

    return run


def kinds(records, facts):
    return [finding.kind for finding in check_facts(records, facts)]


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ([np.uint8([[0, 1], [255, 1]])], ((0, 1, 255), 3)),
        ([np.arange(256, dtype=np.uint8)], ((*range(15), 255), 256)),
        ([np.uint16([[0, 65535]]), np.uint16([[7, 0]])], ((0, 7, 65535), 3)),
        ([np.float32([[0.5, 2, -1]])], ((-1, 0.5, 2), 3)),
        ([np.bool_([[False, True]])], ((0, 1), 2)),
        ([], ((), 0)),
    ],
)
def test_the_distinct_values_of_masks_are_listed(stored, expected):
    assert list_values(stored) == expected


@pytest.mark.parametrize(
    ("values", "count", "words"),
    [
        ((0,), 1, "0"),
        ((0, 1), 2, "0 and 1"),
        ((0, 1, 2.5), 3, "0, 1 and 2.5"),
        ((0, 255), 256, "256 or more values from 0 to 255"),
    ],
)
def test_values_are_told_in_words(values, count, words):
    assert describe_values(values, count) == words


@pytest.mark.parametrize(
    ("masks", "threshold", "sentence"),
    [
        ([SQUARE] * 3, 127, "3 of 3 train masks are empty: the mask files hold 0 and 1, and values above "
         "data.mask_threshold=127 are foreground; --set data.mask_threshold=0"),
        ([SQUARE * 2 + 1] * 2, 0, "2 of 2 train masks are full: the mask files hold 1 and 3, and values above "
         "data.mask_threshold=0 are foreground; --set data.mask_threshold=1"),
        ([SQUARE * 0] * 2, 127, "2 of 2 train masks are empty: the mask files hold only 0, and values above "
         "data.mask_threshold=127 are foreground"),
        ([SQUARE * 0 + 255] * 2, 127, "2 of 2 train masks are full: the mask files hold only 255, and values above "
         "data.mask_threshold=127 are foreground"),
        ([np.arange(100, dtype=np.uint8)[None]] * 2, 127, "2 of 2 train masks are empty: the mask files hold 100 or "
         "more values from 0 to 99, and values above data.mask_threshold=127 are foreground; "
         "--set data.mask_threshold=49"),
        ([SQUARE] * 19 + [SQUARE * 255], 127, "19 of 20 train masks are empty: the mask files hold 0 and 1, and values "
         "above data.mask_threshold=127 are foreground; --set data.mask_threshold=0"),
    ],
)  # fmt: skip
def test_a_split_of_empty_or_full_masks_is_told_with_values_and_the_setting(inspect, masks, threshold, sentence):
    records, facts = inspect(masks, mask_threshold=threshold)
    assert find_useless_masks(records, facts, threshold) == [f"dataset kvasir: {sentence}"]


@pytest.mark.parametrize(
    ("masks", "ending", "threshold"),
    [
        ([SQUARE] * 3, ".png", 0),
        ([SQUARE * 0] * 9 + [SQUARE * 255], ".png", 127),  # normal images
        ([SQUARE * 0] * 39 + [SQUARE * 255], ".png", 127),  # slices of a volume
        ([SQUARE * 255] * 3, ".jpg", 127),  # noise of JPEG
    ],
)
def test_masks_with_foreground_are_not_refused(inspect, masks, ending, threshold):
    records, facts = inspect(masks, ending=ending, mask_threshold=threshold)
    assert find_useless_masks(records, facts, threshold) == []


def test_each_dataset_and_split_is_judged_by_itself(inspect):
    changes = [{"split": "train"}, {"split": "val"}, {"split": "test"}, {"split": "", "dataset": "other"}]
    records, facts = inspect([SQUARE * 255, SQUARE, SQUARE, SQUARE], changes=changes)
    heads = [sentence.partition(" are ")[0] for sentence in find_useless_masks(records, facts, 127)]
    assert heads == ["dataset kvasir: 1 of 1 val masks and 1 of 1 test masks", "dataset other: 1 of 1 masks"]


def test_most_masks_of_a_rare_class_are_empty(inspect):
    masks = [SQUARE] * 39 + [SQUARE * 3]
    records, facts = inspect(masks, changes=[{"labels": (3,)}])
    assert find_useless_masks(records, facts, 127) == []


def test_masks_of_classes_are_empty_without_their_value(inspect):
    records, facts = inspect([SQUARE], changes=[{"labels": (3,)}])
    (sentence,) = find_useless_masks(records, facts, 127)
    assert sentence.endswith(
        "1 of 1 train masks are empty: the mask files hold 0 and 1, and none of the values of the classes"
    )
    (finding,) = check_facts(records, facts)
    assert finding.message.endswith("mask0.png is of its class; it holds 0 and 1")


@pytest.mark.parametrize(
    ("mask", "ending", "changes", "threshold", "line"),
    [
        (SQUARE * 2, ".png", {}, 0, "masks hold 0 and 2; values above data.mask_threshold=0 are foreground: 2"),
        (SQUARE + np.eye(*SQUARE.shape, dtype=np.uint8) * 3, ".png", {}, 0,
         "masks hold 0, 1, 3 and 4; values above data.mask_threshold=0 are foreground: 1, 3 and 4; if these are "
         "classes: --set 'data.classes={1: NAME, 3: NAME, 4: NAME}'"),
        (SQUARE, ".png", {}, 127,
         "masks hold 0 and 1; values above data.mask_threshold=127 are foreground: none of these"),
        (SQUARE, ".png", {"labels": (1,)}, 127, "masks hold 0 and 1; the classes take 1 (polyp) as foreground"),
        (SQUARE, ".png", {"labels": (7,)}, 127,
         "masks hold 0 and 1; the classes take 7 (polyp) as foreground; 7 is in no mask"),
    ],
)  # fmt: skip
def test_a_line_tells_what_is_taken_as_foreground(inspect, mask, ending, changes, threshold, line):
    records, facts = inspect([mask], ending=ending, changes=[changes], mask_threshold=threshold)
    assert describe_foreground(records, facts, threshold) == [f"dataset kvasir: {line}"]


def test_the_noise_of_jpeg_masks_is_told_by_its_range(inspect):
    noisy = np.random.default_rng(0).integers(0, 255, (16, 24), np.uint8)
    records, facts = inspect([noisy], ending=".jpg")
    (line,) = describe_foreground(records, facts, 127)
    assert " or more values from 0 to 255; values above data.mask_threshold=127 are foreground" in line
    assert kinds(records, facts) == []


def test_an_empty_mask_is_told_with_its_values(inspect):
    (finding,) = check_facts(*inspect([SQUARE]))
    assert (finding.kind, finding.message.partition("mask0.png ")[2]) == (
        "empty mask",
        "is above data.mask_threshold; it holds 0 and 1",
    )


def test_one_image_and_one_prompt_with_different_masks_are_told(inspect):
    other = np.roll(SQUARE, 5) * 255
    records, facts = inspect([SQUARE * 255, other], changes=[{"image": 0}])
    (finding,) = check_facts(records, facts)
    assert (finding.kind, finding.where) == ("several masks", "record 1")
    assert "the prompt 'polyp' (p1) and another mask in record 0" in finding.message


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": {"p0": ("",), "p1": ("instrument",)}},
        {"split": "val"},
        {"image": 1},
        {"labels": (255,), "prompts": {"p1": ("instrument",)}},
    ],
)
def test_other_prompts_splits_and_images_may_have_other_masks(inspect, change):
    other = np.roll(SQUARE, 5) * 255
    found = kinds(*inspect([SQUARE * 255, other], changes=[{"image": 0}, {"image": 0} | change]))
    assert "several masks" not in found


def test_two_classes_of_one_mask_file_are_not_the_same_mask(inspect, tmp_path):
    """The same file, image and prompt with other labels: another mask, not a repetition."""
    records, _ = inspect([SQUARE * 255 + np.roll(SQUARE, 9)], changes=[{"labels": (1,)}])
    records.append(Record(**records[0].stated() | {"labels": (255,), "where": "record 1"}))
    reader = ExampleReader(DatasetSettings())
    assert kinds(records, [inspect_record(record, reader) for record in records]) == ["several masks"]


@pytest.mark.parametrize(
    ("orientation", "stored", "shape", "expected"),
    [
        (6, (16, 24), (16, 24), ["turned"]),  # the mask as the image is stored
        (6, (24, 16), (16, 24), []),  # the mask as the image is shown
        (6, (16, 16), (16, 16), ["kept"]),
        (3, (16, 24), (16, 24), ["kept"]),
        (1, (16, 24), (16, 24), []),
    ],
)
def test_turned_images_are_told_with_what_was_done(inspect, orientation, stored, shape, expected):
    mask = np.zeros(shape, np.uint8)
    mask[2:7, 3:9] = 255
    records, facts = inspect([mask], orientation=orientation, changes=[{"stored": stored}])
    assert kinds(records, facts) == expected


def test_a_lesion_that_vanishes_at_the_models_size_is_told(inspect):
    tiny = np.zeros((64, 64), np.uint8)
    tiny[1, 1] = 255
    masks = [tiny, np.kron(SQUARE, np.ones((4, 4), np.uint8)) * 255]
    (finding,) = check_facts(*inspect(masks, square=Square(16)))
    assert (finding.kind, finding.where) == ("vanishes at 16 pixels", "record 0")
    assert "has 1 foreground pixels at 64 x 64" in finding.message
    assert kinds(*inspect(masks)) == []
