"""What several prompts mean for models that ignore their text, and what a checkpoint without a calibration says."""

import pytest

import vlsm
from jobs.demo import write_tiny_clipseg
from vlsm.config import SegmentSettings
from vlsm.errors import ConfigError
from vlsm.models import BLIND, MODELS, find_model
from vlsm.runs.lifecycle import prepare_run, resolve_settings


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
