import json
import re

import numpy as np
import pytest
from PIL import Image

from jobs.phantoms import draw_phantom
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.inspection import (
    check_facts,
    describe_findings,
    digest_examples,
    examples_table,
    inspect_record,
    records_from_table,
)
from vlsm.datasets.read import read_dataset
from vlsm.training.settings import DataSettings


@pytest.fixture
def dataset(tmp_path):
    """Three good records of each split, and a function that writes them after a change."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks", "anns"):
        (tmp_path / name).mkdir()
    splits = {}
    for split in ("train", "val", "test"):
        splits[split] = []
        for number in range(3):
            image, masks = draw_phantom(rng)
            name = f"{split}{number}.png"
            Image.fromarray(image).save(tmp_path / "images" / name)
            Image.fromarray(masks["lesion"] * 255).save(tmp_path / "masks" / name)
            splits[split].append({"img_name": name, "mask_name": name, "prompts": {"p1": "lesion", "p2": ["a", "b"]}})

    def inspect(**settings):
        for split, rows in splits.items():
            (tmp_path / "anns" / f"{split}.json").write_text(json.dumps(rows))
        records = read_dataset("mine", str(tmp_path))
        reader = ExampleReader(DataSettings(**settings))
        return records, [inspect_record(record, reader) for record in records]

    inspect.folder, inspect.splits = tmp_path, splits
    return inspect


def found(records, facts):
    return [(finding.kind, finding.split, finding.where.rsplit(", ", 1)[-1]) for finding in check_facts(records, facts)]


def test_a_good_dataset_gives_no_findings(dataset):
    records, facts = dataset()
    assert found(records, facts) == []
    assert describe_findings(records, []) == [f"{'mine':16} {split:6} {3:8,} records" for split in dataset.splits]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "masks" / "train1.png").unlink(), "missing: there is no file"),
        (lambda folder: (folder / "images" / "train1.png").write_bytes(b""), "0 bytes"),
        (lambda folder: (folder / "images" / "train1.png").write_bytes(b"text"), "is not a JPEG"),
        (
            lambda folder: Image.new("L", (5, 6), 255).save(folder / "masks" / "train1.png"),
            "are of different sizes, .* and 5 x 6",
        ),
    ],
)
def test_a_broken_record_is_named_with_its_reason(dataset, spoil, message):
    spoil(dataset.folder)
    records, facts = dataset()
    (finding,) = check_facts(records, facts)
    assert finding.is_broken and finding.where.endswith("train.json, record 2") and "train1.png" in finding.message
    assert re.search(message, finding.message)
    lines = describe_findings(records, [finding])
    assert lines[0] == f"{'mine':16} train  {3:8,} records, 1 broken"
    assert lines[-1].startswith("broken: dataset mine, ")


def test_empty_masks_are_told(dataset):
    height_width = Image.open(dataset.folder / "images" / "val0.png").size
    Image.new("L", height_width, 100).save(dataset.folder / "masks" / "val0.png")
    assert found(*dataset()) == [("empty mask", "val", "record 1")]
    assert found(*dataset(mask_threshold=99)) == [("full mask", "val", "record 1")]


def test_noise_of_jpeg_masks_is_no_foreground(dataset):
    mask = Image.open(dataset.folder / "masks" / "val0.png")
    mask.convert("RGB").save(dataset.folder / "masks" / "val0.jpg", quality=30)
    dataset.splits["val"][0]["mask_name"] = "val0.jpg"
    _, facts = dataset()
    assert facts[3].area_fraction == pytest.approx(np.mean(np.asarray(mask) > 0), rel=0.05)


def test_the_same_image_in_two_splits_is_told_and_in_one_it_is_fine(dataset):
    dataset.splits["test"].append(dataset.splits["train"][1])
    dataset.splits["train"].append(dataset.splits["train"][2] | {"mask_name": "train0.png"})
    records, facts = dataset()
    assert ("in two splits", "test", "record 4") in found(records, facts)
    assert not [
        finding
        for finding in check_facts(records, facts)
        if finding.kind == "in two splits" and finding.split == "train"
    ]


def test_an_image_coded_again_is_alike(dataset):
    image = Image.open(dataset.folder / "images" / "train2.png").convert("RGB")
    image.resize((image.width // 2, image.height // 2)).save(dataset.folder / "images" / "again.jpg", quality=60)
    mask = Image.open(dataset.folder / "masks" / "train2.png")
    mask.resize((image.width // 2, image.height // 2)).save(dataset.folder / "masks" / "again.png")
    dataset.splits["val"].append(dataset.splits["val"][0] | {"img_name": "again.jpg", "mask_name": "again.png"})
    records, facts = dataset()
    (finding,) = check_facts(records, facts)
    assert (finding.kind, finding.split) == ("alike in two splits", "val")
    assert "again.jpg looks like" in finding.message and "train2.png in train of mine" in finding.message


def test_records_survive_their_table_and_the_digest_is_of_contents(dataset):
    records, facts = dataset()
    table = examples_table(records, facts)
    assert records_from_table(table) == records
    digest = digest_examples(table)
    dataset.splits["train"][0]["prompts"]["p1"] = "polyp"
    assert digest_examples(examples_table(*dataset())) != digest
