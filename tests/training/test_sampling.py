"""The order in which a training sees its examples, and the prompt of each."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from vlsm.datasets.records import NO_MASK, Record
from vlsm.errors import ConfigError, ManifestError
from vlsm.training.sampling import ExampleOrder, choose_prompt, cut_batches
from vlsm.training.settings import DataSettings, TrainSettings


def make_records(**counts):
    """So many of each split_dataset; p1 is one text, p2 two."""
    prompts = {"p0": ("",), "p1": ("polyp",), "p2": ("flat polyp", "round polyp")}
    return [
        Record(dataset, split, f"record {number}", f"{dataset}{number}.png", "mask.png", prompts)
        for name, count in counts.items()
        for split, dataset in [name.split("_")]
        for number in range(count)
    ]


def make_settings(**changes):
    tree = {"output": "out", "datasets": {"a": "a", "b": "b"}, "model": "unet"} | changes
    return TrainSettings.model_validate(tree)


def used(batches):
    return [
        example for batch in batches for example, weight in zip(batch.examples, batch.weights, strict=True) if weight
    ]


@pytest.mark.parametrize("num_workers", [1, 2, 3, 7])
def test_workers_share_the_same_steps_whatever_their_number(num_workers):
    records = make_records(train_a=37, val_a=11)
    settings = make_settings(optim={"batch_size": 8}, run={"micro_batch_size": 2})
    alone = {step: set() for step in range(5)}
    for batch in ExampleOrder(records, settings).train(3):
        alone[batch.step] |= set(zip(batch.examples, batch.prompts, batch.seeds, strict=True))
    together = {step: set() for step in range(5)}
    orders = [ExampleOrder(records, settings, rank, num_workers) for rank in range(num_workers)]
    for batches in zip(*(order.train(3) for order in orders), strict=True):
        assert len({(batch.step, batch.ends_step, batch.batch_size, len(batch.examples)) for batch in batches}) == 1
        for batch in batches:
            rows = zip(batch.examples, batch.prompts, batch.seeds, batch.weights, strict=True)
            together[batch.step] |= {row[:3] for row in rows if row[3]}
    assert together == alone
    for split in ("train", "val"):
        batches = [
            batch for order in orders for batch in (order.train(3) if split == "train" else order.evaluate("val", 3))
        ]
        assert Counter(used(batches)) == Counter(i for i, record in enumerate(records) if record.split == split)


def test_an_epoch_goes_on_from_any_step():
    order = ExampleOrder(make_records(train_a=37), make_settings(optim={"batch_size": 8}, data={"prompt": "random"}))
    whole = list(order.train(2))
    assert order.num_steps == 5
    assert list(order.train(2, first_step=3)) == [batch for batch in whole if batch.step >= 3]


def test_order_prompts_and_seeds_follow_from_the_seed_and_differ_between_epochs():
    records = make_records(train_a=30)
    settings = make_settings(data={"prompt": "p2"})
    first, again, other = (list(ExampleOrder(records, settings).train(epoch)) for epoch in (0, 0, 1))
    assert first == again
    assert used(first) != used(other)
    assert {prompt for batch in first for prompt in batch.prompts} == {"flat polyp", "round polyp"}
    orders = [ExampleOrder(records, make_settings(seed=seed)) for seed in (0, 1)]
    assert used(orders[1].train(0)) != used(orders[0].train(0))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ("proportional", {"a": 90, "b": 10}),
        ("uniform", {"a": 50, "b": 50}),
        ({"a": 1, "b": 3}, {"a": 25, "b": 75}),
        ({"a": 1}, {"a": 100}),
    ],
)
def test_datasets_are_seen_as_often_as_sampling_says(sampling, expected):
    records = make_records(train_a=90, train_b=10)
    order = ExampleOrder(records, make_settings(data={"sampling": sampling}))
    seen = used(order.train(0))
    assert Counter(records[example].dataset for example in seen) == expected
    repeats = Counter(example for example in seen if records[example].dataset == "b").values()
    assert not repeats or max(repeats) - min(repeats) <= 1


def test_no_batch_is_a_single_image_left_over():
    assert [len(batch) for batch in cut_batches(np.arange(33), 16)] == [11, 11, 11]
    assert cut_batches(np.arange(0), 16) == []


def test_validation_prompts_stay_the_same():
    order = ExampleOrder(make_records(val_a=9), make_settings(data={"prompt": "random"}))
    assert list(order.evaluate("val", 0)) == [
        batch.__class__(**batch.__dict__ | {"epoch": 0}) for batch in order.evaluate("val", 5)
    ]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("p1", "polyp"),
        ("p2", "flat polyp"),
        ("text: a lesion", "a lesion"),
        ({"a": "p2"}, "flat polyp"),
        ({}, "polyp"),
        ("p0", ""),
        ("random", "polyp"),
    ],
)
def test_the_prompt_is_a_choice(choice, expected):
    (record,) = make_records(train_a=1)
    assert choose_prompt(record, DataSettings(prompt=choice), None) == expected


@pytest.mark.parametrize("prompts", [{}, {"p0": ("",)}])
def test_a_dataset_without_prompts_is_told_where_to_give_one(prompts):
    (record,) = make_records(train_a=1)
    with pytest.raises(
        ManifestError, match="record 0: there is no prompt; --set data.prompts.a=WORDS gives the dataset"
    ):
        choose_prompt(dataclasses.replace(record, prompts=prompts), DataSettings(), None)


def test_random_draws_a_kind_before_a_text():
    """A kind with many texts is drawn as often as a kind with one."""
    texts = {"p0": ("",), "p1": ("polyp",), "p2": tuple(f"polyp {n}" for n in range(9)), "p3": ("",), "p4": ("x", "")}
    record = Record("a", "train", "record", "image.png", "mask.png", texts)
    rng = np.random.default_rng(0)
    seen = Counter(choose_prompt(record, DataSettings(prompt="random"), rng) for _ in range(600))
    assert "" not in seen and len(seen) == 11
    assert all(170 < seen[text] < 230 for text in ("polyp", "x"))


def test_a_prompt_that_a_record_lacks_names_it():
    (record,) = make_records(train_a=1)
    with pytest.raises(
        ManifestError, match="dataset a, record 0: there is no prompt for data.prompt=p9; it has p0, p1"
    ):
        choose_prompt(record, DataSettings(prompt="p9"), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "unte"}, "unknown model 'unte'; did you mean 'unet'"),
        ({"model": None}, "give either a model"),
        ({"external": {"a": "x"}}, "a is named both as a dataset and as an external one"),
        ({"datasets": {"mean": "x"}}, "may not be called mean"),
        ({"data": {"sampling": {"c": 1}}}, "data.sampling names c; datasets are a, b"),
        ({"data": {"sampling": {"a": 0}}}, "weights of 0 or more, one above 0"),
        ({"run": {"workers": "8..2"}}, "it must be 1 or more"),
        ({"run": {"workers": "two"}}, "neither a number nor MIN..MAX"),
        ({"run": {"fsdp": True}}, "run.fsdp is for trainable=all"),
        ({"optim": {"dice_weight": 0, "ce_weight": 0}}, "one of them must weigh something"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    from vlsm.config import load_settings

    with pytest.raises(ConfigError, match=message):
        load_settings(
            TrainSettings, None, [], {"output": "o", "datasets": {"a": "a", "b": "b"}, "model": "unet"} | changes
        )


def mixed(num_negative, num_positive, dataset="a"):
    """Train records of a dataset of which the first ones are negative."""
    records = make_records(**{f"train_{dataset}": num_negative + num_positive})
    return [
        dataclasses.replace(record, mask_uri=NO_MASK if number < num_negative else "mask.png")
        for number, record in enumerate(records)
    ]


def drawn(records, settings, epoch=0, are_negative=None):
    return Counter(used(ExampleOrder(records, settings, are_negative=are_negative).train(epoch)))


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.1, 2), (0.5, 10), (0.9, 18)])
@pytest.mark.parametrize("num_negative", [3, 15])
def test_negative_examples_have_their_share_and_repeat_only_after_all_were_used(share, expected, num_negative):
    counts = drawn(mixed(num_negative, 20 - num_negative), make_settings(data={"negatives": share}))
    negative = {number: count for number, count in counts.items() if number < num_negative}
    positive = {number: count for number, count in counts.items() if number >= num_negative}
    assert (sum(negative.values()), sum(positive.values())) == (expected, 20 - expected)
    for kind, size in ((negative, num_negative), (positive, 20 - num_negative)):
        times = [kind.get(number, 0) for number in range(20) if (number < num_negative) == (kind is negative)]
        assert max(times) - min(times) <= 1 and len(times) == size


def test_without_a_share_each_example_comes_once_and_the_order_is_as_in_earlier_versions():
    records = mixed(5, 15)
    assert set(drawn(records, make_settings()).values()) == {1}
    order = used(ExampleOrder(records, make_settings(seed=3)).train(2))
    assert order == np.random.default_rng([3, 2]).permutation(np.arange(20)).tolist()


def test_masks_that_are_empty_count_as_negative_where_they_are_known():
    records = make_records(train_a=10)
    are_negative = [number == 4 for number in range(10)]
    counts = drawn(records, make_settings(data={"negatives": 0.3}), are_negative=are_negative)
    assert counts[4] == 3 and counts.total() == 10


def test_the_share_holds_in_each_dataset_that_has_both_kinds():
    records = [*mixed(2, 8, "a"), *mixed(0, 10, "b"), *mixed(10, 0, "c")]
    settings = make_settings(
        datasets=dict.fromkeys("abc", "x"), data={"negatives": 0.5, "sampling": {"a": 2, "b": 1, "c": 1}}
    )
    counts = drawn(records, settings)
    parts = [sum(counts[number] for number in part) for part in (range(2), range(2, 10), range(10, 20), range(20, 30))]
    assert parts in ([8, 7, 7, 8], [7, 8, 8, 7], [8, 7, 8, 7])  # half of a dataset's 15, rounded
