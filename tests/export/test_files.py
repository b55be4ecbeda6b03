import errno
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import vlsm
from tests.conftest import save_square
from tests.export.test_volumes import index
from vlsm import export
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.records import Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ConfigError
from vlsm.export.__main__ import main, parse_filter
from vlsm.export.files import FORMATS
from vlsm.export.folder import ExportFolder
from vlsm.images.overlays import draw_legend, draw_outlines, prompt_colors
from vlsm.runs.results import read_rows
from vlsm.runs.schema import RESULT_SCHEMA
from vlsm.segmentation.masks import encode_mask, encode_png


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
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "index.csv")


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
    assert "2 rows could not be exported" in caplog.text
    assert "missing: there is no file" in caplog.text
    failed = [line for line in index(tmp_path / "o") if line["error"]]
    assert [(line["file"], line["image_id"], line["prompt"]) for line in failed] == [
        ("", "a/x.png", "round polyp"),
        ("", "a/x.png", "round_polyp"),
    ]
    assert len(index(tmp_path / "o")) == 14


def test_the_command_line_writes_what_it_says(output, tmp_path, capsys):
    assert main([str(output), str(tmp_path / "x"), "--filter", "confidence < 0.58", "--limit", "1"]) == 0
    assert "1 file below" in capsys.readouterr().out
    assert len(files(tmp_path / "x")) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--filter", "confidence"], "not of the form"),
        (["--filter", "colour = 3"], "unknown column 'colour'; columns: image_id, "),
        (["--filter", "colour = 3", "--format", "labels"], "unknown column 'colour'; columns: image_id, "),
        (["--filter", "colour = 3", "--format", "coco"], "unknown column 'colour'; columns: image_id, "),
        (["--filter", "confidence < high"], "'high' does not fit the column confidence; it must be a number"),
        (["--filter", "confidence < 60"], "'60' does not fit the column confidence; its values are between 0 and 1"),
        (["--filter", "area_fraction > 5"], "does not fit the column area_fraction; its values are between 0 and 1"),
        (["--filter", "area_px = {a"], "'{a' does not fit the column area_px; it must be a number"),
        (["--filter", "bbox = 3"], "'3' does not fit the column bbox; compare it with null"),
        (["--filter", "label_map = x"], "'x' does not fit the column label_map; compare it with null"),
        ([], "there are no masks in"),
    ],
)
def test_wrong_words_are_one_sentence(output, tmp_path, capsys, words, message):
    place = output if words else tmp_path / "nowhere"
    assert main([str(place), str(tmp_path / "x"), *words]) != 0
    err = capsys.readouterr().err
    assert message in err.splitlines()[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "masks", "--components"], "--components needs --format coco or cvat, not masks"),
        (["--limit", "-1"], "--limit is -1; it must be 0 or more"),
    ],
)
def test_arguments_that_make_no_sense_are_usage_errors(capsys, words, message):
    with pytest.raises(SystemExit) as end:
        main(["out", "x", *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("confidence < 0.6", ("confidence", "<", 0.6)),
        ("area_px>=1", ("area_px", ">=", 1)),
        ("area_px < 1e4", ("area_px", "<", 10_000)),
        ("image_id = 0012", ("image_id", "=", "0012")),  # as YAML, this is 10
        ("prompt == a: b # c", ("prompt", "==", "a: b # c")),
        ("prompt == ' polyp'", ("prompt", "==", " polyp")),
        ("review != null", ("review", "!=", None)),
        ("prompt = 'null'", ("prompt", "=", "null")),
    ],
)
def test_the_value_of_a_filter_is_read_as_its_column(words, expected):
    assert parse_filter(words) == expected


def test_filters_by_null_choose_rows(output):
    def count(*filters):
        return sum(1 for _ in vlsm.read_masks(str(output), list(filters), ["image_id"]))

    assert count(("confidence", "==", None)) == 8
    assert count(("confidence", "!=", None)) == 7
    assert count([("confidence", "!=", None), ("image_id", "=", "a/x.png")], [("status", "=", "failed")]) == 2


def damage(output, column, *values):
    """Write values in the first rows of a column of the output."""
    path = output / "masks" / "part-00000000.parquet"
    rows = pq.read_table(path).to_pylist()
    for row, value in zip(rows, values, strict=False):
        row[column] = value
    pq.write_table(pa.Table.from_pylist(rows, schema=RESULT_SCHEMA), path)


RLES = [None, "", "PP", "ab", "9" * 30, "é", encode_mask(np.ones((30, 41), np.uint8))]
SIZES = [("height", value) for value in (None, -1, 0, 29, 2_000_000_000)] + [("width", 41), ("width", 2_000_000_000)]


@pytest.mark.parametrize("damaged", [*(("mask_rle", rle) for rle in RLES), *SIZES, ("area_px", 3)])
@pytest.mark.parametrize(("kind", "num_written"), [("masks", 13), ("overlays", 13), ("coco", 6), ("labels", 6)])
def test_a_damaged_row_costs_only_its_own_file(output, tmp_path, caplog, damaged, kind, num_written):
    damage(output, *damaged)
    with ExportFolder(tmp_path / "x") as folder:
        assert FORMATS[kind](str(output), folder) == num_written
    assert folder.num_failed > 0
    failed = [line for line in index(tmp_path / "x") if line["error"]]
    assert {(line["image_id"], line["file"]) for line in failed} == {("a/x.png", "")}
    assert "index.csv lists them: 'a/x.png', 'round polyp': " in caplog.text
    for path in tmp_path.glob("x/**/*.png"):
        Image.open(path).load()


@pytest.mark.parametrize(("kind", "column"), [("labels", "label_map"), ("probability", "probability_map")])
def test_a_damaged_map_costs_only_its_own_file(output, tmp_path, kind, column):
    good = encode_png(np.eye(9, dtype=np.uint8))
    values = [b"", good[:-20], None, b"no picture", good]
    damage(output, "kind", *["labels" if kind == "labels" else "mask"] * 5)
    damage(output, "prompt", *['["polyp"]'] * 5)
    damage(output, column, *values)
    with ExportFolder(tmp_path / "x") as folder:
        assert FORMATS[kind](str(output), folder) == 1
    assert folder.num_failed == (4 if kind == "labels" else 3)  # a row may have no probability map
    assert [np.asarray(Image.open(path)).tolist() for path in tmp_path.glob("x/**/*.png")] == [np.eye(9).tolist()]


def test_a_label_map_has_colours_and_keeps_its_values(output, tmp_path):
    """A palette does not change what readers of the values get, ours included."""
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    many = np.full((16, 16), 300, np.uint16)
    damage(output, "kind", "labels", "labels")
    damage(output, "prompt", '["polyp"]', '["polyp"]')
    damage(output, "label_map", encode_png(labels), encode_png(many))
    for column in ("height", "width"):
        damage(output, column, 16, 16)
    damage(output, "image_id", "few", "many")
    assert FORMATS["labels"](str(output), tmp_path / "l", [("prompt", "==", '["polyp"]')]) == 2
    few = Image.open(tmp_path / "l" / "few.labels.png")
    assert few.mode == "P"
    assert (np.asarray(few) == labels).all()
    colors = np.asarray(few.convert("RGB")).reshape(256, 3)
    assert (colors[:2].tolist(), len({*map(tuple, colors)})) == ([[0, 0, 0], [86, 180, 233]], 256)
    assert (np.asarray(Image.open(tmp_path / "l" / "many.labels.png")) == many).all()
    record = Record("d", "train", "w", "x", str(tmp_path / "l" / "few.labels.png"), {}, labels=(3,))
    mask = ExampleReader(DatasetSettings()).read_mask(record).mask
    assert np.argwhere(mask).tolist() == [[0, 3]]


def test_all_prompts_of_an_image_are_one_picture_with_a_legend(output, tmp_path):
    folder = tmp_path / "x"
    assert main([str(output), str(folder), "--together"]) == 0
    lines = index(folder)
    assert len(files(folder)) == 7  # of 14 masks
    assert [line["prompt"] for line in lines if line["image_id"] == "a/x.png"] == ["round polyp", "round_polyp"]
    picture = np.asarray(Image.open(folder / "a" / "x.png.png"))
    assert picture.shape[1] == 40 and picture.shape[0] > 30  # the legend is below the image
    assert (86, 180, 233) in {*map(tuple, picture[:30].reshape(-1, 3))}
    assert {(86, 180, 233), (230, 159, 0)} <= {*map(tuple, picture[30:].reshape(-1, 3))}
    (tmp_path / "images" / "1.png").unlink()
    assert main([str(output), str(tmp_path / "y"), "--together"]) == 1
    assert sum(bool(line["error"]) for line in index(tmp_path / "y")) == 2  # both rows of the image


def test_one_picture_needs_overlays(output, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(output), str(tmp_path / "x"), "--together", "--format", "masks"])
    assert "--together needs --format overlays" in capsys.readouterr().err


def test_equal_and_many_masks_are_all_seen():
    mask = np.zeros((120, 90), np.uint8)
    mask[30:90, 20:70] = 1
    picture = draw_outlines(np.zeros((120, 90, 3), np.uint8), [mask, mask], 2)
    assert {*map(tuple, picture.reshape(-1, 3))} == {(0, 0, 0), *prompt_colors(2)}
    legend = draw_legend(picture, [f"prompt {number} \n 息肉 {'x' * 300}" for number in range(60)])
    assert set(prompt_colors(60)) <= {*map(tuple, legend[120:].reshape(-1, 3))}
    assert draw_legend(np.zeros((1, 1, 3), np.uint8), ["a"]).shape[1:] == (1, 3)


@pytest.mark.parametrize("kind", ["overlays", "labels", "probability"])
def test_the_size_of_images_has_no_limit_but_that_of_the_run(output, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses images with twice as many
    label_map = encode_png(np.eye(9, 30, dtype=np.uint8))
    if kind != "overlays":
        damage(output, "kind", *["labels" if kind == "labels" else "mask"] * 14)
        damage(output, "prompt", *['["polyp"]'] * 14)
        damage(output, "label_map" if kind == "labels" else "probability_map", *[label_map] * 14)
    with ExportFolder(tmp_path / "x") as folder:
        assert (FORMATS[kind](str(output), folder), folder.num_failed) == (14, 0)
    if kind == "probability":
        filters = [("status", "==", "ok")]
        assert [row["probability"].shape for row in vlsm.read_masks(str(output), filters)] == [(9, 30)] * 14


def test_images_of_one_image_id_have_files_of_their_own(output, tmp_path):
    damage(output, "image_id", *["patient-007"] * 4)  # two images, with two prompts each
    assert FORMATS["labels"](str(output), tmp_path / "l") == 7
    assert export.export_masks(str(output), tmp_path / "m") == 14
    for folder, num_files in ((tmp_path / "l", 2), (tmp_path / "m", 4)):
        lines = [line for line in index(folder) if line["image_id"] == "patient-007"]
        assert len({line["file"] for line in lines}) == num_files
        sizes = {(line["image_uri"], Image.open(folder / line["file"]).size) for line in lines}
        assert sizes == {(str(tmp_path / "images" / f"{number}.png"), (40 + number, 30)) for number in (0, 1)}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_wrong_folder_is_a_usage_error(output, tmp_path, capsys, kind):
    (tmp_path / "file").write_text("mine")
    for wrong in ("file", "file/x/y"):
        assert main([str(output), str(tmp_path / wrong), "--format", kind]) == 2
        assert f"{tmp_path / 'file'} is not a folder" in capsys.readouterr().err
    assert main([str(output), "s3://bucket/x", "--format", kind]) == 2
    assert "s3://bucket/x is not a local folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("kind", sorted(set(FORMATS) - {"probability", "dicom-seg", "dicom-seg-series", "rtstruct"}))
def test_an_export_replaces_no_file(output, tmp_path, capsys, kind):
    """Every file of an export may hold the work of people by now, be a link, or belong to another program."""
    folder, words = tmp_path / "x", ["--format", kind]
    assert main([str(output), str(folder), *words]) == 0
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main([str(output), str(folder), *words]) == 2
    assert f"{folder} holds an export already (index.csv): remove it or choose another DIR" in capsys.readouterr().err
    assert {name: (folder / name).read_bytes() for name in before} == before
    for name in before:
        shutil.rmtree(folder)
        (folder / name).parent.mkdir(parents=True)
        (folder / name).symlink_to(outside := tmp_path / "outside")
        assert main([str(output), str(folder), *words]) == 2, name
        assert str(folder) in capsys.readouterr().err and not outside.exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(output, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a").write_text("mine")  # the images lie in a/
    (tmp_path / "y").symlink_to(tmp_path / "nowhere")
    for name, place in (("x", "x/a"), ("y", "y")):
        assert main([str(output), str(tmp_path / name), "--format", "masks"]) == 2
        assert f"the folder {tmp_path / place}" in (error := capsys.readouterr().err) and len(error.splitlines()) == 1


@pytest.mark.parametrize("words", [["--limit", "0"], ["--filter", "image_id = none"]])
@pytest.mark.parametrize("kind", FORMATS)
def test_an_export_of_no_rows_has_no_index(output, tmp_path, kind, words):
    code = int("--filter" in words)  # it leaves nothing, which the last line says
    assert main([str(output), str(tmp_path / "x"), "--format", kind, *words]) == code
    assert not (tmp_path / "x" / "index.csv").exists()


def test_failed_rows_make_the_exit_code_1(output, tmp_path, capsys):
    damage(output, "mask_rle", "PP")
    assert main([str(output), str(tmp_path / "x"), "--format", "masks"]) == 1
    assert capsys.readouterr().out.startswith("13 files below ")


def test_a_full_disk_ends_an_export(output, tmp_path, capsys, monkeypatch):
    def save(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    assert main([str(output), str(tmp_path / "x"), "--format", "masks"]) == 1
    assert "No space left on device" in capsys.readouterr().err


def test_maps_are_written_as_they_are_and_rows_without_one_are_counted(output, tmp_path, caplog):
    first, second = (np.random.default_rng(seed).integers(0, 256, (30, 40), dtype=np.uint8) for seed in (1, 2))
    damage(output, "probability_map", encode_png(first), encode_png(second))
    assert main([str(output), str(tmp_path / "p"), "--format", "probability"]) == 0
    export.export_masks(str(output), tmp_path / "m")
    names = [line["file"] for line in index(tmp_path / "p")]
    assert names == [line["file"] for line in index(tmp_path / "m")][:2]
    for name, values in zip(names, (first, second), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "p" / name)), values)
    assert "no probability map in 12 rows; segment with --set probability_maps=all" in caplog.text
    read = list(vlsm.read_masks(str(output)))
    np.testing.assert_array_equal(read[1]["probability"], second.astype(np.float32) / 255)
    assert read[1]["probability"].dtype == np.float32
    assert read[2]["probability"] is None
    (row, *_) = vlsm.read_masks(str(output), columns=["probability_map"])
    assert set(row) == {"probability_map", "mask", "probability"}


@pytest.mark.parametrize("kind", ["overlays", "masks", "coco", "labels"])
def test_a_filter_that_fits_no_row_is_a_sentence(output, tmp_path, capsys, kind):
    words = [str(output), str(tmp_path / "x"), "--format", kind]
    assert main([*words, "--filter", "prompt == polpy", "--filter", "confidence > 0"]) == 1
    printed = capsys.readouterr()
    total = len(list(read_rows(str(output))))
    assert f"none of {total} rows fits --filter 'prompt == polpy' and --filter 'confidence > 0'" in printed.err
    assert "files" not in printed.out


def test_a_filter_whose_rows_have_no_masks_says_so_and_no_limit_stays_no_error(output, tmp_path, capsys):
    num_failed = sum(row["status"] == "failed" for row in read_rows(str(output)))
    code = main([str(output), str(tmp_path / "x"), "--format", "masks", "--filter", "status == failed"])
    err = capsys.readouterr().err
    assert (code, f"nothing to export: {num_failed} of" in err or "none of" in err) == (1, True)
    assert main([str(output), str(tmp_path / "x"), "--limit", "0", "--filter", "prompt == polpy"]) == 0
