"""What a command says if a checkpoint or a dataset is another one than when the run began."""

import pytest

from vlsm.checkpoints import Calibration
from vlsm.config import SegmentSettings
from vlsm.evaluation.settings import EvaluateSettings
from vlsm.runs.facts import recorded_calibrations
from vlsm.runs.record import describe_differences, make_record

NUMBERS = {"temperature": 1.30456, "threshold": 0.45, "num_images": 100, "error_before": 0.1, "error_after": 0.02}
NUMBERS |= {"dice_at_half": 0.7, "dice": 0.8, "min_confidence": 0.6, "area_fraction": [0.01, 0.4]}
PLAIN, CALIBRATED = ({"model": "unet_d", "calibration": numbers} for numbers in (None, NUMBERS))


def segment_settings(*checkpoints):
    return SegmentSettings(input="scans", output="out", members=[{"checkpoint": uri} for uri in checkpoints])


def facts_of(*members):
    return {"checkpoint_digests": [digest for digest, _ in members], "checkpoints": [fact for _, fact in members]}


def segment_differences(there, now, *, without=()):
    """The differences of a run on checkpoints, each a location, a digest and a fact."""
    (old, old_facts), (new, new_facts) = (
        (segment_settings(*(uri for uri, *_ in side)), facts_of(*(rest for _, *rest in side))) for side in (there, now)
    )
    record = {key: value for key, value in make_record(old, old_facts, {}).items() if key not in without}
    return describe_differences(record, new, new_facts)


def test_a_checkpoint_is_named_by_its_folder_model_and_calibration():
    one, other = ("/one", "a" * 64, PLAIN), ("/other/", "b" * 64, CALIBRATED)
    assert segment_differences([one], [("/elsewhere", *one[1:])]) == []  # it has moved
    assert segment_differences([one], [other]) == [
        "the checkpoint (there '/one', unet_d, not calibrated; now '/other', unet_d, temperature 1.3)"
    ]
    assert segment_differences([one], [("/one", *other[1:])]) == [
        "the files of checkpoint '/one' have changed since the run began (there unet_d, not calibrated, now unet_d, "
        "temperature 1.3)"
    ]
    (phrase,) = segment_differences([other, one], [other, ("/one", "c" * 64, PLAIN)])
    assert phrase.startswith("the files of checkpoint '/one' have changed")
    members, number = segment_differences([one], [one, other])
    assert members.startswith("members (there [{") and number == "the number of checkpoints (there 1, now 2)"


def test_a_run_of_an_earlier_version_has_an_unknown_model_and_a_damaged_one_is_told():
    one, other = ("/one", "a" * 64, PLAIN), ("/other", "b" * 64, CALIBRATED)
    assert segment_differences([one], [other], without=["checkpoints"]) == [
        "the checkpoint (there '/one', an unknown model; now '/other', unet_d, temperature 1.3)"
    ]
    assert segment_differences([one], [one], without=["checkpoints"]) == []
    assert segment_differences([one], [one], without=["checkpoint_digests"]) == []
    settings, facts = segment_settings("/one"), facts_of(one[1:])
    for damaged in ({"checkpoint_digests": 3}, {"checkpoint_digests": ["x"], "checkpoints": "none"}):
        record = make_record(settings, facts, {}) | damaged
        (phrase,) = describe_differences(record, settings, facts)
        assert phrase.startswith("checkpoint_digests (there ")


def test_descriptive_facts_alone_are_no_difference():
    settings, facts = segment_settings("/one"), facts_of(("a", PLAIN))
    record = make_record(settings, facts, {}) | {"checkpoints": [CALIBRATED]}
    assert describe_differences(record, settings, facts) == []


@pytest.mark.parametrize(
    ("changes", "phrases"),
    [
        ({}, []),
        ({"checkpoint_digests": {"a": ["2"]}}, ["system a: the files of checkpoint '/a' have changed since the run "]),
        ({"mask_runs": {"m": "two"}}, ["masks m: the segment run in '/m' is another one than before"]),
        (
            {"records_digest": "2", "num_records": {"kvasir": 120, "busi": 7}},
            ["the test records of the datasets have changed (kvasir has 120 records, there 100)"],
        ),
        (
            {"records_digest": "2"},
            ["the test records of the datasets have changed (their images, labels or prompts)"],
        ),
    ],
)
def test_an_evaluation_names_the_system_the_run_or_the_dataset(changes, phrases):
    tree = {"output": "out", "datasets": {"kvasir": "/k"}, "masks": {"m": "/m"}}
    settings = EvaluateSettings(**tree, systems={"a": [{"checkpoint": "/a"}]})
    facts = {"checkpoint_digests": {"a": ["1"]}, "checkpoints": {"a": [PLAIN]}, "mask_runs": {"m": "one"}}
    facts |= {"records_digest": "1", "num_records": {"kvasir": 100, "busi": 7}}
    found = describe_differences(make_record(settings, facts, {}), settings, facts | changes)
    assert len(found) == len(phrases)
    assert all(text.startswith(phrase) for text, phrase in zip(found, phrases, strict=True))


def test_recorded_calibrations_are_those_of_their_checkpoints_and_damage_is_left_out():
    found = recorded_calibrations(["/a", "/b"], [PLAIN, CALIBRATED])
    assert found == {"/a": None, "/b": Calibration(**NUMBERS)}
    for damaged in (None, 3, "ab", {}, [3, "x"], [{"calibration": {"temperature": -1}}], [{}]):
        assert recorded_calibrations(["/a", "/b"], damaged) == {}
