import logging

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from vlsm.config import load_settings
from vlsm.datasets.completing import split_classes
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.read import read_dataset
from vlsm.datasets.records import Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ConfigError, ImageError
from vlsm.images.stored import COLOURS

INDEX = np.zeros((5, 7), np.uint8)
INDEX[1:3, 1:4], INDEX[3:, 4:] = 1, 2
COLOUR_OF = np.array([(0, 0, 0), (200, 0, 0), (255, 0, 0)], np.uint8)  # red has the same brightest channel as nothing
PALETTE = [0, 0, 0, 9, 9, 200, 200, 0, 0]


def with_palette(indices=INDEX):
    image = Image.fromarray(indices, "P")
    image.putpalette(PALETTE)
    return image


MASKS = {
    "grey.png": lambda: Image.fromarray(INDEX),
    "grey16.png": lambda: Image.fromarray(INDEX.astype(np.uint16)),
    "grey.tif": lambda: Image.fromarray(INDEX.astype(np.int32)),
    "palette.png": with_palette,
    "palette.gif": with_palette,
    "palette.bmp": with_palette,
    "palette.tif": with_palette,
    "index-in-rgb.png": lambda: Image.fromarray(INDEX).convert("RGB"),
}


def labelled(path, labels):
    return Record("d", "train", "1", str(path), str(path), {}, labels=labels)


@pytest.mark.parametrize("name", MASKS)
def test_a_class_is_found_by_its_number_whatever_its_colour(tmp_path, name):
    MASKS[name]().save(tmp_path / name)
    reader = ExampleReader(DatasetSettings())
    for labels in ((1,), (2,), (1, 2)):
        target = reader.read_mask(labelled(tmp_path / name, labels))
        np.testing.assert_array_equal(target.mask, np.isin(INDEX, labels))


@pytest.mark.parametrize("name", ["rgb.png", "rgba.png", "rgb.tif", "palette.png", "grey.png"])
def test_a_class_is_found_by_its_colour(tmp_path, name):
    indices = INDEX % 2 if name == "grey.png" else INDEX
    colours = COLOUR_OF[indices]
    image = {
        "palette.png": with_palette,
        "rgba.png": lambda: Image.fromarray(colours).convert("RGBA"),
        "grey.png": lambda: Image.fromarray(indices * 7),
    }.get(name, lambda: Image.fromarray(colours))()
    image.save(tmp_path / name)
    label, index = {"palette.png": (0xC80000, 2), "grey.png": (0x070707, 1)}.get(name, (0xFF0000, 2))
    target = ExampleReader(DatasetSettings()).read_mask(labelled(tmp_path / name, (COLOURS + label,)))
    np.testing.assert_array_equal(target.mask, indices == index)


def test_colours_of_more_than_8_bits_are_refused(tmp_path):
    Image.fromarray(INDEX.astype(np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="classes by colour need 8 bits"):
        ExampleReader(DatasetSettings()).read_mask(labelled(tmp_path / "a.png", (COLOURS + 1,)))


def test_an_image_turned_by_exif_keeps_its_palette_with_it(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    with_palette().save(tmp_path / "a.png", exif=exif)
    target = ExampleReader(DatasetSettings()).read_mask(labelled(tmp_path / "a.png", (2,)))
    np.testing.assert_array_equal(target.mask, np.rot90(INDEX, -1) == 2)


@pytest.fixture
def folder(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for name, indices in (("a", INDEX), ("b", INDEX * (INDEX == 1))):
        Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
        with_palette(indices).save(tmp_path / "masks" / f"{name}.png")
    return tmp_path


def read(folder, **settings):
    return read_dataset("kvasir", str(folder), DatasetSettings(**settings))


@pytest.mark.parametrize(
    "classes",
    [
        {1: "polyp", 2: "instrument"},
        {"1": "polyp", "2": "instrument"},
        {"kvasir": {1: "polyp", "2": "instrument"}, "other": {7: "x"}},
    ],
)
def test_each_class_is_a_record_and_an_absent_one_has_an_empty_mask(folder, classes):
    records = read(folder, classes=classes)
    assert [(record.prompts, record.labels) for record in records] == [
        ({"p1": ("polyp",)}, (1,)),
        ({"p1": ("instrument",)}, (2,)),
    ] * 2
    assert len({record.where for record in records}) == 4
    reader = ExampleReader(DatasetSettings())
    assert [int(reader.read(record).target.mask.sum()) for record in records] == [6, 6, 6, 0]


def test_absent_classes_are_left_out_on_request_and_that_is_told(folder, caplog):
    (folder / "masks" / "b.png").rename(folder / "masks" / "b_mask.png")
    Image.new("RGB", (7, 5)).save(folder / "images" / "c.png")
    (folder / "masks" / "c.png").write_bytes(b"broken")
    with caplog.at_level(logging.INFO, "vlsm"):
        records = read(folder, classes={1: "polyp", 2: "instrument", 5: "fold"}, absent_classes="skip")
    kept = [(record.image_uri[-5], record.prompts["p1"][0]) for record in records]
    # whether a broken mask shows a class is not known: the checks of the files tell that it is broken
    assert kept == [
        ("a", "polyp"),
        ("a", "instrument"),
        ("b", "polyp"),
        ("c", "polyp"),
        ("c", "instrument"),
        ("c", "fold"),
    ]
    assert "dataset kvasir: 3 of 9 records left out: their class is absent" in caplog.text


@pytest.mark.parametrize(
    ("classes", "values"), [({7: "polyp"}, "0, 1, 2"), ({"#000001": "polyp"}, "#000000, #0909c8, #c80000")]
)
def test_classes_that_no_mask_has_are_told_with_the_values_that_are_there(folder, classes, values):
    with pytest.raises(ConfigError, match=f"no mask has a class; .*a.png holds {values}; correct data.classes"):
        read(folder, classes=classes, absent_classes="skip")


def test_classes_of_one_prompt_are_one_class(folder):
    records = read(folder, classes={1: "lesion", "2": "lesion"})
    assert [record.labels for record in records] == [(1, 2)] * 2
    records = read(folder, classes={"#C80000": "lesion"})
    assert [record.labels for record in records] == [(COLOURS + 0xC80000,)] * 2


def test_instances_of_a_label_map_are_one_class_with_a_threshold_of_zero(folder):
    settings = DatasetSettings(mask_threshold=0, prompts={"kvasir": "nucleus"})
    Image.fromarray(INDEX).save(folder / "masks" / "a.png")
    record = read_dataset("kvasir", str(folder), settings)[0]
    np.testing.assert_array_equal(ExampleReader(settings).read(record).target.mask, INDEX > 0)
    assert record.prompts == {"p1": ("nucleus",)}


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"polyp": 1}, "'polyp' is no value of a mask and no colour"),
        ({"red": "polyp"}, "'red' is no value of a mask and no colour; give classes as {1: polyp}"),
        ({1: " "}, "class 1 has the prompt ' '; give words"),
        ({1: "polyp", "#ff0000": "fold"}, "1, #ff0000 are values and colours; give either"),
        ({1: "polyp", "kvasir": {1: "polyp"}}, "1 has no classes; give them for each dataset"),
    ],
)
def test_wrong_classes_are_refused(classes, message):
    with pytest.raises(ValidationError, match=message):
        DatasetSettings(classes=classes)


def test_classes_come_from_the_command_line_and_survive_a_file():
    words = ["classes={1: polyp, 2: fold}", "prompts.kvasir=polyp"]
    settings = load_settings(DatasetSettings, None, words, {})
    assert settings.classes == {1: "polyp", 2: "fold"} and settings.prompts == {"kvasir": ("polyp",)}
    assert DatasetSettings.model_validate(settings.model_dump(mode="json")) == settings


def test_nnunets_file_names_the_classes_unless_a_setting_does(folder):
    (folder / "dataset.json").write_text('{"labels": {"background": 0, "polyp": 1}}')
    (folder / "images").rename(folder / "imagesTr")
    (folder / "masks").rename(folder / "labelsTr")
    assert {record.labels for record in read(folder)} == {(1,)}
    assert {record.labels for record in read(folder, classes={2: "instrument"})} == {(2,)}


def test_classes_for_records_that_have_classes_already_are_not_used(caplog):
    records = [labelled("a.png", (2,))]
    assert split_classes("d", records, DatasetSettings(classes={1: "polyp"})) == records
    assert "dataset d: data.classes is not used: its masks have classes already" in caplog.text
