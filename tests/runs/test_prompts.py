"""What several prompts mean for models that ignore their text, and what a checkpoint without a calibration says."""

import json

import numpy as np
import pytest

import vlsm
from jobs.demo import write_tiny_clipseg
from vlsm.checkpoints import read_settings
from vlsm.config import SegmentSettings
from vlsm.errors import ConfigError
from vlsm.models import BLIND, MODELS, find_model
from vlsm.runs.lifecycle import prepare_run, resolve_settings
from vlsm.segmentation.blind import watch_prompts


def settings_for(archive, output, *checkpoints, **more):
    members = [{"checkpoint": str(checkpoint)} for checkpoint in checkpoints]
    return SegmentSettings(input=str(archive), output=str(output), members=members, **more)


def test_blind_models_are_those_whose_logits_do_not_depend_on_the_prompt():
    from vlsm.models.contract import ImageOnlyModel

    assert {name for name in MODELS if issubclass(find_model(name), ImageOnlyModel)} == BLIND


def test_several_prompts_for_a_model_that_ignores_them_are_refused(archive, tiny_checkpoint, tmp_path):
    for more in ({"prompts": ["polyp", "fold"]}, {"classes": {"polyp": ["a"], "fold": ["b"]}}):
        settings = settings_for(archive, tmp_path / "out", tiny_checkpoint, **more)
        for refuse in (prepare_run, resolve_settings):
            with pytest.raises(ConfigError, match=r"unet_d ignores the text: all 2 prompts would have the same mask"):
                refuse(settings)
        assert not (tmp_path / "out").exists()


def test_equal_masks_can_be_asked_for_and_such_a_run_goes_on(archive, tiny_checkpoint, tmp_path):
    settings = settings_for(
        archive, tmp_path / "out", tiny_checkpoint, prompts=["polyp", "fold"], allow_equal_masks=True
    )
    run = prepare_run(settings)
    assert run.settings.prompts == ("polyp", "fold")
    assert prepare_run(settings).run_id == run.run_id


def test_in_an_ensemble_a_member_that_ignores_the_text_is_named(archive, tiny_checkpoint, tmp_path, caplog):
    write_tiny_clipseg(tmp_path / "clipseg", seed=0)
    reader = tmp_path / "reader"
    vlsm.save_checkpoint(vlsm.build_model("clipseg", source=str(tmp_path / "clipseg"), image_size=32), reader, "polyp")
    settings = settings_for(archive, tmp_path / "out", tiny_checkpoint, reader, prompts=["polyp", "fold"])
    prepare_run(settings)
    assert "unet_d ignores the text: in this ensemble such a member has the same mask for each of the 2" in caplog.text


def test_one_prompt_is_as_good_as_any(archive, tiny_checkpoint, tmp_path, caplog):
    prepare_run(settings_for(archive, tmp_path / "out", tiny_checkpoint, prompts=["polyp"]))
    assert "ignores the text" not in caplog.text


def test_a_checkpoint_that_is_not_calibrated_is_named(archive, tiny_checkpoint, tmp_path, caplog):
    caplog.set_level("INFO", "vlsm")
    prepare_run(settings_for(archive, tmp_path / "out", tiny_checkpoint))
    assert f"{tiny_checkpoint}: not calibrated, so `confidence` says how sure the model is" in caplog.text


def test_the_only_prompt_of_a_model_that_ignores_it_is_its_own(archive, tiny_checkpoint, tmp_path):
    """A mask of a polyp under the name kidney is a wrong answer; the message has three ways out, which all work."""
    settings = settings_for(archive, tmp_path / "out", tiny_checkpoint, prompts=["kidney"])
    for refuse in (prepare_run, resolve_settings):
        with pytest.raises(
            ConfigError, match=r"unet_d ignores the text, and was trained for 'polyp': .*'kidney'"
        ) as error:
            refuse(settings)
    assert "classes={kidney: [polyp]}" in str(error.value) and "allow_equal_masks=true" in str(error.value)
    assert not (tmp_path / "out").exists()
    for more in (
        {},
        {"prompts": [" Polyp"]},
        {"classes": {"kidney": ["polyp"]}},
        {"classes": {"polyp": ["a growth", "a bump"]}},
        {"prompts": ["kidney"], "allow_equal_masks": True},
    ):
        assert resolve_settings(settings_for(archive, tmp_path / "out", tiny_checkpoint, **more))[0].prompts


def test_a_checkpoint_without_a_prompt_takes_any_and_a_model_that_reads_takes_all(archive, tmp_path):
    vlsm.save_checkpoint(vlsm.build_model("unet_d", image_size=32, width=4), tmp_path / "bare")
    resolve_settings(settings_for(archive, tmp_path / "out", tmp_path / "bare", prompts=["kidney"]))
    write_tiny_clipseg(tmp_path / "clipseg", seed=0)
    reader = tmp_path / "reader"
    vlsm.save_checkpoint(vlsm.build_model("clipseg", source=str(tmp_path / "clipseg"), image_size=32), reader, "polyp")
    resolve_settings(settings_for(archive, tmp_path / "out", reader, prompts=["kidney", "lung"]))


def test_an_ensemble_is_only_warned_of_if_some_member_reads_or_has_the_prompt(
    archive, tiny_checkpoint, tmp_path, caplog
):
    other = tmp_path / "other"
    vlsm.save_checkpoint(vlsm.build_model("unet_d", image_size=32, width=4), other, "lesion")
    resolve_settings(settings_for(archive, tmp_path / "out", tiny_checkpoint, other, prompts=["polyp"]))
    assert "was trained for 'lesion': the prompt 'polyp' would not change the mask" in caplog.text
    with pytest.raises(ConfigError, match="'polyp' and 'lesion'"):
        resolve_settings(settings_for(archive, tmp_path / "out", tiny_checkpoint, other, prompts=["kidney"]))
    members = [{"checkpoint": str(tiny_checkpoint), "prompts": {"kidney": "polyp"}}]
    settings = SegmentSettings(input=str(archive), output=str(tmp_path / "out"), members=members, prompts=["kidney"])
    resolve_settings(settings)


@pytest.mark.parametrize("prompts", [["kidney"], ["polyp", "fold"]])
def test_prompts_of_a_list_obey_the_same_rule(archive, tiny_checkpoint, tmp_path, prompts):
    names = sorted(archive.iterdir())
    rows = [{"image_uri": str(name), "prompts": row} for name, row in zip(names, (["POLYP"], prompts), strict=False)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = settings_for(tmp_path / "list.jsonl", tmp_path / "out", tiny_checkpoint)
    with pytest.raises(ConfigError, match="image .*: unet_d ignores the text"):
        prepare_run(settings)
    assert not (tmp_path / "out" / "config.yaml").exists()
    assert prepare_run(settings.model_copy(update={"allow_equal_masks": True})).plan.num_images == 2


def test_prompts_in_parquet_files_that_are_listed_during_the_work_are_warned_of_once(tiny_checkpoint, tmp_path, caplog):
    settings = settings_for(tmp_path, tmp_path / "out", tiny_checkpoint, prompts=["polyp"])
    rows = [{"image_id": f"{number}", "prompts": ["kidney"]} for number in range(3)]
    assert list(watch_prompts(rows, settings, [read_settings(str(tiny_checkpoint))], may_stop=False)) == rows
    assert caplog.text.count("trained for 'polyp'") == 1


def test_the_library_has_the_same_rule(tiny_checkpoint):
    image = np.zeros((8, 8, 3), np.uint8)
    for prompts in ("kidney", ["polyp", "fold"]):
        with pytest.raises(ValueError, match="unet_d ignores the text.*allow_equal_masks=True"):
            vlsm.segment(image, tiny_checkpoint, prompts)
        vlsm.segment(image, tiny_checkpoint, prompts, allow_equal_masks=True)
    assert vlsm.segment(image, tiny_checkpoint, "Polyp").prompt == "Polyp"


def test_a_run_of_an_earlier_command_goes_on_without_the_setting(archive, tiny_checkpoint, tmp_path):
    """The setting only allows a run; it is no other run."""
    settings = settings_for(archive, tmp_path / "out", tiny_checkpoint, prompts=["kidney"], allow_equal_masks=True)
    run = prepare_run(settings)
    assert prepare_run(settings.model_copy(update={"allow_equal_masks": False})).run_id == run.run_id


def test_a_name_that_is_no_prompt_of_the_run_is_warned_of(archive, tiny_checkpoint, tmp_path, caplog):
    members = [{"checkpoint": str(tiny_checkpoint), "prompts": {"polpy": "x", "polyp": "Polyp"}}]
    tree = {"input": str(archive), "output": str(tmp_path / "out"), "members": members}
    resolve_settings(SegmentSettings(**tree, prompts=["polyp"], classes={"fold": ["x"]}))
    assert "classes: fold is no prompt of this run" in caplog.text
    assert f"prompts of member {tiny_checkpoint}: polpy is no prompt of this run" in caplog.text
    caplog.clear()
    resolve_settings(SegmentSettings(**tree | {"members": [{"checkpoint": str(tiny_checkpoint)}]}, prompts=["polyp"]))
    assert not caplog.text
