"""The command that shows what datasets are taken for, and its contact sheet."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from vlsm import storage
from vlsm.datasets.__main__ import main
from vlsm.datasets.contact_sheet import draw_pictures
from vlsm.datasets.overview import describe_layout, inspect_dataset, spread
from vlsm.datasets.records import Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ConfigError


def write_dataset(folder, splits, level=255, size=(20, 30)):
    """The layout of MedVLSM: a bright square of the mask's level in each image."""
    for name in ("images", "masks", "anns"):
        (folder / name).mkdir(parents=True)
    for split, count in splits.items():
        rows = []
        for number in range(count):
            image = np.random.default_rng([number, len(split)]).integers(0, 60, (*size, 3), np.uint8)
            mask = np.zeros(size, np.uint8)
            mask[5:15, 5:15] = level
            name = f"{split}{number}.png"
            Image.fromarray(image).save(folder / "images" / name)
            Image.fromarray(mask).save(folder / "masks" / name)
            prompts = {"p0": "", "p1": "lesion", "p2": f"lesion {number}"}
            rows.append({"img_name": name, "mask_name": name, "prompts": prompts})
        (folder / "anns" / f"{split}.json").write_text(json.dumps(rows))
    return folder


def show(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_folder_is_told_as_it_is_taken(tmp_path, capsys):
    folder = write_dataset(tmp_path / "kvasir", {"train": 4, "val": 2})
    code, out, _ = show(capsys, folder)
    assert code == 0
    assert out.splitlines() == [
        f"kvasir: {folder}",
        "  layout      anns/train.json, anns/val.json",
        "  images      images/*.png (6)",
        "  masks       masks/*.png (6)",
        "  records     6 of 6 images: 4 train, 2 val",
        "  prompts     p0  '' (6)",
        "              p1  'lesion' (6)",
        "              p2  4 texts: 'lesion 0' (2), 'lesion 1' (2)",
        "  inspected   all records",
        "  values      0 and 255; values above data.mask_threshold=127 are foreground: 255",
        "  sizes       30 x 20 pixels, all (width x height)",
        "  foreground  17 to 17 % of the image, median 17 %; 0 empty, 0 full",
        "  problems    none found",
        "",
    ]


def test_what_a_training_would_refuse_is_told_with_the_setting_that_helps(tmp_path, capsys):
    folder = write_dataset(tmp_path / "kvasir", {"train": 3}, level=1)
    _, out, _ = show(capsys, folder)
    assert "training refuses dataset kvasir: 3 of 3 train masks are empty: the mask files hold 0 and 1" in out
    assert "--set data.mask_threshold=0" in out
    _, out, _ = show(capsys, folder, "--set", "data.mask_threshold=0")
    assert "values above data.mask_threshold=0 are foreground: 1\n" in out
    assert "problems    none found" in out


def test_lesions_that_vanish_at_a_size_are_told(tmp_path, capsys):
    folder = write_dataset(tmp_path / "kvasir", {"train": 2})
    speck = np.zeros((20, 30), np.uint8)
    speck[0, 0] = 255
    Image.fromarray(speck).save(folder / "masks" / "train1.png")
    _, out, _ = show(capsys, folder, "--size", 8)
    assert "problems    1 vanishes at 8 pixels" in out
    assert "problems    none found" in show(capsys, folder)[1]


def test_a_broken_file_is_a_problem_and_the_others_are_told(tmp_path, capsys):
    folder = write_dataset(tmp_path / "kvasir", {"train": 3})
    (folder / "images" / "train1.png").unlink()
    code, out, _ = show(capsys, folder, "--sheet", tmp_path / "sheet.png")
    assert code == 0
    assert "problems    1 broken" in out
    assert "broken: anns/train.json, record 2: missing: there is no file images/train1.png" in out
    assert "0 empty" in out and (tmp_path / "sheet.png").exists()


def test_a_limit_is_told_and_spread_over_splits(tmp_path, capsys):
    folder = write_dataset(tmp_path / "kvasir", {"train": 8, "val": 1})
    _, out, err = show(capsys, folder, "--limit", 4)
    assert "inspected   5 of 9 records, spread evenly; --limit 0 inspects all" in out
    _, out, _ = show(capsys, folder, "--limit", 0)
    assert "inspected   all records" in out


@pytest.mark.parametrize(
    ("counts", "count", "expected"),
    [
        ({"train": 100, "val": 50}, 15, {"train": 10, "val": 5}),
        ({"train": 100, "": 1}, 10, {"train": 10, "": 1}),
        ({"train": 3}, 300, {"train": 3}),
    ],
)
def test_chosen_records_are_spread(counts, count, expected):
    records = [
        Record("kvasir", split, f"record {number}", f"{number}.png", "mask.png", {})
        for split, total in counts.items()
        for number in range(total)
    ]
    chosen = spread(records, count)
    assert {split: sum(record.split == split for record in chosen) for split in counts} == expected
    assert len({(record.split, record.where) for record in chosen}) == len(chosen)
    assert chosen[0] == records[0]


@pytest.mark.parametrize(
    ("positions", "layout"),
    [
        (["s3://b/x/anns/val.json, record 7", "s3://b/x/anns/test.json, record 1"], "anns/val.json, anns/test.json"),
        (["s3://b/x/list.csv, row 3", "s3://b/x/list.csv, row 4"], "list.csv"),
        (["s3://b/x/a, b.json, image 4, category 'fold, flat'"], "a, b.json"),
        (["s3://b/x, row 3", "s3://b/x, row 4"], "x"),
        (["s3://b/x, images/a.png"], "no list: images and masks belong together by their names"),
        ([f"s3://b/x/{n}.csv, line 1" for n in range(6)], "0.csv, 1.csv, 2.csv, 3.csv and 2 more"),
    ],
)
def test_the_layout_is_told_by_what_lists_the_records(positions, layout):
    records = [Record("x", "train", where, "a.png", "b.png", {}) for where in positions]
    assert describe_layout("s3://b/x", records) == layout


def test_the_contact_sheet_shows_images_with_their_outlines(tmp_path, capsys):
    """One tile: 30 x 20 pixels become 240 x 160 in the middle of 240 x 240, the square 80 x 80."""
    folder = write_dataset(tmp_path / "kvasir", {"test": 1})
    code, out, _ = show(capsys, folder, "--sheet", tmp_path / "sheet.png")
    assert code == 0 and f"{tmp_path}/sheet.png: " in out and "with outlines of their masks" in out
    tile = np.asarray(Image.open(tmp_path / "sheet.png"))[4:244, 4:244]
    is_green = (tile == (0, 230, 118)).all(axis=2)
    rows, columns = np.nonzero(is_green)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (40 + 40, 40 + 119, 40, 119)
    assert not is_green[90:110, 50:110].any()  # the image stays visible inside


def test_problems_are_on_the_sheet_too(tmp_path):
    folder = write_dataset(tmp_path / "kvasir", {"train": 60})
    Image.new("L", (30, 20)).save(folder / "masks" / "train31.png")
    overview = inspect_dataset("kvasir", str(folder), DatasetSettings(), 0)
    captions = [caption for _, caption in draw_pictures(overview, 12)]
    assert len(captions) == 12
    assert captions[-1] == "EMPTY MASK: train31.png\nkvasir, train: 0 % of 30 x 20\nlesion"


def test_datasets_have_names(tmp_path, capsys):
    first, second = (write_dataset(tmp_path / name / "data", {"train": 1}) for name in ("a", "b"))
    code, out, err = show(capsys, first, second)
    assert (code, err) == (
        2,
        f"error: two datasets have the name data; give one of them another name, as NAME={second}\n",
    )
    code, out, _ = show(capsys, f"one={first}", second)
    assert code == 0 and out.startswith(f"one: {first}\n") and f"\ndata: {second}\n" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "dataset nowhere: "),
        (["x", "--set", "data.mask_treshold=0"], "did you mean 'data.mask_threshold'?"),
        (["x", "--size", "0"], "--size is 0; it must be 1 or more"),
        (["x", "--limit", "-1"], "--limit is -1; it must be 0 or more"),
        (["x", "--sheet", "a.bmp"], "its name must end with .png"),
        ([], "the following arguments are required"),
    ],
)
def test_wrong_words_end_with_2_and_one_sentence(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert code == 2 and message in captured.err and not captured.out


def test_the_help_names_the_settings(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "data.mask_threshold=127" in out and "--sheet" in out and "exit codes: 0 done" in out


def test_a_prefix_of_a_store_is_a_dataset_too(tmp_path, s3_folder, capsys):
    folder = write_dataset(tmp_path / "kvasir", {"train": 2})
    for path in (path for path in folder.rglob("*") if path.is_file()):
        storage.write_bytes(f"{s3_folder}/kvasir/{path.relative_to(folder)}", path.read_bytes())
    code, out, _ = show(capsys, f"{s3_folder}/kvasir", "--sheet", f"{s3_folder}/sheet.png")
    assert code == 0
    assert out.startswith(
        f"kvasir: {s3_folder}/kvasir\n  layout      anns/train.json\n  images      images/*.png (2)\n"
    )
    assert storage.read_bytes(f"{s3_folder}/sheet.png").startswith(b"\x89PNG")


def test_the_sheet_says_how_many_of_how_many_it_shows(tmp_path, capsys):
    folder = write_dataset(tmp_path / "kvasir", {"train": 50, "test": 10})
    _, out, _ = show(capsys, folder, "--sheet", tmp_path / "sheet.png")
    words = r"sheet.png: (\d+) of 60 examples, spread evenly, those with problems last, with outlines"
    assert 40 <= int(re.search(words, out)[1]) <= 54
    few = write_dataset(tmp_path / "few", {"train": 1})
    _, out, _ = show(capsys, few, "--sheet", tmp_path / "sheet.png")
    assert "sheet.png: 1 of 1 example, with outlines" in out


def test_a_setting_for_a_dataset_that_does_not_exist_is_refused(tmp_path, capsys):
    folder = write_dataset(tmp_path / "kvasir", {"train": 1})
    for word in ("data.prompts.kvasr=polyp", "data.image_folders.kvasr=x", "data.classes={kvasr: {1: polyp}}"):
        code, _, err = show(capsys, folder, "--set", word)
        assert (
            code == 2 and "names kvasr, but there is no such dataset; did you mean kvasir? the dataset is kvasir" in err
        )
    assert show(capsys, f"kvasr={folder}", "--set", "data.prompts.kvasr=polyp")[0] == 0


def test_datasets_of_a_list_and_of_other_jobs_are_known():
    settings = DatasetSettings(prompts={"a": "polyp", "b": "lesion"})
    settings.refuse_unknown(["a", "b"])
    settings.beside(["b"]).refuse_unknown(["a"])
    with pytest.raises(ConfigError, match="data.prompts names b, but there is no such dataset; the dataset is a"):
        settings.refuse_unknown(["a"])
    assert settings.beside(["b"]).allowing(("x",)).model_copy(update={"mask_threshold": 0})._others == ("b",)
