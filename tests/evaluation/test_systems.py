"""What an evaluation plans: the prompt of each record and system, the images to segment, and earlier evaluations."""

import json
import logging
import shutil

import pyarrow as pa
import pytest

import vlsm
from tests.runs.test_earlier_versions import V0
from vlsm.datasets.records import Record
from vlsm.errors import ConfigError
from vlsm.evaluation.parts import SCORES_SCHEMA
from vlsm.evaluation.planning import finish_evaluation, plan_evaluation, prepare_evaluation
from vlsm.evaluation.prompts import match_texts
from vlsm.evaluation.settings import EvaluateSettings
from vlsm.evaluation.systems import Target, _name_images, _name_records, list_images, read_test_records
from vlsm.runs.record import describe_differences, read_record, write_record
from vlsm.training.origin import write_known


@pytest.fixture
def make_settings(bright_checkpoint, tmp_path):
    """Settings of an evaluation of three records, of which the last one has no prompt."""
    rows = [{"image_uri": f"{number}.png", "mask_uri": f"{number}.mask.png", "split": "test"} for number in range(3)]
    rows[0]["prompt"], rows[1]["prompt"] = ["a lesion", "another lesion"], "a stone"
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**more):
        given = {"checkpoints": [str(bright_checkpoint)]} | more
        return EvaluateSettings(output=str(tmp_path / "out"), datasets={"d": str(tmp_path / "list.jsonl")}, **given)

    return make


def texts(settings):
    evaluation, _ = plan_evaluation(settings)
    return [[target.texts for target in system.targets] for system in evaluation.systems]


def test_a_record_is_scored_with_its_own_prompt_and_with_the_stored_one_if_it_has_none(make_settings, caplog):
    caplog.set_level(logging.INFO, logger="vlsm")
    assert texts(make_settings()) == [[{"record": text} for text in ("a lesion", "a stone", "bright")]]
    assert "1 of 3 records have no p1: their prompt is 'bright', as stored in the checkpoint" in caplog.text
    caplog.clear()
    assert texts(make_settings(prompts=["own"])) == [[{"own": "bright"}] * 3]
    assert not caplog.text


def test_members_that_store_different_prompts_need_none_if_each_record_has_its_own(make_settings, tmp_path):
    members = []
    for prompt in ("bright", "dark"):
        vlsm.save_checkpoint(vlsm.build_model("pixel", image_size=32), tmp_path / prompt, prompt=prompt)
        members.append({"checkpoint": str(tmp_path / prompt)})
    both = {"checkpoints": (), "systems": {"both": members}}
    assert texts(make_settings(limit=2, **both)) == [[{"record": "a lesion"}, {"record": "a stone"}]]
    with pytest.raises(ConfigError, match="its checkpoints store different prompts, 'bright', 'dark'"):
        plan_evaluation(make_settings(**both))


def test_a_single_checkpoint_gives_its_threshold_of_presence_and_a_setting_replaces_it(make_settings, tmp_path):
    folder = tmp_path / "calibrated"
    vlsm.save_checkpoint(vlsm.build_model("pixel", image_size=32), folder, prompt="bright")
    content = (folder / "checkpoint.yaml").read_text()
    fitted = {"temperature": 1, "threshold": 0.5, "num_images": 2, "error_before": 0, "error_after": 0, "dice": 1}
    fitted |= {"dice_at_half": 1, "min_confidence": None, "area_fraction": [0, 1], "reliability": []}
    lines = [line for line in content.splitlines() if not line.startswith("calibration")]
    calibration = json.dumps(fitted | {"presence_threshold": 0.8})
    (folder / "checkpoint.yaml").write_text("\n".join([*lines, f"calibration: {calibration}"]) + "\n")

    def thresholds(**more):
        return [system.presence_threshold for system in plan_evaluation(make_settings(**more))[0].systems]

    both = {"both": [{"checkpoint": str(folder)}, {"checkpoint": str(folder), "flip": True}]}
    given = {"checkpoints": [str(folder)], "systems": both, "prompts": ["own"]}
    assert thresholds(**given) == [0.8, None]
    assert thresholds(**given, presence_threshold=0.3) == [0.3, 0.3]


def record(dataset, prompt, **more):
    prompts = {} if prompt is None else {"p1": (prompt,)}
    return Record(dataset, "test", "list.csv, row 1", f"/{dataset}/i.png", "m.png", prompts, **more)


@pytest.mark.parametrize(
    ("run_prompts", "expected"),
    [
        ({"lesion", "stone"}, ["lesion", "stone", "polyp"]),
        ({"lesion"}, ["lesion", "stone", "lesion"]),  # what has no mask of its own prompt in d is missing
        ({"polyp"}, ["polyp", "polyp", "polyp"]),
        ({"growth"}, ["growth", "growth", "growth"]),
        ({"growth", "else"}, ["lesion", "stone", "polyp"]),
    ],
)
def test_masks_of_one_prompt_that_no_record_has_are_scored_for_all(run_prompts, expected, caplog):
    caplog.set_level(logging.INFO, logger="vlsm")
    records = [record("d", "lesion"), record("d", "stone"), record("e", "polyp")]
    planned = [{"record": one.prompt, "text:x": "x"} for one in records]
    assert match_texts("mine", records, planned, run_prompts) == [{"record": text, "text:x": "x"} for text in expected]
    assert ("its masks are scored for all" in caplog.text) == (len(run_prompts) == 1)
    assert match_texts("mine", records, [{"own": "x"}] * 3, run_prompts) == [{"own": "x"}] * 3


def test_an_evaluation_that_an_earlier_version_began_goes_on_with_its_prompts(make_settings, caplog):
    caplog.set_level(logging.INFO, logger="vlsm")
    prepare_evaluation(make_settings(prompts=["own"]))
    with pytest.raises(ConfigError, match=r"prompts \(there \['own'\], now \['record'\]\)"):
        prepare_evaluation(make_settings())
    output = make_settings().output
    earlier = read_record(output)
    data = earlier["config"].pop("data")
    earlier["config"] |= {name: data[name] for name in ("mask_threshold", "max_pixels", "max_image_bytes")}
    write_record(output, earlier)
    assert prepare_evaluation(make_settings()).settings.prompts == ("own",)
    assert "it goes on with prompts=[own]" in caplog.text
    with pytest.raises(ConfigError, match=r"prompts \(there \['own'\], now \['record'\]\)"):
        prepare_evaluation(make_settings(prompts=["record"]))
    assert prepare_evaluation(make_settings(start_over=True)).settings.prompts == ("record",)


def test_the_record_of_an_earlier_version_has_the_same_settings():
    earlier = read_record(str(V0 / "evaluation"))
    assert describe_differences(earlier, EvaluateSettings(**earlier["config"]), {}) == []


@pytest.mark.parametrize("fractions", [[0.0, 0.0, None], [0.0, 0.1, None], [None, None, None]])
def test_labels_that_are_all_empty_are_warned_of(fractions, make_settings, caplog):
    evaluation = prepare_evaluation(make_settings(resamples=100))
    finish(evaluation, fractions)
    warned = "dataset d: all 2 labels of split test are empty with data.mask_threshold=127" in caplog.text
    assert warned == (fractions[:2] == [0, 0])


def finish(evaluation, fractions):
    """Write the results of scores with these areas of the labels; None is a failed score."""
    rows = [
        {"system": system.name, "dataset": "d", "split": "test", "record": target.record.where, "prompt": text}
        | {"prompt_name": name, "prompt_class": "honest", "image_uri": "i", "mask_uri": "m"}
        | {"target_fraction": fraction}
        | ({"status": "failed"} if fraction is None else {"status": "ok", "dice": float(fraction == 0)})
        for system in evaluation.systems
        for target, fraction in zip(system.targets, fractions, strict=True)
        for name, text in target.texts.items()
    ]
    finish_evaluation(evaluation, [pa.Table.from_pylist(rows, schema=SCORES_SCHEMA)], 1.0)


def test_a_system_that_has_learned_from_the_images_is_warned_of(make_settings, bright_checkpoint, tmp_path, caplog):
    shutil.copytree(bright_checkpoint, tmp_path / "trained" / "checkpoint")
    write_known(str(tmp_path / "trained"), {(str(tmp_path / f"{number}.png"), "") for number in (0, 2, 7)})
    members = [{"checkpoint": str(bright_checkpoint)}, {"checkpoint": str(tmp_path / "trained" / "checkpoint")}]
    evaluation = prepare_evaluation(make_settings(systems={"both": members}, resamples=100))
    assert [system.num_known for system in evaluation.systems] == [0, 2]
    assert "system both learned from 2 of the 3 images on which it is scored" in caplog.text
    finish(evaluation, [0.1] * 3)
    assert "- both: 2 of 3\n" in (tmp_path / "out" / "table.md").read_text()


def test_slices_and_classes_have_names_of_their_own():
    slices = [record("d", "a", image_selector=f"slice={number}") for number in (0, 1)]
    records = [*slices, record("d", "b", labels=(2,)), record("d", "c", labels=(3,)), record("e", "b")]
    assert [one.where for one in _name_records(records)] == [
        "list.csv, row 1, slice=0",
        "list.csv, row 1, slice=1",
        "list.csv, row 1",
        "list.csv, row 1, mask 2",
        "list.csv, row 1",
    ]
    image_ids = _name_images(records)
    assert image_ids == ["d/i.png#slice=0", "d/i.png#slice=1", "d/i.png", "d/i.png", "e/i.png"]
    targets = [
        Target(one, image_id, {"record": str(one.prompt)}) for one, image_id in zip(records, image_ids, strict=True)
    ]
    rows = list_images(targets)
    assert [(row["image_id"], row["selector"], row["prompts"]) for row in rows] == [
        ("d/i.png#slice=0", "slice=0", ["a"]),
        ("d/i.png#slice=1", "slice=1", ["a"]),
        ("d/i.png", None, ["b", "c"]),
        ("e/i.png", None, ["b"]),
    ]
    assert all("selector" not in row for row in list_images(targets[2:]))


def read(folder, rows, **options):
    (folder / "list.csv").write_text("image_uri,mask_uri,split\n" + "".join(f"{row}\n" for row in rows))
    tree = {"output": str(folder / "out"), "datasets": {"a": str(folder / "list.csv")}, "checkpoints": ["x"]}
    records = read_test_records(EvaluateSettings.model_validate(tree | options))
    return [record.image_uri.rsplit("/", 1)[-1] for record in records]


def test_the_split_chooses_the_records_and_all_are_all(tmp_path):
    rows = ["a.png,a_mask.png,train", "b.png,b_mask.png,test", "c.png,c_mask.png,test"]
    assert read(tmp_path, rows) == ["b.png", "c.png"]
    assert read(tmp_path, rows, split="train") == ["a.png"]
    assert read(tmp_path, [*rows, "d.png,d_mask.png,"], split="all") == ["a.png", "b.png", "c.png", "d.png"]
    with pytest.raises(ConfigError, match="dataset a has no records of split val; it has test, train"):
        read(tmp_path, rows, split="val")


def test_records_without_a_split_are_refused_since_training_may_have_learned_from_them(tmp_path):
    with pytest.raises(
        ConfigError, match=r"1 of 2 records of a have no split .*NAME=OUTPUT/examples.parquet .*; --set split=all"
    ):
        read(tmp_path, ["a.png,a_mask.png,test", "b.png,b_mask.png,"])
