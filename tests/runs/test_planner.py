"""A plan that is written while its archive is listed, and broken off, and gone on with."""

import threading

import pytest

from vlsm.archive.archive import Archive
from vlsm.errors import StorageError
from vlsm.runs.plan import Plan, read_plan
from vlsm.runs.planner import Planner


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
        return Archive(rows(range(int(after[0][2:]) + 1, 500)))

    with make(tmp_path, goes_on, saved) as planner:
        plan = planner.result()
    assert asked == [("/i00255", None)]  # two files of 64 shards of two were whole
    assert ids(tmp_path, plan) == [f"i{number:05d}" for number in range(500)]
    assert saved == [plan] and plan.num_images == 500


def test_of_two_jobs_that_see_different_archives_both_have_one_plan(tmp_path):
    """An image has come, and one gone, between their listings; neither writes before both have begun."""
    numbers, saved, meet = list(range(700)), [], threading.Barrier(2, timeout=30)
    archives = [[*numbers[:5], *numbers[6:]], [*numbers[:400], *numbers[401:]]]

    def opened(own):
        def listing(after):
            for place, number in enumerate(own):
                if after is None and place == 100:
                    meet.wait()
                if after is None or number > int(after[0][2:]):
                    yield from rows([number])

        return lambda after: Archive(listing(after))

    first, second = (make(tmp_path, opened(archive), saved) for archive in archives)
    with first, second:
        plans = [first.result(), second.result()]
    found = ids(tmp_path, plans[0])
    assert plans[0] == plans[1] == saved[0] == saved[1]
    assert len(found) == len(set(found)) == plans[0].num_images
    assert {f"i{number:05d}" for number in set(archives[0]) & set(archives[1])} <= set(found)


@pytest.mark.parametrize("count", [127, 128, 129])
def test_a_complete_plan_is_not_gone_on_with(tmp_path, count):
    """Whatever has come since: the job that died before it could say so had begun with the plan as it was."""
    plans = []
    for extra in (0, 50):
        with make(tmp_path, lambda after, end=count + extra: Archive(rows(range(end))), plans) as planner:
            planner.result()
    assert plans[0] == plans[1]
    assert ids(tmp_path, plans[1]) == [f"i{number:05d}" for number in range(count)]
