import json
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.conftest import SHARED
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.inspection import Facts, examples_table
from vlsm.datasets.read import read_dataset
from vlsm.datasets.records import Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ConfigError, ImageError, ManifestError

ANNOTATIONS = SHARED / "reference" / "annotations"
NAMES = sorted(path.name for path in ANNOTATIONS.iterdir()) if ANNOTATIONS.exists() else []


def write_dataset(folder, rows, split="train"):
    (folder / "anns").mkdir(parents=True, exist_ok=True)
    (folder / "anns" / f"{split}.json").write_text(json.dumps(rows))
    return str(folder)


@pytest.mark.skipif(not NAMES, reason="the published annotation files lie outside the repository")
@pytest.mark.parametrize("name", NAMES)
def test_published_annotation_files_are_read(name, tmp_path):
    shutil.copytree(ANNOTATIONS / name, tmp_path / "anns")
    rows = [row for split in ("train", "val", "test") for row in _load(tmp_path / "anns" / f"{split}.json")]
    records = read_dataset(name, str(tmp_path))
    assert [record.image_uri for record in records] == [f"{tmp_path}/images/{row['img_name']}" for row in rows]
    assert [record.mask_uri for record in records] == [f"{tmp_path}/masks/{row['mask_name']}" for row in rows]
    for record, row in zip(records, rows, strict=True):
        assert record.prompts["p0"] == ("",)
        for kind, texts in row["prompts"].items():
            assert list(record.prompts[kind]) == ([texts] if isinstance(texts, str) else texts)


def _load(path):
    return json.loads(path.read_text()) if path.exists() else []


def test_the_drawn_dataset_is_one(drawn):
    records = read_dataset("drawn", str(drawn))
    assert {record.split for record in records} == {"test"}
    assert all((drawn / "images").samefile(record.image_uri.rsplit("/", 1)[0]) for record in records)


def test_a_manifest_with_masks_is_read(tmp_path):
    (tmp_path / "list.jsonl").write_text(
        '{"image_uri": "a.png", "mask_uri": "s3://bucket/a.png", "split": "train", "prompts": ["polyp", "lesion"]}\n'
        f'{{"image_uri": "{tmp_path.parent}/b.png", "mask_uri": "b.png", "split": "val", "dataset": "other"}}\n'
    )
    first, second = read_dataset("mine", str(tmp_path / "list.jsonl"))
    assert (first.dataset, first.split, first.image_uri) == ("mine", "train", f"{tmp_path}/a.png")
    assert (first.mask_uri, first.prompts) == ("s3://bucket/a.png", {"p1": ("polyp", "lesion")})
    assert (second.dataset, second.image_uri, second.mask_uri) == (
        "other",
        f"{tmp_path.parent}/b.png",
        f"{tmp_path}/b.png",
    )
    assert second.prompts == {}


GOOD = {"img_name": "a.png", "mask_name": "a.png", "prompts": {"p0": ""}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GOOD | {"img_name": "../../secret.png"}, "record 2: img_name is '../../secret.png'; it must lie below"),
        (GOOD | {"mask_name": "/etc/passwd"}, "record 2: mask_name is '/etc/passwd'; it must lie below"),
        (GOOD | {"mask_name": None}, "record 2: mask_name is None; it must name a file"),
        (GOOD | {"prompts": ["polyp"]}, r"record 2: prompts are \['polyp'\]; they must be named"),
        (GOOD | {"prompts": {"p1": 3}}, "record 2, prompt p1 is 3; it must be a text or a list of texts"),
        ("a.png", "record 2 is 'a.png'; it must be an object"),
    ],
)
def test_a_wrong_record_is_named(tmp_path, row, message):
    with pytest.raises(ManifestError, match=message):
        read_dataset("mine", write_dataset(tmp_path, [GOOD, row]))


def test_a_split_that_nobody_knows_is_refused(tmp_path):
    (tmp_path / "list.csv").write_text("image_uri,mask_uri,split\na.png,b.png,holdout\n")
    with pytest.raises(ManifestError, match="row 1: split is 'holdout'; it must be one of train, val, test"):
        read_dataset("mine", str(tmp_path / "list.csv"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "Known are: anns/{train,val,test}.json"),
        ("list.csv", "does not exist"),
        ("x", "does not exist"),
    ],
)
def test_a_dataset_that_is_not_there_is_named(tmp_path, path, message):
    with pytest.raises(ConfigError, match=message):
        read_dataset("mine", f"{tmp_path}/{path}")


def test_a_list_without_splits_gives_records_without_splits(tmp_path):
    (tmp_path / "list.csv").write_text("image_uri,mask_uri\na.png,b.png\n")
    (tmp_path / "some.csv").write_text("image_uri,mask_uri,split\na.png,b.png,\nc.png,d.png,test\n")
    assert [record.split for record in read_dataset("mine", str(tmp_path / "list.csv"))] == [""]
    assert [record.split for record in read_dataset("mine", str(tmp_path / "some.csv"))] == ["", "test"]


def test_a_table_of_examples_is_a_list_with_every_field_of_the_records(tmp_path):
    full = Record("a", "val", "list, row 3", "s3://b/x.nii", "/m.nii", {"p1": ("polyp",), "p2": ("flat", "red")})
    full = replace(full, image_selector="slice=3", mask_selector="slice=4", labels=(1, 3), group="patient 7")
    others = [
        replace(full, dataset="b", mask_rle="P0", mask_size=(3, 4), more_masks=("/n.nii",)),
        replace(full, split=""),
    ]
    facts = [Facts(), Facts(), Facts(error="missing")]
    pq.write_table(examples_table([full, *others], facts), tmp_path / "examples.parquet")
    uri = str(tmp_path / "examples.parquet")
    assert read_dataset("a", uri) == [full]
    assert read_dataset("all", uri) == [full, others[0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "valid"}, "row 1: split is 'valid'; it must be one of train, val, test"),
        (
            {"mask_rle": "d0", "mask_size": (-8, -10)},
            r"row 1: mask_size is \(-8, -10\); it must be a height and a width",
        ),
        ({"mask_rle": "d0", "mask_size": (8,)}, "it must be a height and a width"),
    ],
)
def test_a_table_of_examples_may_be_forged(tmp_path, changes, message):
    record = Record("mine", "val", "row 1", "a.png", "b.png", {"p1": ("x",)})
    pq.write_table(examples_table([replace(record, **changes)], [Facts()]), tmp_path / "x.parquet")
    with pytest.raises(ManifestError, match=message):
        read_dataset("mine", str(tmp_path / "x.parquet"))


def test_a_huge_shape_and_a_selector_of_another_format_are_errors(tmp_path):
    Image.new("RGB", (5, 4)).save(tmp_path / "a.png")
    record = Record("mine", "val", "row 1", str(tmp_path / "a.png"), str(tmp_path / "a.png"), {"p1": ("x",)})
    reader = ExampleReader(DatasetSettings())
    with pytest.raises(ImageError, match="too_large"):
        reader.read(replace(record, mask_rle="0", mask_size=(1 << 20, 1 << 20)))
    for changes in ({"image_selector": "slice=99"}, {"mask_selector": "page=7"}):
        with pytest.raises(ImageError, match="has no '(slice=99|page=7)'"):
            reader.read(replace(record, **changes))
