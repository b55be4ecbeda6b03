"""Files of annotation tools that nobody should have made: one sentence, little memory, nothing outside the folder."""

import io
import json
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.labels.conftest import submit, write_json
from tests.test_hostile import edits, mutate
from vlsm import limits
from vlsm.errors import ImageError, ManifestError
from vlsm.labels import files
from vlsm.labels.coco import read_coco_reviews
from vlsm.labels.files import read_reviews
from vlsm.labels.geojson import read_geojson
from vlsm.labels.label_studio import read_tasks
from vlsm.labels.reviews import Brush, Outline, Segmentation, draw_shapes

many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZE = (41, 57)


def sources(run):
    (tasks,) = run.export("label-studio").glob("tasks-*.json")
    yield "label-studio", json.dumps(submit(json.loads(tasks.read_text()))).encode()
    (polygons,) = run.export("label-studio", "--polygons").glob("tasks-*.json")
    yield "label-studio", json.dumps(submit(json.loads(polygons.read_text()))).encode()
    yield "cvat", (run.export("cvat") / "cvat.zip").read_bytes()
    yield "coco", (run.export("coco") / "coco.json").read_bytes()
    yield "geojson", (run.export("qupath") / "drawn/rings.png.geojson").read_bytes()


@many
@given(number=st.integers(0, 4), changes=edits, end=st.one_of(st.just(1.0), st.floats(0, 1)))
@example(number=2, changes=[(0.99609375, b"\x01")], end=1.0)  # a zip whose members lie before its beginning
def test_mutated_files_are_reviews_or_errors_of_ours(number, changes, end, small_run):
    kept = small_run.folder / "sources"
    if not kept.exists():
        kept.mkdir()
        for index, (name, data) in enumerate(sources(small_run)):
            (kept / f"{index}.{name}").write_bytes(data)
    (path,) = kept.glob(f"{number}.*")
    name = path.suffix[1:]
    target = small_run.folder / f"mutated.{'zip' if name == 'cvat' else 'json'}"
    target.write_bytes(mutate(path.read_bytes(), changes, end))
    try:
        reviews = [review for group in read_reviews(str(target), name) for review in group]
    except ManifestError as error:
        assert str(target) in str(error) and len(str(error)) < 1000
        return
    for review in reviews:
        for shapes in review.shapes.values():
            try:
                mask = draw_shapes(shapes, SIZE, review.where)
            except ImageError as error:
                assert len(str(error)) < 1000
            else:
                assert (mask.shape, mask.dtype) == (SIZE, np.uint8) and mask.max(initial=0) <= 1


VALUES = [None, True, 1, -1, 1e300, "x", [], {}, [[]], [{}], {"a": 1}, [1, "x"], [None], {"points": [[1]]}]


@pytest.mark.parametrize("read", [read_tasks, read_coco_reviews, lambda value, where: read_geojson(value, where, "a")])
@pytest.mark.parametrize(
    "key", ["data", "annotations", "result", "value", "images", "categories", "features", "geometry"]
)
def test_values_of_another_type_are_reviews_or_errors_of_ours(read, key):
    for value in VALUES:
        region = {
            "type": "brushlabels",
            "original_width": 2,
            "original_height": 2,
            "value": {"rle": [1], "format": "rle"},
        }
        task = {"data": {"image": "a.png"}, "annotations": [{"result": [region]}]}
        coco = {"images": [{"id": 1, "file_name": "a", "height": 2, "width": 2}], "annotations": [], "categories": []}
        feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1, 0], [1, 1]]]}}
        collection = {"type": "FeatureCollection", "features": [feature]}
        for content in (task, coco, collection):
            text = json.dumps(content)
            changed = json.loads(
                text, object_hook=lambda found, value=value: found | {key: value} if key in found else found
            )
            try:
                reviews = list(read(changed if content is not task else [changed], "file.json"))
            except ManifestError as error:
                assert "file.json" in str(error)
            else:
                assert all(review.where.startswith("file.json") for review in reviews)


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ([Brush(b"\xff" * 100)], "the image has 2,337"),
        ([Outline(([0, 0, 1],))], "x and y of three or more corners"),
        ([Outline(([0, 0, 9, 9, 0, 9], [[1]]))], "x and y of three or more corners"),
        ([Outline(([0, 0, 1e300, 9, 0, 9],))], "far outside of the image"),
        ([Outline(([0, 0, float("nan"), 9, 0, 9],))], "far outside of the image"),
        ([Outline(([0, 0, 50, 40] * 100_000,))], "an outline of 10,000,000 pixels"),
        ([Segmentation({"counts": [10**9], "size": [41, 57]})], "its run lengths have"),
        ([Segmentation({"counts": "~~~", "size": [41, 57]})], "are damaged"),
        ([Segmentation({"counts": "1", "size": [10**6, 10**6]})], "have the size"),
        ([Outline(([0, 0, 1, 0, 1, 1],))] * (limits.MAX_REGIONS + 1), "100,001 regions; 100,000 are read"),
    ],
)
def test_damaged_shapes_are_one_sentence(shapes, reason):
    with pytest.raises(ImageError, match=reason) as caught:
        draw_shapes(shapes, SIZE, "file.json, task 1")
    assert len(str(caught.value)) < 500


def test_a_long_file_and_a_bomb_in_a_zip_are_refused_with_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 1000)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("annotations/instances_default.json", b" " * 200_000_000)
    (tmp_path / "a.zip").write_bytes(bomb.getvalue())
    tracemalloc.start()
    try:
        with pytest.raises(ManifestError, match="is longer than 1,000 bytes; export the project in parts"):
            list(read_reviews(str(tmp_path / "a.zip"), "cvat"))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(limits.MAX_JSON_BYTES + 1)
    with pytest.raises(ManifestError, match=r"a.json is longer than 134,217,728 bytes; export the project in parts"):
        list(read_reviews(str(tmp_path / "a.json"), "label-studio"))


def test_a_zip_with_another_content_is_one_sentence(tmp_path):
    for name, message in (
        ("x/y.txt", "has no annotations/instances_"),
        ("annotations/instances_a.json", "is not JSON"),
    ):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr(name, b"{")
        with pytest.raises(ManifestError, match=message):
            list(read_reviews(str(tmp_path / "a.zip"), "cvat"))
    (tmp_path / "a.zip").write_bytes(b"PK\3\4" + b"x" * 50)
    with pytest.raises(ManifestError, match="cannot be read as a zip"):
        list(read_reviews(str(tmp_path / "a.zip"), "cvat"))


def test_names_that_lead_elsewhere_open_and_write_nothing(small_run, capsys):
    """A name only finds an image of the run. Paths of written files come from the run."""
    content = json.loads((small_run.export("coco") / "coco.json").read_text())
    for image in content["images"]:
        image["file_name"] = f"../../../{image['file_name']}"
    before = {path for path in small_run.folder.parent.rglob("*")}
    path = small_run.read(write_json(small_run.folder / "a.json", content), "coco")
    written = {each for each in small_run.folder.parent.rglob("*")} - before
    assert all(each == small_run.folder / "a.json" or path.parent in (each, *each.parents) for each in written)
    capsys.readouterr()
    uri = "file:///etc/passwd"
    task = {"data": {"image": uri, "image_uri": uri, "image_id": uri}, "annotations": [{"result": []}]}
    small_run.read(write_json(small_run.folder / "b.json", [task]), "label-studio", "--json", code=1)
    assert json.loads(capsys.readouterr().out)["refused"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere.json", "a.csv", "--format", "coco"), "does not exist"),
        (("a.json", "a.txt", "--format", "coco"), "ends with '.txt'; it must end with .parquet, .csv, .jsonl"),
        (("a.json", "s3://bucket/a.csv", "--format", "coco"), "is not a local file"),
        (("a.json", "a.csv", "--format", "masks"), "needs the folder of the masks"),
        (("empty", "a.csv", "--format", "geojson"), "has no files of the format geojson"),
        (("empty", "a.csv", "--format", "masks"), "has no files of the format masks"),
        (("a.json", "a.csv", "--format", "label-studio"), "export the project as JSON, not as JSON-MIN"),
        (("a.json", "a.csv", "--format", "coco", "--filter", "x == 1"), "unknown column 'x'"),
    ],
)
def test_wrong_words_are_one_sentence(small_run, monkeypatch, capsys, words, message):
    from vlsm.labels.__main__ import main

    monkeypatch.chdir(small_run.folder)
    (small_run.folder / "empty").mkdir()
    write_json(small_run.folder / "a.json", [{"image": "a.png", "brush": []}])
    assert main([*words, "--run", str(small_run.output)]) == 2
    assert message in capsys.readouterr().err
    assert not list(small_run.folder.glob("*.partial")) and not (small_run.folder / "a.csv").exists()


def test_a_run_in_a_store_lends_no_other_place_to_the_list(tmp_path, s3_folder, capsys):
    from tests.export.test_coco import make_row
    from vlsm import storage
    from vlsm.labels.__main__ import main
    from vlsm.runs.results import write_part

    output = f"{s3_folder}/out"
    write_part(output, 0, [make_row("/etc/passwd", image_id="a.png"), make_row(f"{s3_folder}/b.png")], "run", 0)
    storage.write_bytes(f"{output}/config.yaml", b"config: {input: x, prompts: [polyp]}\nplan: {}\n")
    images = [{"id": n, "file_name": name, "height": 40, "width": 60} for n, name in enumerate(["a.png", "b.png"])]
    source = write_json(tmp_path / "a.json", {"images": images, "annotations": [], "categories": []})
    words = [str(source), str(tmp_path / "a.csv"), "--format", "coco", "--run", output, "--json"]
    assert main(words) == 1
    assert json.loads(capsys.readouterr().out)["refused"] == 1
    assert "passwd" not in (tmp_path / "a.csv").read_text()
    words[1] = str(tmp_path / "again.csv")
    assert main([*words, "--allow", "/etc"]) == 0
