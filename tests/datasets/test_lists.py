import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlsm.datasets.read import read_dataset
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ManifestError


def read(path, **columns):
    return read_dataset("mine", str(path), DatasetSettings(columns=columns))


def test_columns_with_other_names_are_chosen(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("img;label;fold;patient_id;caption\na.png;m.png;VALID;7;polyp\n")
    names = {"image_uri": "img", "mask_uri": "label", "split": "fold", "group": "patient_id", "prompt": "caption"}
    (record,) = read(path, **names)
    assert (record.image_uri, record.mask_uri) == (f"{tmp_path}/a.png", f"{tmp_path}/m.png")
    assert (record.split, record.group, record.prompts) == ("val", "7", {"p1": ("polyp",)})


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("imageuri,mask_uri", "a manifest needs image_uri: --set data.columns.image_uri=imageuri"),
        ("x,y", "a manifest needs image_uri: --set data.columns.image_uri=NAME names its column"),
        ("image_uri,label", "has no mask_uri; --set data.columns.mask_uri=NAME names the column of the masks"),
    ],
)
def test_a_column_that_is_missing_is_named_with_its_setting(tmp_path, header, message):
    (tmp_path / "list.csv").write_text(f"{header}\na.png,b.png\n")
    with pytest.raises(ManifestError, match=message):
        read(tmp_path / "list.csv")


def test_a_chosen_column_that_is_not_there_is_named(tmp_path):
    (tmp_path / "list.csv").write_text("image_uri,mask_uri\na.png,b.png\n")
    with pytest.raises(
        ManifestError, match="data.columns.group is 'patient', but .* has the columns image_uri, mask_uri"
    ):
        read(tmp_path / "list.csv", group="patient")


def test_a_setting_for_an_unknown_column_is_refused():
    with pytest.raises(ValueError, match="'patient' must be one of image_uri, mask_uri, split, group"):
        DatasetSettings(columns={"patient": "group"})


def test_splits_have_other_names_and_may_be_missing(tmp_path):
    splits = ["train", "Training", "val", "validation", "VALID", "dev", "test", "testing", ""]
    rows = "".join(f"{number}.png,{number}_m.png,{split}\n" for number, split in enumerate(splits))
    (tmp_path / "list.csv").write_text(f"image_uri,mask_uri,split\n{rows}")
    expected = ["train"] * 2 + ["val"] * 4 + ["test"] * 2 + [""]
    assert [record.split for record in read(tmp_path / "list.csv")] == expected
    (tmp_path / "list.csv").write_text("image_uri,mask_uri\na.png,b.png\n")
    assert [record.split for record in read(tmp_path / "list.csv")] == [""]


def test_only_a_column_of_this_name_is_the_group(tmp_path):
    (tmp_path / "list.jsonl").write_text(
        '{"image_uri": "a.png", "mask_uri": "m.png", "Group": 12}\n'
        '{"image_uri": "b.png", "mask_uri": "m.png", "patient_id": 12}\n'
    )
    assert [record.group for record in read(tmp_path / "list.jsonl")] == ["12", ""]


def test_a_folder_of_lists_is_one_list_and_its_folders_can_be_columns(tmp_path):
    for split in ("train", "test"):
        folder = tmp_path / "rows" / f"split={split}"
        folder.mkdir(parents=True)
        table = pa.table({"image_uri": [f"{split}.png"], "mask_uri": ["m.png"], "group": [b"p1"]})
        pq.write_table(table, folder / "part-0.parquet")
        (tmp_path / "rows" / "_SUCCESS").write_text("")
    records = read(tmp_path / "rows")
    assert [(record.split, record.image_uri, record.group) for record in records] == [
        ("test", f"{tmp_path}/rows/test.png", "p1"),
        ("train", f"{tmp_path}/rows/train.png", "p1"),
    ]


def test_a_number_of_a_group_is_one_group_in_every_file(tmp_path):
    frame = pd.DataFrame({"image_uri": ["a.png", "b.png"], "mask_uri": ["c.png", "d.png"], "split": "val"})
    frame.assign(group=[7, 8]).to_parquet(tmp_path / "1.parquet")
    frame.assign(group=[7.0, None]).to_parquet(tmp_path / "2.parquet")  # as pandas writes it beside a missing cell
    assert [record.group for record in read(tmp_path)] == ["7", "8", "7", ""]


def test_a_text_that_is_not_utf_8_is_named_with_its_row(tmp_path):
    (tmp_path / "list.csv").write_bytes("image_uri,mask_uri,split,prompt\na.png,b.png,val,abc\xe8s\n".encode("latin-1"))
    with pytest.raises(ManifestError, match=r"row 1: 'abc.*s' is no Unicode text; save the list as UTF-8"):
        read(tmp_path / "list.csv")
