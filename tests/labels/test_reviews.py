"""What a review means: accepted, corrected, emptied, rejected, refused, not reviewed; and whose image it is about."""

import csv
import json
import shutil

import nibabel
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from tests.labels.conftest import PROMPTS, Run, annotation, hard_masks, submit, write_json
from vlsm.cells import read_cell
from vlsm.export.__main__ import main as export_main
from vlsm.images.brush_rle import encode_brush
from vlsm.labels.__main__ import main as labels_main
from vlsm.runs.marks import digest_mask
from vlsm.runs.results import read_rows
from vlsm.segmentation.masks import encode_mask

RINGS, BORDER = "drawn/rings.png", "drawn/border.png"


@pytest.fixture
def tasks(small_run):
    (file,) = small_run.export("label-studio").glob("tasks-*.json")
    tasks = json.loads(file.read_text())
    return {task["data"]["image_id"]: task for task in tasks}


def rows_of(path):
    with path.open(newline="") as file:
        rows = [{name: read_cell(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    return {(row["image_id"], row["prompt"]): row for row in rows}


def errors_of(path):
    with (path.parent / f"{path.stem}_masks" / "index.csv").open(newline="") as file:
        return [row["error"] for row in csv.DictReader(file) if row["error"]]


def told(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def region(mask, label, **more):
    height, width = mask.shape
    value = {"format": "rle", "rle": list(encode_brush(mask)), "brushlabels": [label]}
    known = {"type": "brushlabels", "from_name": "brush", "to_name": "image", "value": value, "image_rotation": 0}
    return known | {"id": label, "original_width": width, "original_height": height} | more


def test_a_correction_is_counted_with_its_dice(small_run, tasks, capsys):
    mask = small_run.masks[RINGS, "polyp"].copy()
    area = int(mask.sum())
    mask[3] = 0  # 53 pixels fewer
    done = submit(tasks.values())
    for task in done:
        if task["data"]["image_id"] == RINGS:
            task["annotations"][0]["result"] = [region(mask, "polyp")]
    path = small_run.read(write_json(small_run.folder / "a.json", done), "label-studio", "--json")
    found = told(capsys)
    assert (found["accepted"], found["corrected"], found["emptied"], found["rejected"]) == (3, 1, 0, 0)
    row = rows_of(path)[RINGS, "polyp"]
    expected = 2 * (area - 53) / (2 * area - 53)
    assert row["outcome"] == "corrected" and float(row["prediction_dice"]) == pytest.approx(expected)
    assert found["prompts"]["polyp"]["dice_mean"] == pytest.approx((1 + expected) / 2)
    np.testing.assert_array_equal(np.asarray(Image.open(path.parent / row["mask_uri"])) > 0, mask > 0)


def test_an_emptied_mask_is_a_negative_and_a_skipped_task_is_rejected(small_run, tasks, capsys):
    emptied, skipped = tasks[RINGS], tasks[BORDER]
    done = [*submit([emptied], result=[]), *submit([skipped], was_cancelled=True)]
    path = small_run.read(write_json(small_run.folder / "a.json", done), "label-studio", "--json")
    found = told(capsys)
    assert (found["accepted"], found["corrected"], found["emptied"], found["rejected"]) == (1, 1, 1, 2)
    assert {key: (row["mask_uri"], row["outcome"]) for key, row in rows_of(path).items()} == {
        (RINGS, "polyp"): ("none", "corrected"),
        (RINGS, PROMPTS[1]): ("none", "accepted"),
    }


def test_a_task_without_annotations_was_not_reviewed(small_run, tasks, capsys):
    done = [tasks[RINGS] | {"annotations": []}, *submit([tasks[BORDER]])]
    small_run.read(write_json(small_run.folder / "a.json", done), "label-studio", "--json")
    found = told(capsys)
    assert (found["planned"], found["accepted"], found["corrected"], found["refused"]) == (4, 2, 0, 0)


@pytest.mark.parametrize("annotations", ["x", {"result": []}, ["x"], 3])
def test_annotations_that_are_no_list_are_refused(small_run, tasks, capsys, annotations):
    done = [tasks[RINGS] | {"annotations": annotations}, *submit([tasks[BORDER]])]
    small_run.read(write_json(small_run.folder / "p.json", done), "label-studio", "--json", code=1)
    assert told(capsys)["refused"] == 2  # of both prompts
    assert "annotations are no list" in (small_run.folder / "new/corrected_masks/index.csv").read_text()


@pytest.mark.parametrize("result", ["x", [1], {"type": "brushlabels"}, None])
def test_a_damaged_result_is_no_empty_mask(small_run, tasks, capsys, result):
    done = submit([tasks[RINGS], tasks[BORDER]])
    done[0]["annotations"][0]["result"] = result
    small_run.read(write_json(small_run.folder / "p.json", done), "label-studio", "--json", code=1)
    assert (found := told(capsys))["refused"] == 2 and found["corrected"] == 0
    assert "result is no list of regions" in (small_run.folder / "new/corrected_masks/index.csv").read_text()


def test_a_volume_is_not_found_by_the_name_of_a_mask(small_run, capsys):
    """Its pixels may lie otherwise."""
    source = small_run.export("masks")
    for path in source.rglob("*.png"):
        mask = (np.asarray(Image.open(path)) > 0).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), path.with_suffix(".nii"))
        path.unlink()
    small_run.read(source, "masks", "--json", code=1)
    assert (found := told(capsys))["accepted"] == found["corrected"] == 0 and found["refused"] == 4


def test_only_a_long_file_is_to_be_exported_in_parts(small_run, tasks, capsys):
    text = json.dumps(list(tasks.values()))
    (small_run.folder / "p.json").write_text(text[: len(text) // 2])
    small_run.read(small_run.folder / "p.json", "label-studio", code=2)
    assert "is not JSON" in (error := capsys.readouterr().err) and "in parts" not in error


def test_masks_that_a_program_wrote_in_another_format_are_found(small_run, capsys):
    source = small_run.export("masks")
    for path in source.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".tif"))
        path.unlink()
    small_run.read(source, "masks", "--json")
    assert (told := json.loads(capsys.readouterr().out.splitlines()[-1]))["accepted"] == 4 and not told["refused"]


def test_the_latest_annotation_counts_unless_one_is_the_ground_truth(small_run, tasks):
    empty = annotation(tasks[RINGS], result=[], updated_at="2026-05-05T00:00:00Z")
    early = annotation(tasks[RINGS])
    late_skip = annotation(tasks[RINGS], was_cancelled=True, updated_at="2026-06-06T00:00:00Z")
    for annotations, uri in (
        ([empty, early, late_skip], "none"),
        ([early | {"ground_truth": True}, empty], "corrected_masks/drawn/rings.png.polyp.png"),
        ([early | {"updated_at": "2026-05-06T00:00:00Z"}, empty], "corrected_masks/drawn/rings.png.polyp.png"),
    ):
        done = [{"data": tasks[RINGS]["data"], "annotations": annotations}]
        path = small_run.read(write_json(small_run.folder / "a.json", done), "label-studio")
        assert rows_of(path)[RINGS, "polyp"]["mask_uri"] == uri


def test_separate_brush_and_labels_and_several_regions_are_joined(small_run, tasks):
    mask = small_run.masks[RINGS, "polyp"]
    halves = [mask.copy(), mask.copy()]
    halves[0][:20], halves[1][20:] = 0, 0
    brush = region(halves[0], "x", id="a", type="brush")
    brush["value"].pop("brushlabels")
    named = brush | {"type": "labels", "value": brush["value"] | {"labels": ["polyp"]}}
    result = [brush, named, region(halves[1], "polyp", id="b")]
    done = submit([tasks[RINGS]], result=result)
    path = small_run.read(write_json(small_run.folder / "a.json", done), "label-studio")
    assert rows_of(path)[RINGS, "polyp"]["outcome"] == "accepted"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"original_width": 58}, "than the region before it"),
        ({"image_rotation": 90}, "was rotated in Label Studio"),
        ({"type": "rectanglelabels"}, "only brushes and polygons are masks"),
        ({"value": {"format": "rle", "rle": [1, 2], "brushlabels": ["polyp"]}}, "the run lengths of the brush hold"),
        ({"value": {"format": "rle", "rle": [1, 999], "brushlabels": ["polyp"]}}, "range(0, 256)"),
        ({"value": {"points": [[1, 2], [3]], "brushlabels": ["polyp"]}}, "inhomogeneous"),
        ({"value": {"points": [[1, 2], [3, "x"]], "brushlabels": ["polyp"]}}, "could not convert"),
        ({"value": {"points": [[1, 2], [3, 1e9], [1, 1]], "brushlabels": ["polyp"]}}, "far outside of the image"),
        ({"value": {"points": [[1, 2], [3, float("nan")], [1, 1]], "brushlabels": ["polyp"]}}, "far outside"),
        ({"value": {"format": "rle", "rle": [1], "brushlabels": []}}, "a region has no label"),
        ({"item_index": 1}, "several images"),
    ],
)
def test_a_damaged_region_refuses_its_image_and_no_other(small_run, tasks, capsys, change, reason):
    done = submit(tasks.values())
    for task in done:
        if task["data"]["image_id"] == RINGS:
            result = task["annotations"][0]["result"]
            task["annotations"][0]["result"] = [result[0], result[0] | {"id": "other"} | change]
    path = small_run.read(write_json(small_run.folder / "a.json", done), "label-studio", "--json", code=1)
    found, errors = told(capsys), errors_of(path)
    assert (found["accepted"], found["corrected"]) == (2, 0) or found["refused"] == 1
    assert errors and reason in errors[0] and len(errors[0]) < 500


def test_another_size_is_refused(small_run, capsys):
    content = json.loads((small_run.export("coco") / "coco.json").read_text())
    next(image for image in content["images"] if "rings" in image["file_name"])["width"] += 1
    path = small_run.read(write_json(small_run.folder / "a.json", content), "coco", "--json", code=1)
    assert told(capsys)["accepted"] == 2
    assert "has 58 x 41 pixels; the image has 57 x 41" in errors_of(path)[0]


def test_a_label_that_is_no_prompt_is_told_and_the_others_stay(small_run, tasks, capsys):
    done = submit(tasks.values())
    done[0]["annotations"][0]["result"].append(region(np.ones((3, 3), np.uint8), "fold") | {"original_width": 57})
    done[0]["annotations"][0]["result"][-1] |= (
        {"original_height": 41} if done[0]["data"]["image_id"] == RINGS else {"original_width": 5, "original_height": 7}
    )
    path = small_run.read(write_json(small_run.folder / "a.json", done), "label-studio", "--json", code=1)
    assert told(capsys)["accepted"] == 4
    assert "the label 'fold' is no prompt of the run" in errors_of(path)[0]


def test_prompts_that_were_not_exported_were_not_reviewed(small_run, capsys):
    (file,) = small_run.export("label-studio", "--filter", "prompt == polyp").glob("tasks-*.json")
    done = write_json(small_run.folder / "a.json", submit(json.loads(file.read_text())))
    assert set(rows_of(small_run.read(done, "label-studio"))) == {(RINGS, "polyp"), (BORDER, "polyp")}
    source = small_run.export("qupath", "--filter", "prompt == polyp")
    path = small_run.read(source, "geojson", "--filter", "prompt == polyp")
    assert set(rows_of(path)) == {(RINGS, "polyp"), (BORDER, "polyp")}


def test_uploads_of_label_studio_are_found_by_their_names(small_run, tasks):
    done = submit(tasks.values())
    for task, name in zip(done, [name.rpartition("/")[2] for name in tasks], strict=True):
        task["data"] = {"image": f"/data/upload/17/1a2b3c4d-{name}"}
    rows = rows_of(small_run.read(write_json(small_run.folder / "a.json", done), "label-studio"))
    assert {row["outcome"] for row in rows.values()} == {"accepted"} and len(rows) == 4
    for task, name in zip(done, tasks, strict=True):
        task["data"] = {"image": f"http://host/data/local-files/?d=scans/{name}"}
    assert len(rows_of(small_run.read(write_json(small_run.folder / "a.json", done), "label-studio"))) == 4


def coco_of(*names, size=(41, 57), mask=None):
    images = [
        {"id": number, "file_name": name, "height": size[0], "width": size[1]} for number, name in enumerate(names)
    ]
    segmentation = {"size": list(size), "counts": encode_mask(np.ones(size, np.uint8) if mask is None else mask)}
    annotations = [{"image_id": image["id"], "category_id": 1, "segmentation": segmentation} for image in images]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "polyp"}]}


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["rings.png", "drawn/rings.jpg"], "are about the same image; only one can count"),
        (["other.png"], "no image of the run is named 'other.png'"),
        (["ngs.png"], "no image of the run is named 'ngs.png'"),
        (["../../drawn/rings.png/x"], "no image of the run is named"),
    ],
)
def test_names_that_are_no_image_or_two_are_refused(small_run, capsys, names, reason):
    path = small_run.read(write_json(small_run.folder / "a.json", coco_of(*names)), "coco", "--json", code=1)
    found = told(capsys)
    assert found["refused"] == len(names) and found["accepted"] + found["corrected"] == 0
    assert reason in errors_of(path)[0]


def test_a_name_of_two_images_is_refused_and_a_longer_one_is_not(tmp_path, capsys):
    from tests.labels.conftest import Run, hard_masks

    mask = hard_masks()["drawn/rings.png"]
    run = Run(tmp_path, {"a/x/1.png": mask, "b/x/1.png": mask, "1.png": mask})
    path = run.read(write_json(tmp_path / "c.json", coco_of("x/1.png")), "coco", "--json", code=1)
    assert told(capsys)["refused"] == 1
    assert "fits several images" in errors_of(path)[0] and "'a/x/1.png'" in errors_of(path)[0]
    path = run.read(write_json(tmp_path / "c.json", coco_of("b/x/1.jpg", "1.png", mask=mask)), "coco", name="n/c.csv")
    assert {key for key, row in rows_of(path).items() if row["outcome"] == "accepted" and key[1] == "polyp"} == {
        ("b/x/1.png", "polyp"),
        ("1.png", "polyp"),
    }


def test_masks_of_one_prompt_may_be_named_after_their_image(tmp_path, capsys):
    from tests.labels.conftest import Run, hard_masks

    run = Run(tmp_path, {"drawn/rings.png": hard_masks()["drawn/rings.png"]})
    folder = tmp_path / "edited"
    folder.mkdir()
    edited = run.masks[RINGS, "polyp"].copy()
    edited[0, 0] = 1
    Image.fromarray(edited).save(folder / "rings.png")  # of 0 and 1
    path = run.read(folder, "masks", "--json", code=1)
    assert "does not tell its prompt" in errors_of(path)[0]
    capsys.readouterr()
    path = run.read(folder, "masks", "--json", "--filter", "prompt == polyp", name="n/c.csv")
    assert told(capsys)["corrected"] == 1
    row = rows_of(path)[RINGS, "polyp"]
    np.testing.assert_array_equal(np.asarray(Image.open(path.parent / row["mask_uri"])), edited * 255)
    Image.fromarray(edited[:-1]).save(folder / "rings.png")
    path = run.read(folder, "masks", "--filter", "prompt == polyp", code=1)
    assert "has 57 x 40 pixels; the image has 57 x 41" in errors_of(path)[0]


def test_objects_of_qupath_without_a_class_belong_to_the_only_prompt(small_run):
    source = small_run.export("qupath")
    for path in source.rglob("*.geojson"):
        content = json.loads(path.read_text())
        content["features"] = [
            each for each in content["features"] if "polyp" == each["properties"]["classification"]["name"]
        ]
        for feature in content["features"]:
            del feature["properties"]["classification"]
        path.write_text(json.dumps(content["features"]))  # older versions write a list
    path = small_run.read(source, "geojson", "--filter", "prompt == polyp")
    assert {row["outcome"] for row in rows_of(path).values()} == {"accepted"}
    path = small_run.read(source, "geojson", code=1, name="n/c.csv")
    assert "objects without a class" in errors_of(path)[0]


def test_lines_of_text_tell_what_was_reviewed(small_run, capsys):
    source = small_run.export("masks")
    shutil.rmtree(small_run.folder / "masks" / "none", ignore_errors=True)
    small_run.read(source, "masks")
    first, second, *_, last = capsys.readouterr().out.splitlines()[-4:]
    assert first.startswith("4 masks of 4 reviewed: 4 accepted, 0 corrected (0 of them emptied), 0 rejected; 0 refused")
    assert second == "polyp: Dice of the predictions 1.000 on average, median 1.000, over 2 masks"
    assert last.startswith("4 examples in ") and "train with --dataset NAME=" in last


def test_marks_of_the_report_accept_masks_as_they_are_and_leave_out_the_others(small_run, capsys, caplog):
    caplog.set_level("INFO", logger="vlsm")
    config = yaml.safe_load((small_run.output / "config.yaml").read_text())
    (small_run.output / "config.yaml").write_text(yaml.safe_dump(config | {"run_id": "run"}))
    rows = {(row["image_id"], row["prompt"]): row for row in read_rows(str(small_run.output))}
    (first, second), (prompt, other) = sorted({image_id for image_id, _ in rows}), PROMPTS
    digests = {key: digest_mask(row["mask_rle"]) for key, row in rows.items()}

    def save(*marks, run="run"):
        keys = ("image_id", "prompt", "mark", "mask_digest")
        content = {"kind": "vlsm.marks", "run_id": run, "marks": [dict(zip(keys, mark, strict=True)) for mark in marks]}
        return write_json(small_run.folder / "marks.json", content)

    accepted, redo = (first, prompt, "accept", digests[first, prompt]), (first, other, "redo", None)
    source = save(accepted, redo, (second, prompt, "reject", None), (second, other, "accept", None))
    frame = pd.read_csv(small_run.read(source, "marks"))
    assert frame[["image_id", "prompt", "outcome", "prediction_dice"]].values.tolist() == [
        [first, prompt, "accepted", 1]
    ]
    mask = np.asarray(Image.open(small_run.folder / "new" / frame["mask_uri"][0]))
    assert np.array_equal(mask > 0, small_run.masks[first, prompt] > 0)
    assert "1 accepted, 0 corrected (0 of them emptied), 2 rejected" in capsys.readouterr().out
    assert "1 mask must be made again: not in the list" in caplog.text
    small_run.read(save((first, prompt, "accept", "0" * 16)), "marks", code=1, name="again/corrected.csv")
    assert (
        "the mask was made again after the mark" in (small_run.folder / "again/corrected_masks/index.csv").read_text()
    )
    small_run.read(save(accepted, run="another"), "marks", code=2, name="other/corrected.csv")
    assert "are of the segment run another" in capsys.readouterr().err


def test_a_label_with_another_name_is_no_emptied_mask(small_run, tasks, capsys):
    done = submit(tasks.values())
    for task in done:
        task["annotations"][0]["result"] = [
            one | {"value": {**one["value"], "brushlabels": ["Polyp"]}} for one in task["annotations"][0]["result"]
        ]
    small_run.read(write_json(small_run.folder / "a.json", done), "label-studio", "--json", code=1)
    counts = told(capsys)
    assert (counts["corrected"], counts["emptied"]) == (0, 0)  # what was empty before is accepted as empty
    reasons = (small_run.folder / "new/corrected_masks/index.csv").read_text()
    assert "has no 'polyp', but 'Polyp', which is no prompt of the run" in reasons


def test_nothing_of_people_or_of_a_run_is_replaced(small_run, tasks, capsys):
    source = write_json(small_run.folder / "a.json", submit(tasks.values()))
    words = ["--format", "label-studio", "--run", str(small_run.output)]
    (small_run.folder / "mine.csv").write_text("mine")
    (small_run.folder / "hand_masks").mkdir()
    part = next((small_run.output / "masks").iterdir())
    before = part.read_bytes()
    for path, reason in (
        ("mine.csv", "exists, and may hold the work of people"),
        ("hand.csv", "exists, and may hold the work of people"),
        ("out/masks/new.csv", "lies in OUTPUT, which belongs to its run"),
        (f"out/masks/{part.name}", "lies in OUTPUT, which belongs to its run"),
    ):
        assert labels_main([str(source), str(small_run.folder / path), *words]) == 2
        assert reason in capsys.readouterr().err
    assert part.read_bytes() == before and (small_run.folder / "mine.csv").read_text() == "mine"
    assert export_main([str(small_run.output), str(small_run.output / "masks"), "--format", "masks"]) == 2


@pytest.mark.parametrize("values", [(0, 2), (0, 127), (20, 120), None], ids=str)
def test_a_file_that_is_no_mask_is_refused(tmp_path, values, capsys):
    run = Run(tmp_path, {"drawn/rings.png": hard_masks()["drawn/rings.png"]})
    source = run.folder / "edited"
    names = [path.relative_to(run.export("masks")) for path in run.export("masks").rglob("*polyp*.png")]
    for name in names:
        mask = np.asarray(Image.open(run.folder / "masks" / name)) > 0
        noise = np.random.default_rng(0).integers(0, 256, mask.shape).astype(np.uint8)
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise if values is None else np.where(mask, values[1], values[0]).astype(np.uint8)).save(
            source / name
        )
    run.read(source, "masks", "--json", code=1)
    assert told(capsys)["corrected"] == 0
    assert (
        "is no mask of 0 and 255, or 0 and 1; it has values such as"
        in (run.folder / "new/corrected_masks/index.csv").read_text()
    )
