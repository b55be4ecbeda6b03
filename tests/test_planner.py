"""A plan that is written while its archive is listed, and broken off, and gone on with."""

import threading

import pytest

from vlsm.archive import Archive
from vlsm.errors import StorageError
from vlsm.manifest import Plan, read_plan
from vlsm.planner import Planner


def rows(numbers):
    for number in numbers:
        yield {"image_id": f"i{number:05d}", "image_uri": f"/i{number:05d}", "image_version": None, "prompts": ["p"]}


def make(output, opened, saved):
    return Planner(str(output), Plan("one", is_complete=False), 2, opened, lambda plan, archive: saved.append(plan))


def ids(output, plan):
    return [image_id for shard in read_plan(str(output), plan) for image_id in shard["image_id"].to_pylist()]


def test_the_first_shards_are_there_before_the_listing_has_ended(tmp_path):
    gate, saved = threading.Event(), []

    def listing():
        yield from rows(range(300))
        assert gate.wait(30)
        yield from rows(range(300, 500))

    with make(tmp_path, lambda after: Archive(listing()), saved) as planner:
        assert planner.wait(0) >= 64
        assert not saved
        gate.set()
        plan = planner.result()
    assert saved == [plan]
    assert (plan.num_images, plan.num_shards, plan.is_complete) == (500, 250, True)
    assert ids(tmp_path, plan) == [f"i{number:05d}" for number in range(500)]


def test_a_listing_that_broke_off_goes_on_behind_what_is_written(tmp_path):
    def breaks_off():
        yield from rows(range(301))
        raise StorageError("the store is away")

    with make(tmp_path, lambda after: Archive(breaks_off()), []) as planner, pytest.raises(StorageError, match="away"):
        planner.result()
    asked, saved = [], []

    def goes_on(after):
        asked.append(after)
        return Archive(rows(range(int(after[2:]) + 1, 500)))

    with make(tmp_path, goes_on, saved) as planner:
        plan = planner.result()
    assert asked == ["/i00255"]  # two files of 64 shards of two were whole
    assert ids(tmp_path, plan) == [f"i{number:05d}" for number in range(500)]
    assert saved == [plan] and plan.num_images == 500
