"""Temperature and threshold: what is fitted on made-up images, and what a calibrated checkpoint does."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import vlsm
from vlsm import calibration
from vlsm.calibration import calibrate, expected_error
from vlsm.checkpoints import Calibration
from vlsm.config import ReviewSettings, SegmentSettings
from vlsm.errors import ConfigError
from vlsm.report.parts import calibrations, read_calibrations
from vlsm.runs.lifecycle import resolve_settings
from vlsm.segmentation.image_rows import review_reasons
from vlsm.segmentation.masks import MaskRecord
from vlsm.segmentation.segmenter import Segmenter


def draw(rng, count, temperature, shift=0.0):
    """Images whose masks are drawn from the logits' own probabilities, and logits that are too sure by a factor."""
    for _ in range(count):
        true = rng.normal(-1, 2, (60, 80))
        mask = (rng.random(true.shape) < 1 / (1 + np.exp(-true - shift))).astype(np.uint8)
        yield true * temperature, mask


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_was_hidden_in_the_logits_is_found(temperature):
    found = calibrate(draw(np.random.default_rng(0), 12, temperature))
    assert found.temperature == pytest.approx(temperature, rel=0.03)
    assert found.error_after < 0.01
    assert found.error_after <= found.error_before + 1e-3
    assert found.num_images == 12
    assert sum(weight for *_, weight in found.reliability) == pytest.approx(1, abs=1e-4)


def test_the_threshold_makes_the_mean_dice_largest():
    examples = list(draw(np.random.default_rng(1), 6, 2.0))
    found = calibrate(iter(examples))

    def mean_dice(threshold):
        limit = found.temperature * np.log(threshold / (1 - threshold))
        masks = [(logits >= limit, mask) for logits, mask in examples]
        return np.mean([2 * (a & (b > 0)).sum() / (a.sum() + b.sum()) for a, b in masks])

    assert found.dice == pytest.approx(mean_dice(found.threshold), abs=0.002)
    assert found.dice >= max(mean_dice(limit) for limit in np.linspace(0.05, 0.95, 19)) - 0.002
    assert found.dice_at_half == pytest.approx(mean_dice(0.5), abs=0.002)


def test_of_equally_good_thresholds_the_one_in_the_middle_is_taken():
    target = np.zeros((20, 20), np.uint8)
    target[5:15, 5:15] = 1
    assert calibrate([(np.where(target, 5.0, -5.0), target)]).threshold == pytest.approx(0.5, abs=0.01)
    noisy = [(np.where(target, 5.0, -5.0), target), (np.where(target, 5.0, -5.0), 1 - target)]
    found = calibrate([*noisy, (np.where(target, 1.0, -5.0), target)])
    assert found.temperature * np.log(found.threshold / (1 - found.threshold)) == pytest.approx(-2, abs=0.05)


@pytest.mark.parametrize(
    ("values", "index"),
    [([0, 1, 0], 1), ([1, 1, 1, 1, 1], 2), ([1, 0, 1, 1, 1], 3), ([1, 0, 0, 0, 1, 0], 4), ([1, 1, 0, 1, 1, 0], 4)],
)
def test_the_longest_plateau_counts_and_then_the_one_nearest_to_the_middle(values, index):
    assert calibration._middle_of_best(np.array(values)) == index


def test_the_error_is_that_of_hand_made_bins():
    assert expected_error([(0.1, 0.2, 0.5), (0.9, 0.6, 0.5)]) == pytest.approx(0.5 * 0.1 + 0.5 * 0.3)


def test_empty_masks_and_no_images():
    found = calibrate([(np.full((8, 8), -5.0), np.zeros((8, 8), np.uint8))])
    assert (found.dice, found.min_confidence, found.area_fraction) == (1, None, (0, 0))
    with pytest.raises(vlsm.errors.ConfigError, match="no labelled images"):
        calibrate([])


def test_masks_of_little_confidence_are_found_where_they_are_bad():
    rng = np.random.default_rng(2)
    target = np.zeros((40, 40), np.uint8)
    target[10:30, 10:30] = 1
    good = [(np.where(target, 4.0, -4.0) + rng.normal(0, 0.1, target.shape), target) for _ in range(6)]
    bad = [(np.where(target, -1.0, 0.6) + rng.normal(0, 0.1, target.shape), target) for _ in range(3)]
    found = calibrate([*good, *bad])
    assert 0.5 < found.min_confidence < 1
    record = MaskRecord(mask_rle="", area_px=1, area_fraction=0.3, bbox=None, confidence=found.min_confidence - 0.01)
    rule = ReviewSettings(min_confidence=found.min_confidence, area_fraction=(0.1, 0.2))
    assert review_reasons(record, rule) == "low confidence, odd area"
    assert review_reasons(record, ReviewSettings()) is None


def test_a_calibrated_checkpoint_is_used_by_the_library_and_by_runs(bright_checkpoint, move_split, tmp_path, capsys):
    words = [str(bright_checkpoint), str(tmp_path / "calibrated"), "--dataset", f"drawn={move_split()}"]
    assert calibration.main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_images"] == 6 and told["error_after"] < told["error_before"]
    plain, calibrated = (vlsm.load_checkpoint(uri) for uri in (bright_checkpoint, tmp_path / "calibrated"))
    assert calibrated.probe.image == plain.probe.image
    checks = [vlsm.Segmenter(vlsm.load_checkpoint(uri), "cpu").check_probe() for uri in (words[0], words[1])]
    assert checks[0].tolerance == checks[1].tolerance and max(check.difference for check in checks) < 1e-4
    assert calibrated.settings.threshold == told["threshold"] and calibrated.name != plain.name
    images = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    before, after = (
        vlsm.Segmenter(each, device="cpu").predict_logits(images, [["x"]] * 3) for each in (plain, calibrated)
    )
    np.testing.assert_allclose(np.array(after) * told["temperature"], before, rtol=1e-5)
    settings, _ = resolve_settings(
        SegmentSettings(input="", output="", members=[{"checkpoint": str(tmp_path / "calibrated")}])
    )
    assert settings.threshold == told["threshold"]
    assert settings.review.min_confidence == told["min_confidence"]
    assert settings.review.area_fraction == tuple(told["area_fraction"])
    places = {"mine": str(tmp_path / "calibrated"), "plain": str(bright_checkpoint), "gone": "nowhere"}
    known = read_calibrations(places, str(tmp_path / "out"))
    assert {name: each is not None for name, each in known.items()} == {"mine": True, "plain": False}
    (section,) = calibrations(known)
    assert [cell.text for cell in section.tables[0].rows[0]][0] == "mine" and len(section.tables[0].rows) == 1
    assert section.lines[0].lines[0].path.count("L") == len(calibrated.settings.calibration.reliability) - 1
    assert calibration.main(words) == 2
    assert "does not exist yet" in capsys.readouterr().err


def test_a_model_that_computes_otherwise_than_its_probe_is_not_calibrated(
    bright_checkpoint, move_split, tmp_path, capsys
):
    """A temperature of wrong logits would make them look right."""
    folder = Path(shutil.copytree(bright_checkpoint, tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, folder / "model.safetensors")
    words = [str(folder), str(tmp_path / "calibrated"), "--dataset", f"drawn={move_split()}"]
    assert calibration.main(words) == 1
    assert "the logits of its probe differ by" in capsys.readouterr().err
    assert not (tmp_path / "calibrated").exists()


def test_images_without_a_validation_split_are_not_guessed(bright_checkpoint, tmp_path, capsys):
    (tmp_path / "list.csv").write_text("image_uri,mask_uri\na.png,b.png\n")
    words = [str(bright_checkpoint), str(tmp_path / "out"), "--dataset", f"mine={tmp_path / 'list.csv'}"]
    assert calibration.main(words) == 2
    assert (
        "1 of 1 records of mine have no split (train, val or test): training has made them: give its list"
        in capsys.readouterr().err
    )


@pytest.fixture
def predicted_texts(monkeypatch):
    """The prompt of every prediction."""
    texts, predict = [], Segmenter.predict

    def remember(self, images, prompts):
        texts.extend(text for row in prompts for text in row)
        return predict(self, images, prompts)

    monkeypatch.setattr(Segmenter, "predict", remember)
    return texts


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([], ["red", "blue", "bright"]),  # the third record has no prompt: the checkpoint's
        (["--prompt", "own"], ["bright"] * 3),
        (["--set", "prompt=text:a stone"], ["a stone"] * 3),
        (["--prompt", "p1"], ["red", "blue"]),
    ],
)
def test_each_record_is_predicted_with_its_own_prompt(
    prompt, expected, bright_checkpoint, move_split, predicted_texts, capsys
):
    uri = move_split(["red", "blue", None])
    words = [str(bright_checkpoint), str(uri.with_name("calibrated")), "--dataset", f"drawn={uri}", *prompt]
    assert calibration.main(words) == 0
    assert predicted_texts == expected
    told = capsys.readouterr().err
    assert ("1 of 3 records have no p1: their prompt is 'bright'" in told) == (not prompt)
    assert ("there is no prompt; --set data.prompts.drawn" in told) == (prompt == ["--prompt", "p1"])


@pytest.mark.parametrize("values", [[0, 1], [0, 100], [0]])
def test_masks_that_are_all_empty_are_refused_with_their_values(values, bright_checkpoint, move_split, capsys):
    uri = move_split(["red"] * 3, values[-1])
    words = [str(bright_checkpoint), str(uri.with_name("calibrated")), "--dataset", f"drawn={uri}"]
    assert calibration.main(words) == 2
    told = capsys.readouterr().err
    assert "dataset drawn: 3 of 3 val masks are empty: the mask files hold" in told
    assert f"hold {' and '.join(map(str, values)) if len(values) > 1 else 'only 0'}, and values above" in told
    assert ("--set data.mask_threshold=0" in told) == (len(values) > 1)
    assert not uri.with_name("calibrated").exists()
    assert calibration.main([*words, "--set", "data.mask_threshold=0"]) == (0 if len(values) > 1 else 2)


@pytest.fixture
def move_split(drawn, tmp_path):
    """Write the drawn test images as a validation split, with these prompts; `value` replaces 255 in the masks."""

    def move(prompts=("bright",) * 6, value=None):
        rows = []
        for path, prompt in zip(sorted((drawn / "images").iterdir()), prompts, strict=False):
            mask_path = drawn / "masks" / "lesion" / f"{path.stem}.png"
            if value is not None:
                stored = np.array(Image.open(mask_path)) // 255 * value
                mask_path = tmp_path / f"{path.stem}.png"
                Image.fromarray(stored.astype(np.uint8)).save(mask_path)
            row = {"image_uri": str(path), "mask_uri": str(mask_path), "split": "val"}
            rows.append(row | ({} if prompt is None else {"prompt": prompt}))
        (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "list.jsonl"

    return move


def test_logits_that_are_no_numbers_are_an_error():
    logits = np.zeros((4, 4), np.float32)
    logits[1, 1] = np.nan
    with pytest.raises(ConfigError, match="no numbers"):
        calibration.calibrate([(logits, np.eye(4, dtype=np.uint8))])


def test_a_calibration_ends_with_sentences_for_people():
    found = Calibration(
        temperature=1.25, threshold=0.4, num_images=1, error_before=0.1, error_after=0.02, dice_at_half=0.7, dice=0.75,
        min_confidence=None, area_fraction=(0.001, 1.0), reliability=[],
    )  # fmt: skip
    text = "\n".join(calibration.describe_calibration(found, "calibrated"))
    for words in ("temperature 1.25: ", "threshold 0.4: ", "0.1 % to 100 % of the image", "1 validation image;"):
        assert words in text


def peaks(*values, is_positive):
    """Images of 12 x 12 pixels with a highest logit each, and a target or none."""
    for value in values:
        logits, mask = np.full((12, 12), -6.0), np.zeros((12, 12), np.uint8)
        logits[2:6, 2:6], mask[2:6, 2:6] = value, is_positive
        yield logits, mask


@pytest.mark.parametrize(("specificity", "right", "sensitivity"), [(1.0, 1.0, 0.5), (0.75, 0.75, 0.75), (0.5, 0.5, 1)])
def test_the_threshold_of_presence_is_the_lowest_with_the_specificity(specificity, right, sensitivity):
    images = [*peaks(-3, -2, 0, 3, is_positive=False), *peaks(-1, 1, 4, 5, is_positive=True)]
    found = calibrate(images, specificity)
    assert (found.specificity, found.sensitivity, found.num_negatives) == (right, sensitivity, 4)
    limit = found.temperature * np.log(found.presence_threshold / (1 - found.presence_threshold))
    assert limit == pytest.approx({1.0: 3.5, 0.75: 0.5, 0.5: -1.5}[specificity], abs=0.01)


def test_a_presence_takes_the_place_of_the_highest_logit():
    """Whatever the temperature, which belongs to the logits of pixels."""
    presences = [(0.9, 1), (0.6, 1), (0.3, 1), (0.7, 0), (0.2, 0)]
    images = [
        (np.full((8, 8), 5.0 if is_positive else -5.0), np.full((8, 8), is_positive, np.uint8), presence)
        for presence, is_positive in presences
    ]
    found = calibrate(images, 0.5)
    odds = np.log([0.2 / 0.8, 0.3 / 0.7])
    assert found.presence_threshold == pytest.approx(1 / (1 + np.exp(-odds.mean())))  # in the middle of the logits
    assert (found.specificity, found.sensitivity) == (0.5, 1)
    assert calibrate(images, 1.0).sensitivity == pytest.approx(1 / 3)
    assert calibrate([(*image[:2], None) for image in images], 1.0).sensitivity == 1


def test_a_specificity_that_cannot_be_had_is_refused_and_none_is_asked_for_by_default():
    positive = list(peaks(1, 2, is_positive=True))
    with pytest.raises(ConfigError, match="all validation images show the finding"):
        calibrate(positive, 0.9)
    with pytest.raises(ConfigError, match="a probability of 1"):
        calibrate([*positive, *peaks(5000, is_positive=False)], 0.9)
    plain = calibrate([*positive, *peaks(-2, is_positive=False)])
    assert (plain.presence_threshold, plain.specificity, plain.num_negatives) == (None, None, 1)
