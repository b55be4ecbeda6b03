"""Splits that are made: what belongs together never crosses, and the shares are met as well as whole clusters allow."""

import random
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlsm.datasets.inspection import NEAR_BITS, Facts
from vlsm.datasets.records import SPLITS, Record
from vlsm.datasets.settings import SplitSettings
from vlsm.datasets.splits import _find_look_alikes, make_folds, make_splits, release_train
from vlsm.errors import ConfigError

TENTHS = SplitSettings(val=0.1, test=0.1)


def make_record(number, dataset="a", split="", group="", prompt="polyp", **fields):
    """A record of an image of its own, unless `image_uri` is given."""
    uri = fields.pop("image_uri", f"/{dataset}/{number}.png")
    return Record(dataset, split, f"row {number}", uri, f"{uri}.mask", {"p1": (prompt,)}, group=group, **fields)


def make_facts(records, hashes=None, area=0.2):
    """Facts of images that are all different, unless hashes are given."""
    rng = random.Random(0)
    hashes = hashes or [rng.getrandbits(64) for _ in records]
    return [
        Facts(None, 8, 8, record.image_uri, f"{number}", area, image_hash)
        for number, (record, image_hash) in enumerate(zip(records, hashes, strict=True))
    ]


def splits_of(records):
    return {record.where: record.split for record in records}


def count(records, **fields):
    return Counter(
        record.split for record in records if all(getattr(record, name) == value for name, value in fields.items())
    )


@st.composite
def datasets(draw):
    """Records with groups, images with several records, images of equal content, and images that are nearly equal."""
    base = [random.Random(number).getrandbits(64) for number in range(12)]
    records, facts = [], []
    for number in range(draw(st.integers(3, 30))):
        image = draw(st.integers(0, 20))
        flipped = draw(st.lists(st.integers(0, 63), max_size=NEAR_BITS))
        split = draw(st.sampled_from(["", "", "", "train", "val", "test"]))
        group = draw(st.sampled_from(["", "", "p", "q"]))
        record = make_record(number, draw(st.sampled_from("ab")), split, group, image_uri=f"/{image}.png")
        image_hash = draw(st.sampled_from(base))
        for bit in flipped:
            image_hash ^= 1 << bit
        records.append(record)
        facts.append(Facts(None, 8, 8, draw(st.sampled_from("xyzuvw")) + str(image % 7), "", 0.1, image_hash))
    return records, facts


def belong_together(first, second, fact, other):
    return (
        first.image_uri == second.image_uri
        or fact.image_sha256 == other.image_sha256
        or (first.dataset == second.dataset and first.group == second.group != "")
        or (fact.image_hash ^ other.image_hash).bit_count() <= NEAR_BITS
    )


@settings(max_examples=30, deadline=None)
@given(datasets(), st.integers(0, 3), st.randoms(use_true_random=False))
def test_nothing_that_belongs_together_crosses_and_the_order_is_of_no_importance(dataset, seed, rng):
    records, facts = dataset
    chosen = SplitSettings(val=0.2, test=0.2, seed=seed)
    try:
        made, _ = make_splits(records, facts, chosen)
    except ConfigError as error:
        assert "data.split leaves no" in str(error)
        return
    for before, after in zip(records, made, strict=True):
        assert after.split in SPLITS and after == replace(before, split=after.split)
        assert before.split in ("", after.split)
    new = [number for number, record in enumerate(records) if not record.split]
    for one in new:
        for other in new:
            if belong_together(records[one], records[other], facts[one], facts[other]):
                assert made[one].split == made[other].split
        fixed = {
            record.split
            for record, fact in zip(records, facts, strict=True)
            if record.split and belong_together(records[one], record, facts[one], fact)
        }
        assert "train" not in fixed or made[one].split == "train"
    order = rng.sample(range(len(records)), len(records))
    again, _ = make_splits([records[number] for number in order], [facts[number] for number in order], chosen)
    assert splits_of(again) == splits_of(made)


@pytest.mark.parametrize("number", [10, 100, 137])
def test_single_images_meet_the_shares_of_each_dataset(number):
    records = [make_record(index, dataset) for dataset in "ab" for index in range(number)]
    made, lines = make_splits(records, make_facts(records), TENTHS)
    for dataset in "ab":
        counts = count(made, dataset=dataset)
        assert all(abs(counts[split] - share * number) <= 1 for split, share in TENTHS.shares.items())
    assert lines[0].startswith(f"{'a':16} split: {number} record")
    assert f"train {count(made, dataset='a')['train']} of {0.8 * number:.1f} wanted" in lines[0]


def test_groups_of_different_sizes_meet_the_shares_as_well_as_they_allow():
    sizes = [40, 20, 10, 8, 6, 4, *[2] * 3, *[1] * 6]
    records = [
        make_record(f"{group}-{index}", group=f"video {group}")
        for group, size in enumerate(sizes)
        for index in range(size)
    ]
    counts = count(make_splits(records, make_facts(records), TENTHS)[0])
    assert all(abs(counts[split] - share * len(records)) <= 2 for split, share in TENTHS.shares.items())


def test_empty_masks_and_prompts_are_in_all_splits_by_their_shares():
    records = [make_record(index, prompt="benign" if index % 4 else "malignant") for index in range(80)]
    facts = [replace(fact, area_fraction=0.0 if index < 20 else 0.3) for index, fact in enumerate(make_facts(records))]
    made, _ = make_splits(records, facts, TENTHS)
    for counts in (count(made, prompts={"p1": ("malignant",)}), count(made[:20])):  # 20 records each
        assert abs(counts["train"] - 16) <= 1 and 1 <= counts["val"] <= 3 and 1 <= counts["test"] <= 3


def test_prompts_that_are_all_different_do_not_keep_images_from_val_and_test():
    records = [make_record(index, prompt=f"a lesion at {index}") for index in range(50)]
    assert count(make_splits(records, make_facts(records), TENTHS)[0]) == {"train": 40, "val": 5, "test": 5}


def test_the_seed_draws_other_images_and_the_place_of_a_dataset_does_not():
    records = [make_record(index) for index in range(60)]
    facts = make_facts(records)
    made = splits_of(make_splits(records, facts, TENTHS)[0])
    moved = [replace(record, image_uri=f"s3://b{record.image_uri}", dataset="z") for record in records]
    assert splits_of(make_splits(moved, facts, TENTHS)[0]) == made
    assert splits_of(make_splits(records, facts, TENTHS.model_copy(update={"seed": 1}))[0]) != made


@pytest.mark.parametrize(
    ("given_splits", "expected"), [(["test"], "test"), (["test", "val"], "val"), (["val", "train", "test"], "train")]
)
def test_a_look_alike_of_a_given_record_follows_it(given_splits, expected):
    records = [make_record(index) for index in range(30)]
    records += [make_record(f"given {split}", "b", split) for split in given_splits]
    hashes = [random.Random(index).getrandbits(64) for index in range(30)]
    facts = make_facts(records, hashes + [hashes[0] ^ (1 << bit) for bit in range(len(given_splits))])
    made, lines = make_splits(records, facts, TENTHS)
    assert made[0].split == expected and [record.split for record in made[30:]] == given_splits
    assert lines[-1].startswith("split: 1 of these records follow")


def test_what_is_kept_together_is_a_setting():
    hashes = [random.Random(index // 2).getrandbits(64) ^ index % 2 for index in range(80)]  # pairs
    records = [make_record(index, group=str(index // 20)) for index in range(80)]
    facts = make_facts(records, hashes)

    def crossing(size, **changes):
        made, _ = make_splits(records, facts, SplitSettings(val=0.25, test=0.25, **changes))
        return any(len({record.split for record in made[first : first + size]}) > 1 for first in range(0, 80, size))

    assert not crossing(20) and not crossing(20, look_alikes=False)
    assert crossing(20, by="image") and not crossing(2, by="image")
    assert crossing(2, by="image", look_alikes=False)


def test_a_group_is_one_of_its_dataset_and_all_slices_of_a_volume_stay_together():
    records = [make_record(index, dataset, group="patient 1") for dataset in "abc" for index in range(5)]
    made, _ = make_splits(records, make_facts(records), SplitSettings(val=0.3, test=0.3))
    assert {made[0].split, made[5].split, made[10].split} == set(SPLITS)
    slices = [
        make_record(f"{volume} {index}", image_uri=f"/{volume}.nii", image_selector=f"slice={index}")
        for volume in range(9)
        for index in range(6)
    ]
    facts = [replace(fact, image_sha256=slices[number].where) for number, fact in enumerate(make_facts(slices))]
    facts = [replace(fact, image_hash=0) if number % 6 == 0 else fact for number, fact in enumerate(facts)]  # blank
    by_volume = defaultdict(set)
    for record in make_splits(slices, facts, SplitSettings(val=0.3, test=0.3, by="image"))[0]:
        by_volume[record.image_uri].add(record.split)
    assert all(len(splits) == 1 for splits in by_volume.values()) and len(by_volume) == 9


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            ["one"] * 20,
            "leaves no val records: there are 20 records in 1 cluster that must stay together, the largest of 20",
        ),
        (
            ["one"] * 19 + ["two"],
            "leaves no .* in 2 clusters that must stay together, the largest of 19.*data.split.by=image",
        ),
        (["", ""], "leaves no test records: there are 2 records in 2 clusters"),
    ],
)
def test_too_few_clusters_are_refused_with_their_sizes(groups, message):
    records = [make_record(index, group=group) for index, group in enumerate(groups)]
    with pytest.raises(ConfigError, match=message):
        make_splits(records, make_facts(records), TENTHS)


def test_three_clusters_are_enough_for_three_splits_the_largest_for_train():
    records = [make_record(index, group=group) for index, group in enumerate(["one"] * 8 + ["two"] * 5 + ["three"])]
    assert count(make_splits(records, make_facts(records), TENTHS)[0])["train"] == 8


def test_records_without_a_split_are_refused_with_the_setting_to_copy():
    records = [make_record(0), make_record(1, split="train"), make_record(2, "b", "test")]
    with pytest.raises(
        ConfigError, match=r"1 of 2 records of a have no split .*: --set data.split.val=0.1 --set data.split.test=0.1"
    ):
        make_splits(records, make_facts(records), SplitSettings())


def test_records_that_all_have_splits_keep_them_and_the_log_says_so():
    records = [make_record(0, split="train"), make_record(1, split="val")]
    made, (line,) = make_splits(records, make_facts(records), TENTHS)
    assert made == records and line == "split: all records have splits already; data.split makes none"
    assert make_splits(records, make_facts(records), SplitSettings()) == (records, [])


def test_shares_that_leave_nothing_to_train_are_refused():
    with pytest.raises(ValueError, match="together they must be below 1"):
        SplitSettings(val=0.5, test=0.5)


def test_broken_records_count_for_nothing():
    records = [make_record(index) for index in range(20)]
    facts = [*make_facts(records[:10]), *[Facts(error="gone")] * 10]
    made, _ = make_splits(records, facts, TENTHS)
    assert count(made[:10]) == {"train": 8, "val": 1, "test": 1} and count(made[10:]) == {"": 10}


@pytest.mark.parametrize("chosen", [TENTHS, SplitSettings()])
def test_folds_have_equal_tests_and_each_other_record_is_val_once(chosen):
    records = [make_record(index, group=str(index // 2)) for index in range(60)]
    if chosen.is_off:
        records = [replace(record, split="test" if index < 6 else "train") for index, record in enumerate(records)]
    folds, lines = make_folds(records, make_facts(records), chosen, 5)
    tests = [{record.where for record in fold if record.split == "test"} for fold in folds]
    vals = [{record.where for record in fold if record.split == "val"} for fold in folds]
    assert all(test == tests[0] and len(test) == 6 for test in tests)
    assert sum(map(len, vals)) == len(set.union(*vals)) == 54 and {len(val) for val in vals} <= {10, 12}
    for fold in folds:
        by_group = defaultdict(set)
        for record in fold:
            by_group[record.group].add(record.split)
        assert all(len(splits) == 1 for splits in by_group.values())
    assert lines[-1].startswith("fold 5 of 5: ")


def test_folds_without_clusters_enough_are_refused():
    records = [make_record(index, split="train", group="one") for index in range(9)]
    with pytest.raises(ConfigError, match="folds: fold 1 has no val or train records: 9 records in 1 cluster"):
        make_folds(records, make_facts(records), SplitSettings(), 3)


def test_what_belongs_to_a_test_record_is_test_in_every_fold():
    records = [make_record(number, group=f"patient {number // 3}") for number in range(12)]
    records[0] = replace(records[0], split="test")
    folds, lines = make_folds(records, make_facts(records), SplitSettings(), 3)
    assert all([record.split for record in fold[:3]] == ["test"] * 3 for fold in folds)
    assert all(set(count(fold)) == {"train", "val", "test"} for fold in folds)
    assert any("2 records follow a test record" in line for line in lines)


def test_frames_that_all_look_alike_are_one_cluster_and_few_pairs():
    hashes = [(1 << 40) - 1 ^ (1 << first) ^ (1 << second) for first in range(40) for second in range(first)]
    pairs = list(_find_look_alikes(hashes))
    assert len(pairs) < 2 * len(hashes)
    reached = {0}
    for _ in range(4):
        reached |= {one for pair in pairs if reached & set(pair) for one in pair}
    assert len(reached) == len(hashes)


def test_val_is_taken_from_train_where_a_dataset_has_no_val():
    a = [make_record(number, "a", "train" if number < 15 else "test") for number in range(20)]
    b = [make_record(number, "b", "train" if number < 15 else "val") for number in range(20)]
    assert release_train(a + b, SplitSettings()) == a + b
    released = release_train(a + b, SplitSettings(val=0.2))
    assert count(released, dataset="a") == {"": 15, "test": 5} and count(released, dataset="b") == count(b)
    made, _ = make_splits(released, make_facts(released), SplitSettings(val=0.2))
    assert count(made, dataset="a") == {"train": 12, "val": 3, "test": 5}
