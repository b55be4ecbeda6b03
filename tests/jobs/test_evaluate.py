"""The evaluation job: its scores are those of the library alone, each is there once, and masks that exist count too."""

import json
import logging
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

import vlsm
from jobs import evaluate, segment
from tests.in_process import InProcess
from vlsm import storage
from vlsm.datasets.read import read_dataset
from vlsm.datasets.records import Record
from vlsm.images.decode import decode_image, decode_mask_file
from vlsm.segmentation.masks import decode_mask
from vlsm.segmentation.metrics import dice_score

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def labelled(drawn, tmp_path_factory):
    """Twelve records of six images: a label is broken, one is of another size, and one is empty."""
    folder = Path(shutil.copytree(drawn, tmp_path_factory.mktemp("labelled") / "drawn"))
    (folder / "masks" / "lesion" / "test_0001.png").write_bytes(b"no image")
    Image.new("L", (10, 10)).save(folder / "masks" / "stone" / "test_0002.png")
    empty = folder / "masks" / "stone" / "test_0003.png"
    Image.new("L", Image.open(empty).size).save(empty)
    return folder


@pytest.fixture(scope="module")
def words(labelled, bright_checkpoint, tiny_checkpoint):
    """The command line but OUTPUT."""
    both = [{"checkpoint": str(tiny_checkpoint)}, {"checkpoint": str(bright_checkpoint), "weight": 3}]
    words = ["--checkpoint", str(bright_checkpoint), "--checkpoint", str(tiny_checkpoint)]
    words += ["--dataset", f"drawn={labelled}", "--set", f"systems={json.dumps({'both of them': both})}"]
    return [*words, "--set", "prompts=[text:lesion, p1, p2]", "--set", "shard_rows=30"]


@pytest.fixture(scope="module")
def evaluated(words, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated") / "out"
    with pytest.MonkeyPatch.context() as patch:
        InProcess(patch)
        assert evaluate.main([str(output), *words, "--set", "prompt_robustness=true"]) == 0
    return output


@pytest.fixture(scope="module")
def rows(evaluated):
    return pq.read_table(evaluated / "scores.parquet").to_pylist()


def by_key(rows, *names):
    found = {tuple(row[name] for name in names): row for row in rows}
    assert len(found) == len(rows), "a key stands there twice"
    return found


@pytest.fixture
def run(caplog, capfd):
    """The job in this process: exit code, the JSON line, what it logged."""
    caplog.set_level(logging.INFO, logger="vlsm")

    def run(*arguments):
        capfd.readouterr()
        caplog.clear()
        code = evaluate.main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, json.loads(captured.out) if code == 0 else captured.out, caplog.text + captured.err

    return run


def test_every_record_prompt_and_system_is_there_once(rows, evaluated, bright_checkpoint, tiny_checkpoint):
    found = by_key(rows, "system", "record", "prompt_name")
    assert len(found) == 12 * (3 + 5) * 3
    assert {row["system"] for row in rows} == {bright_checkpoint.name, tiny_checkpoint.name, "both of them"}
    assert {row["prompt_class"] for row in rows if row["prompt_name"] == "p2"} == {"upper_bound"}
    summary = json.loads((evaluated / "summary.json").read_text())
    assert (summary["rows"], summary["failed"]) == (288, 2 * 8 * 3)


def test_scores_are_the_same_on_ray(rows, words, ray_cluster, tmp_path):
    checkpoint, dataset = words[1], words[words.index("--dataset") :][:2]
    more = ["--set", "prompts=[text:lesion, p1, p2]", "--set", "shard_rows=4", "--set", "prompt_robustness=true"]
    assert evaluate.main([str(tmp_path / "out"), "--checkpoint", checkpoint, *dataset, *more]) == 0
    found = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    expected = by_key([row for row in rows if row["system"] == Path(checkpoint).name], "record", "prompt_name")
    assert by_key(found, "record", "prompt_name") == expected


def test_scores_are_those_of_the_library(rows, labelled, bright_checkpoint):
    segmenter = vlsm.Segmenter(vlsm.load_checkpoint(bright_checkpoint), device="cpu")
    own = by_key([row for row in rows if row["system"] == bright_checkpoint.name], "record", "prompt_name")
    num_compared = 0
    for record in read_dataset("drawn", str(labelled)):
        row = own[record.where, "p1"]
        if row["status"] == "failed":
            continue
        image = decode_image(Path(record.image_uri).read_bytes(), "")
        target = decode_mask_file(Path(record.mask_uri).read_bytes(), "", 127)
        (mask,) = segmenter.segment([image], row["prompt"], allow_equal_masks=True)
        assert (row["height"], row["width"]) == image.shape[:2]
        assert row["dice"] == pytest.approx(dice_score(mask, target), abs=0.01)  # float16 on the way
        size = row["height"], row["width"]
        assert row["dice"] == dice_score(decode_mask(row["mask_rle"], size), decode_mask(row["target_rle"], size))
        np.testing.assert_array_equal(decode_mask(row["target_rle"], size), target)
        assert row["target_fraction"] == target.mean()
        num_compared += 1
    assert num_compared == 10


def test_labels_that_are_of_no_use_are_failed_rows_that_name_them(rows):
    failed = {(Path(row["mask_uri"]).parts[-2:], row["error"]) for row in rows if row["status"] == "failed"}
    assert {parts for parts, _ in failed} == {("lesion", "test_0001.png"), ("stone", "test_0002.png")}
    messages = sorted(error for _, error in failed)
    assert messages[0].startswith("corrupt: ") and "lesion/test_0001.png" in messages[0]
    assert messages[1].startswith("size: ") and "stone/test_0002.png are of different sizes, " in messages[1]
    assert all(row["dice"] is None for row in rows if row["status"] == "failed")


def test_an_empty_label_has_no_distances(rows):
    own = [row for row in rows if row["mask_uri"].endswith("stone/test_0003.png")]
    assert {row["dice"] for row in own if row["area_fraction"]} == {0}
    assert {row["hd95_px"] for row in own if row["area_fraction"]} == {None}


def test_an_ensemble_is_one_system_and_tells_how_its_members_agree(rows):
    both = [row for row in rows if row["system"] == "both of them"]
    assert all(" + " in row["checkpoint"] and row["agreement"] is not None for row in both if row["status"] == "ok")


def test_models_that_see_no_text_do_not_move(rows):
    moved = [row for row in rows if row["prompt_class"] == "robustness" and row["status"] == "ok"]
    assert {row["reference_dice"] for row in moved} == {1}
    assert {row["prompt"] for row in moved if row["prompt_name"] == "empty"} == {""}


def test_tables_tell_honest_prompts_from_upper_bounds(evaluated):
    honest, upper = (evaluated / "table.md").read_text().split("## Upper bound")
    assert "| drawn | p1 | both of them | 10 (2), 1 negative |" in honest and "| drawn | p2 |" not in honest
    assert "| drawn | p2 |" in upper and "Dice to reference" in upper
    assert (evaluated / "table.csv").read_text().count("\n") == 1 + 3 * 8


def test_a_rerun_does_nothing_and_other_settings_are_refused(evaluated, words, run):
    before = {path: path.stat().st_mtime_ns for path in evaluated.rglob("*")}
    robust = ["--set", "prompt_robustness=true"]
    code, summary, log = run(evaluated, *words, *robust)
    assert code == 0 and summary["rows"] == 288 and "there is nothing to do" in log
    code, _, log = run(evaluated, *words, *robust, "--set", "limit=3")
    assert code == 2 and "limit (there None, now 3)" in log and "start_over" in log
    assert {path: path.stat().st_mtime_ns for path in evaluated.rglob("*")} == before


def test_masks_of_another_run_give_the_same_scores_and_are_joined_by_name(
    rows, labelled, bright_checkpoint, tmp_path, run, in_process
):
    """Of an archive elsewhere, in which one image is missing and another is too much."""
    archive = Path(shutil.copytree(labelled / "images", tmp_path / "archive"))
    (archive / "test_0000.png").rename(archive / "other.png")
    words = [str(archive), str(tmp_path / "masks"), "--checkpoint", str(bright_checkpoint)]
    assert segment.main([*words, "--set", "prompts=[lesion]", "--set", "allow_equal_masks=true"]) == 0
    words = [tmp_path / "out", "--masks", f"old={tmp_path / 'masks'}", "--dataset", f"drawn={labelled}"]
    code, summary, log = run(*words)
    assert (code, summary["rows"], summary["failed"]) == (0, 12, 8)  # six stones, a missing image, a broken label
    errors = [row["error"] for row in pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()]
    assert errors.count("missing: the segment run has no prompt 'stone'") == 5
    counts = "5 of 6 labelled images, 5 of them matched by file name; missing: 1; images of the run without a label, "
    counts += "which are not scored: 1"
    assert counts in log
    expected = by_key(
        [r for r in rows if r["system"] == bright_checkpoint.name and r["prompt_name"] == "text:lesion"], "record"
    )
    for row in pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist():
        if "test_0000" in row["image_uri"] or "/stone/" in row["mask_uri"]:
            assert row["status"] == "failed" and row["error"].startswith("missing: ")
        else:
            assert row["dice"] == expected[(row["record"],)]["dice"] and row["prompt"] == "lesion"


def test_the_list_of_a_hospital_is_scored_by_site_and_patient_after_a_review(
    labelled, bright_checkpoint, tmp_path, run, in_process
):
    """The columns are those of the list that was segmented; a reviewer has rejected one image of the north."""
    names = sorted(path.name for path in (labelled / "images").iterdir())
    sites, patients = ["north", "north", "south", "south", "south", "north"], [1, 1, 2, 2, 3, 4]
    columns = {"image_uri": [str(labelled / "images" / name) for name in names], "image_id": names}
    frame = pd.DataFrame(columns | {"site": sites, "patient_id": patients})
    frame.to_csv(tmp_path / "list.csv", index=False)
    words = [str(tmp_path / "list.csv"), str(tmp_path / "masks"), "--checkpoint", str(bright_checkpoint)]
    assert segment.main([*words, "--set", "prompts=[lesion]", "--set", "allow_equal_masks=true"]) == 0
    made = {"reject": names[0], "redo": names[2], "accept": names[3]}
    marks = [{"image_id": image_id, "prompt": "lesion", "mark": mark} for mark, image_id in made.items()]
    run_id = yaml.safe_load((tmp_path / "masks" / "config.yaml").read_text())["run_id"]
    (tmp_path / "marks.json").write_text(json.dumps({"kind": "vlsm.marks", "run_id": run_id, "marks": marks}))
    words = [tmp_path / "out", "--masks", f"old={tmp_path / 'masks'}", "--dataset", f"drawn={labelled}"]
    words += ["--set", "groups=[site]", "--set", "patient=patient_id", "--set", "small_group=1"]
    code, summary, log = run(*words, "--set", f"marks={tmp_path / 'marks.json'}")
    assert code == 0 and "2 records left out, because their images are rejected" in log
    rows = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    assert len(rows) == summary["rows"] == 10 and not any(names[0] in row["image_uri"] for row in rows)
    lesions = {Path(row["image_uri"]).name: row["dice"] for row in rows if row["status"] == "ok"}
    groups = {row["value"]: row for row in pd.read_csv(tmp_path / "out" / "groups.csv").to_dict("records")}
    assert groups.keys() == {"north", "south"}
    for site, num_patients in {"north": 1, "south": 2}.items():  # the label of names[1], of patient 1, is broken
        scores = [lesions[name] for name, where in zip(names, sites, strict=True) if where == site and name in lesions]
        assert (groups[site]["n"], groups[site]["patients_n"]) == (len(scores), num_patients)
        assert groups[site]["dice_mean"] == pytest.approx(np.mean(scores), abs=1e-6)


@pytest.mark.usefixtures("in_process")
def test_masks_of_an_evaluation_are_scored_by_another(evaluated, rows, labelled, bright_checkpoint, tmp_path, run):
    name = bright_checkpoint.name
    words = [tmp_path / "out", "--masks", f"{name}={evaluated}/runs/{name}", "--dataset", f"drawn={labelled}"]
    code, _, log = run(*words, "--set", "prompts=[p1, text:elsewhere]")
    assert code == 0 and "6 of 6 labelled images, 0 of them matched by file name" in log
    found = by_key(pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist(), "record", "prompt_name")
    for row in rows:
        if (row["system"], row["prompt_name"]) == (name, "p1"):
            assert found[row["record"], "p1"] == row
    errors = {found[key]["error"] for key in found if key[1] != "p1"}
    assert errors == {"missing: the segment run has no prompt 'elsewhere'"}


def test_slices_and_classes_are_scored_each_with_its_own_mask(bright_checkpoint, in_process, tmp_path, monkeypatch):
    """A volume that is cut into coronal slices, with a label volume of two classes."""
    volume, labels = np.zeros((2, 24, 3, 20), np.uint8)
    volume[2:12, 0], labels[2:12, 0] = 255, 1  # the first slice has class 1, the last one both, the second one nothing
    volume[4:10, 2], labels[4:10, 2] = 255, 1
    labels[12:20, 2, 5:] = 2
    for name, values in (("image", volume), ("label", labels)):
        nibabel.Nifti1Image(values, np.eye(4)).to_filename(tmp_path / f"{name}.nii.gz")
    records = [
        Record(
            "d", "test", "row 1", str(tmp_path / "image.nii.gz"), str(tmp_path / "label.nii.gz"), {"p1": (prompt,)},
            image_selector=f"slice={number}", mask_selector=f"slice={number}", labels=(label,), group="patient",
        )
        for number in range(3)
        for label, prompt in ((1, "organ"), (2, "tumor"))
    ]  # fmt: skip
    monkeypatch.setattr("vlsm.evaluation.systems.read_dataset", lambda *_: records)
    words = [str(tmp_path / "out"), "--checkpoint", str(bright_checkpoint), "--dataset", "d=anywhere"]
    assert evaluate.main([*words, "--set", "data.slices=coronal", "--set", "data.window=[128, 256]"]) == 0
    rows = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    found = {(row["selector"], row["prompt"]): row for row in rows}
    assert len(rows) == len(found) == 6
    assert {row["status"] for row in rows} == {"ok"} and {row["group"] for row in rows} == {"patient"}
    assert {(row["height"], row["width"]) for row in rows} == {(20, 24)}
    dice = {key: row["dice"] for key, row in found.items()}
    assert dice["slice=0", "organ"] > 0.9 and dice["slice=2", "organ"] > 0.9
    assert dice["slice=0", "tumor"] == 0 and dice["slice=2", "tumor"] < 0.1
    fractions = [found[f"slice={number}", "tumor"]["target_fraction"] for number in range(3)]
    assert fractions == [0, 0, 8 * 15 / 480]
    again = [str(tmp_path / "again"), "--masks", f"mine={tmp_path / 'out' / 'runs' / bright_checkpoint.name}"]
    words = [*again, "--dataset", "d=anywhere", "--set", "data.slices=coronal"]
    assert evaluate.main(words) == 0
    same = pq.read_table(tmp_path / "again" / "scores.parquet").to_pylist()
    assert [row["dice"] for row in same] == [row["dice"] for row in rows]


def test_it_goes_on_where_it_was_interrupted_and_starts_over_when_told(
    labelled, bright_checkpoint, in_process, s3_folder, run
):
    """In an object store, with images on a local disk."""
    words = [f"{s3_folder}/out", "--checkpoint", bright_checkpoint, "--dataset", f"drawn={labelled}"]
    fs, path = storage.open_uri(f"{s3_folder}/out")

    def parts():
        return {
            name: info["ETag"] + str(info["LastModified"])
            for name, info in fs.find(path, detail=True).items()
            if "part-" in name
        }

    assert run(*words)[0] == 0
    before, scores = parts(), storage.read_bytes(f"{s3_folder}/out/scores.parquet")
    assert before
    for name in ("summary.json", "scores.parquet"):
        storage.remove(f"{s3_folder}/out/{name}")
    assert run(*words)[0] == 0
    assert parts() == before
    assert storage.read_bytes(f"{s3_folder}/out/scores.parquet") == scores
    code, summary, _ = run(*words, "--set", "limit=2", "--set", "start_over=true")
    assert (code, summary["rows"]) == (0, 2)
    assert parts() != before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "nowhere", "--dataset", "d=DATA"], "there is no checkpoint at"),
        (["--checkpoint", "CHECKPOINT", "--dataset", "d=nowhere"], "nowhere' does not exist"),
        (["--checkpoint", "CHECKPOINT", "--dataset", "d"], "NAME=URI"),
        (["--checkpoint", "CHECKPOINT"], "--dataset NAME=URI"),
        (["--dataset", "d=DATA"], "--checkpoint DIR"),
        (["--masks", "m=nowhere", "--dataset", "d=DATA"], "there is no segment run in"),
        (["--checkpoint", "CHECKPOINT", "--dataset", "d=DATA", "--set", "prompts=p9"], "no prompt for prompts=p9"),
        (["--checkpoint", "CHECKPOINT", "--dataset", "d=DATA", "--set", "split=val"], "no records of split val"),
        (["--checkpoint", "CHECKPOINT", "--dataset", "d=DATA", "--set", "baseline=x"], "baseline is 'x'"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_before_ray_starts(
    words, message, drawn, bright_checkpoint, tmp_path, without_ray
):
    places = {"DATA": str(drawn), "CHECKPOINT": str(bright_checkpoint)}
    given = [word.replace("DATA", places["DATA"]).replace("CHECKPOINT", places["CHECKPOINT"]) for word in words]
    done = without_ray(evaluate.main, tmp_path / "out", *given)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
