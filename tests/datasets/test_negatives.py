"""Images without the finding: stated in every format, told apart from accidents, read as empty masks of their size."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.datasets.test_dicom_labels import slices
from vlsm.datasets.changes import add_versions as with_versions
from vlsm.datasets.changes import describe_changed_files, describe_changed_records, list_versions, renew_signatures
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.inspection import (
    check_facts,
    digest_examples,
    examples_table,
    inspect_record,
    records_from_table,
    require_foreground,
)
from vlsm.datasets.mask_checks import find_useless_masks
from vlsm.datasets.overview import _describe_masks
from vlsm.datasets.read import read_dataset
from vlsm.datasets.records import NO_MASK, locations_of
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ConfigError, ManifestError

SHAPE = (16, 24)


@pytest.fixture
def folder(tmp_path):
    """Two images, a mask of the first one, and an empty mask."""
    rng = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(0, 255, (*SHAPE, 3), np.uint8)).save(tmp_path / f"{name}.png")
    mask = np.zeros(SHAPE, np.uint8)
    Image.fromarray(mask).save(tmp_path / "empty.png")
    mask[4:12, 4:12] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def read(uri, **settings):
    return read_dataset("d", str(uri), DatasetSettings(**settings))


def inspect(records):
    reader = ExampleReader(DatasetSettings())
    return [inspect_record(record, reader) for record in records]


def write_list(folder, ending, rows):
    path = folder / f"list{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ending == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        delimiter = "," if ending == ".csv" else "\t"
        lines = [rows[0], *(row.values() for row in rows)]
        path.write_text("".join(delimiter.join(line) + "\n" for line in lines))
    return path


ROWS = [
    {"image_uri": "a.png", "mask_uri": "mask.png", "split": "train", "prompt": "polyp"},
    {"image_uri": "b.png", "mask_uri": "none", "split": "train", "prompt": "polyp"},
]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_list_says_none_instead_of_a_mask(folder, ending):
    positive, negative = read(write_list(folder, ending, ROWS))
    assert (positive.is_negative, negative.is_negative) == (False, True)
    assert negative.mask_uri == NO_MASK and locations_of(negative) == (f"{folder}/b.png",)
    example = ExampleReader(DatasetSettings()).read(negative)
    assert example.target.mask.shape == SHAPE and not example.target.mask.any()
    np.testing.assert_array_equal(ExampleReader(DatasetSettings()).read_mask(negative).mask, example.target.mask)


@pytest.mark.parametrize("cell", ["", "None", "nan", "null"])
def test_an_empty_cell_is_an_accident_and_the_message_has_the_word(folder, cell):
    with pytest.raises(ManifestError, match="row 2: image_uri and mask_uri are .* the mask_uri none says that"):
        read(write_list(folder, ".csv", [ROWS[0], ROWS[1] | {"mask_uri": cell}]))


def test_a_file_of_this_name_can_still_be_named(folder):
    (folder / "mask.png").rename(folder / "none")
    positive, _ = read(write_list(folder, ".csv", [ROWS[0] | {"mask_uri": "./none"}, ROWS[1]]))
    assert not positive.is_negative
    assert ExampleReader(DatasetSettings()).read(positive).target.mask.sum() == 64


def test_an_annotation_file_says_none(folder):
    for name in ("images", "masks", "anns"):
        (folder / name).mkdir()
    (folder / "b.png").rename(folder / "images" / "b.png")
    row = {"img_name": "b.png", "mask_name": "none", "prompts": {"p1": "polyp"}}
    (folder / "anns" / "train.json").write_text(json.dumps([row]))
    (negative,) = read(folder)
    assert negative.is_negative and not ExampleReader(DatasetSettings()).read(negative).target.mask.any()


@pytest.fixture
def pairs(folder):
    """images/ with a.png and b.png, masks/ with a mask of a.png only, in train."""
    for name, files in (("images", ("a.png", "b.png")), ("masks", ("mask.png",))):
        (folder / "data" / "train" / name).mkdir(parents=True)
        for file in files:
            (folder / file).rename(folder / "data" / "train" / name / file.replace("mask", "a"))
    return folder / "data"


def test_an_image_without_a_mask_in_a_folder_is_negative_only_if_that_is_said(pairs, caplog):
    caplog.set_level("INFO", logger="vlsm")
    with pytest.raises(ManifestError, match="no mask for 1 of 2 images .*data.unmasked_images=negative takes them"):
        read(pairs)
    records = read(pairs, unmasked_images="negative")
    assert [(one.split, one.is_negative) for one in records] == [("train", False), ("train", True)]
    assert "1 of 2 images have no mask: they do not show the finding (data.unmasked_images)" in caplog.text
    assert len(read(pairs, skip_unpaired=True)) == 1


def test_a_mask_with_a_wrong_name_is_no_negative_image(pairs):
    mask = pairs / "train" / "masks"
    Image.open(mask / "a.png").save(mask / "bb.png")
    with pytest.raises(ManifestError, match="no image for 1 mask .*bb.png.*; correct their names"):
        read(pairs, unmasked_images="negative", skip_unpaired=True)


def test_a_split_without_any_masks_is_unlabelled_and_not_negative(pairs, caplog):
    (pairs / "test" / "images").mkdir(parents=True)
    Image.open(pairs / "train" / "images" / "a.png").save(pairs / "test" / "images" / "c.png")
    assert {one.split for one in read(pairs, unmasked_images="negative")} == {"train"}
    assert "1 image of split test without masks: left out" in caplog.text


def test_images_of_a_coco_file_without_annotations_are_negative_on_request(folder):
    images = [{"id": n, "file_name": f"{name}.png", "height": 16, "width": 24} for n, name in enumerate("ab")]
    shape = {"image_id": 0, "category_id": 1, "segmentation": [[4, 4, 12, 4, 12, 12, 4, 12]]}
    content = {"images": images, "annotations": [shape], "categories": [{"id": 1, "name": "polyp"}]}
    (folder / "coco.json").write_text(json.dumps(content))
    areas = [fact.area_fraction for fact in inspect(read(folder / "coco.json", absent_classes="empty"))]
    assert len(areas) == 2 and areas[0] > 0 == areas[1]


def test_every_slice_of_a_volume_without_the_finding_is_negative(folder):
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 3), np.uint8), np.eye(4)), folder / "ct.nii.gz")
    records = read(write_list(folder, ".csv", [ROWS[0], ROWS[1] | {"image_uri": "ct.nii.gz"}]))
    assert [one.image_selector for one in records] == [None, "slice=0", "slice=1", "slice=2"]
    assert {one.group for one in records[1:]} == {f"{folder}/ct.nii.gz"}
    assert [fact.error for fact in inspect(records)] == [None] * 4
    assert {(fact.height, fact.width) for fact in inspect(records)[1:]} == {(5, 4)}


def test_every_image_of_a_dicom_series_without_the_finding_is_negative(folder):
    slices(folder / "series")
    records = read(write_list(folder, ".csv", [ROWS[0], ROWS[1] | {"image_uri": "series"}]))
    assert sorted(one.image_uri for one in records[1:]) == [f"{folder}/series/{n}.dcm" for n in (1, 2, 3)]
    assert [(fact.error, fact.area_fraction) for fact in inspect(records)[1:]] == [(None, 0)] * 3


def test_a_picture_without_an_ending_can_be_negative(folder):
    (folder / "b.png").rename(folder / "b")
    _, negative = read(write_list(folder, ".csv", [ROWS[0], ROWS[1] | {"image_uri": "b"}]))
    assert inspect([negative])[0].error is None


def test_of_several_classes_each_is_absent_also_where_absent_classes_are_skipped(folder):
    path = write_list(folder, ".csv", [ROWS[0], ROWS[1]])
    records = read(path, classes={255: "polyp", 7: "tool"}, absent_classes="skip")
    assert [(one.prompts["p1"][0], one.is_negative) for one in records] == [
        ("polyp", False), ("polyp", True), ("tool", True),
    ]  # fmt: skip


@pytest.mark.parametrize("join", [False, True])
def test_a_mask_and_none_for_one_image_and_prompt_are_a_contradiction(folder, join):
    path = write_list(folder, ".csv", [ROWS[0], ROWS[1] | {"image_uri": "a.png"}])
    with pytest.raises(
        ManifestError, match="row 2 says that .*a.png does not show the finding, and .*row 1 has a mask"
    ):
        read(path, join_masks=join)
    other = write_list(folder, ".csv", [ROWS[0], ROWS[1] | {"image_uri": "a.png", "prompt": "tool"}])
    assert len(read(other, join_masks=join)) == 2


def test_negative_records_are_no_finding_of_the_checks_and_hide_none(folder):
    """Beside nine negative records, a mask file without foreground is still the whole of the masks."""
    rows = [ROWS[1] | {"prompt": f"{number}"} for number in range(9)]
    records = read(write_list(folder, ".csv", [ROWS[0] | {"mask_uri": "empty.png"}, *rows]))
    facts = inspect(records)
    (sentence,) = find_useless_masks(records, facts, 127)
    assert sentence.startswith("dataset d: 1 of 1 train masks are empty")
    assert [one.where for one in check_facts(records, facts) if one.kind == "empty mask"] == [records[0].where]


def test_a_split_of_negative_records_alone_is_refused_and_a_dataset_of_them_beside_another_is_not(folder):
    records = read(write_list(folder, ".csv", ROWS))
    reader, settings = ExampleReader(DatasetSettings()), DatasetSettings()
    with pytest.raises(ConfigError, match="all 1 train records say that their image does not show the finding"):
        require_foreground(records[1:], reader, settings)
    require_foreground([records[0], replace(records[1], dataset="normal")], reader, settings)
    require_foreground(records[1:], reader, DatasetSettings(allow_empty_masks=True))


def test_negative_records_survive_the_table_of_a_training(folder):
    records = read(write_list(folder, ".csv", ROWS))
    table = with_versions(examples_table(records, inspect(records)), list_versions(records))
    assert records_from_table(table) == records
    assert renew_signatures(records, records) == records
    assert describe_changed_records(table, records) == [] == describe_changed_files(table, inspect)
    changed = [records[0], replace(records[1], mask_uri=records[0].mask_uri)]
    assert describe_changed_records(table, changed) != []
    assert digest_examples(table) != digest_examples(examples_table(changed, inspect(changed)))
    path = folder / "again.parquet"
    pq.write_table(table, path)
    assert read(path) == records


def test_the_overview_counts_them(folder):
    from types import SimpleNamespace

    records = read(write_list(folder, ".csv", ROWS))
    overview = SimpleNamespace(records=records, uri=str(folder))
    assert _describe_masks(overview) == "*.png (1); 1 image without the finding"
