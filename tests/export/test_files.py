import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco

import vlsm
from tests.conftest import save_square
from vlsm import export
from vlsm.errors import ConfigError
from vlsm.export.__main__ import main
from vlsm.runs.schema import RESULT_SCHEMA
from vlsm.segmentation.masks import encode_mask


@pytest.fixture
def output(tmp_path):
    """A run's output with awkward ids: two prompts each, one empty mask, one failed image."""
    rows = []
    ids = ["a/x.png", "b/x.png", "../../outside.png", "/etc/passwd.png", "c:\\d\n.png", "s3://bucket/y.png", "l" * 300]
    for number, image_id in enumerate(ids):
        path = tmp_path / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        mask = (save_square(path, size=(30, 40 + number))[..., 0] > 128).astype(np.uint8)
        for prompt in ("round polyp", "round_polyp"):
            shown = mask if prompt == "round polyp" else 0 * mask
            row = {
                "image_id": image_id,
                "image_uri": str(path),
                "prompt": prompt,
                "kind": "mask",
                "model": "m",
                "status": "ok",
            }
            row |= {"height": 30, "width": 40 + number, "mask_rle": encode_mask(shown), "area_px": int(shown.sum())}
            rows.append(row | ({"bbox": [0, 0, 13, 10], "confidence": 0.5 + number / 20} if shown.any() else {}))
    failed = {
        "image_id": "bad.png",
        "image_uri": "/nowhere",
        "prompt": "polyp",
        "kind": "mask",
        "model": "m",
        "status": "failed",
    }
    rows.append(failed | {"error": "missing: there is no file /nowhere"})
    (tmp_path / "out" / "masks").mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist(rows, schema=RESULT_SCHEMA), tmp_path / "out" / "masks" / "part-00000000.parquet"
    )
    return tmp_path / "out"


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_read_masks_filters_rows_and_chooses_columns(output):
    rows = list(vlsm.read_masks(str(output), filters=[("confidence", ">", 0.65)], columns=["image_id"]))
    assert [set(row) for row in rows] == [{"image_id", "mask"}] * 3
    assert all(row["mask"].sum() == 10 * (row["mask"].shape[1] // 3) for row in rows)
    everything = list(vlsm.read_masks(str(output)))
    assert Counter(row["mask"] is None for row in everything) == {False: 14, True: 1}
    with pytest.raises(ConfigError, match="unknown column 'colour'"):
        list(vlsm.read_masks(str(output), columns=["colour"]))


def test_every_mask_is_a_file_below_the_folder_and_none_is_overwritten(output, tmp_path):
    before = set(files(tmp_path))
    assert export.export_masks(str(output), tmp_path / "pngs") == 14
    new = set(files(tmp_path)) - before
    assert len(new) == 14
    assert all(path.is_relative_to(tmp_path / "pngs") for path in new)
    with Image.open(next(path for path in new if path.parent.name == "a" and "round_polyp~" in path.name)) as image:
        assert Counter(np.asarray(image).ravel().tolist()) == {0: 30 * 40 - 130, 255: 130}


def test_overlays_tint_the_mask_and_leave_the_rest(output, tmp_path):
    assert export.export_overlays(str(output), tmp_path / "o", [("image_id", "=", "a/x.png"), ("area_px", ">", 0)]) == 1
    picture = np.asarray(Image.open(files(tmp_path / "o")[0]))
    original = np.asarray(Image.open(tmp_path / "images" / "0.png"))
    assert picture.shape == original.shape
    np.testing.assert_array_equal(picture[12:], original[12:])
    assert (picture[2:8, 2:8] != original[2:8, 2:8]).any(axis=-1).all()


def test_an_image_that_vanished_costs_only_its_own_overlay(output, tmp_path, caplog):
    (tmp_path / "images" / "0.png").unlink()
    assert export.export_overlays(str(output), tmp_path / "o") == 12
    assert "no overlay: missing: there is no file" in caplog.text


def test_coco_json_is_what_pycocotools_reads(output, tmp_path):
    from pycocotools.coco import COCO

    assert export.export_coco(str(output), tmp_path / "coco") == 7
    read = COCO(str(tmp_path / "coco" / "coco.json"))
    assert len(read.imgs) == 7
    assert {category["name"] for category in read.cats.values()} == {"round polyp", "round_polyp"}
    for annotation in read.anns.values():
        assert read.annToMask(annotation).sum() == annotation["area"] == coco.area(read.annToRLE(annotation))


def test_the_command_line_writes_what_it_says(output, tmp_path, capsys):
    assert main([str(output), str(tmp_path / "x"), "--filter", "confidence < 0.58", "--limit", "1"]) == 0
    assert "1 files below" in capsys.readouterr().out
    assert len(files(tmp_path / "x")) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--filter", "confidence"], "not of the form"),
        (["--filter", "colour = 3"], "unknown column 'colour'; columns: image_id, "),
        ([], "there are no masks in"),
    ],
)
def test_wrong_words_are_one_sentence(output, tmp_path, capsys, words, message):
    place = output if words else tmp_path / "nowhere"
    assert main([str(place), str(tmp_path / "x"), *words]) != 0
    err = capsys.readouterr().err
    assert message in err.splitlines()[0]


def test_json_is_valid_where_nothing_matches(output, tmp_path):
    assert export.export_coco(str(output), tmp_path / "c", [("prompt", "=", "nothing")]) == 0
    assert json.loads((tmp_path / "c" / "coco.json").read_text()) == {"images": [], "annotations": [], "categories": []}
