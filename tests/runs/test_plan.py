import pytest

from vlsm.errors import ManifestError
from vlsm.runs.plan import cut_shards, planned_keys, read_plan, read_shard, write_plan


def make_rows(counts):
    return [
        {"image_id": f"i{number}", "image_uri": f"/i{number}", "prompts": [f"p{prompt}" for prompt in range(count)]}
        for number, count in enumerate(counts)
    ]


def test_shards_hold_as_many_images_as_their_rows_allow():
    shards = list(cut_shards(make_rows([2, 2, 3, 9, 1, 1]), shard_rows=4))
    assert [[row["image_id"] for row in shard] for shard in shards] == [["i0", "i1"], ["i2"], ["i3"], ["i4", "i5"]]


def test_every_shard_reads_back_as_planned_across_files(tmp_path):
    rows = make_rows([1] * 150)
    plan = write_plan(str(tmp_path), iter(rows), shard_rows=1)
    assert (plan.num_images, plan.num_rows, plan.num_shards) == (150, 150, 150)
    assert len(list((tmp_path / "manifest").iterdir())) == 3
    shards = [read_shard(str(tmp_path), plan.id, shard) for shard in range(plan.num_shards)]
    found = [row for shard in shards for row in shard.select(["image_id", "prompts"]).to_pylist()]
    assert found == [{"image_id": row["image_id"], "prompts": ["p0"]} for row in rows]
    assert list(read_plan(str(tmp_path), plan)) == shards


def test_rows_of_several_kinds_are_planned(tmp_path):
    kinds = ["mask", "member 1", "member 2", "labels"]
    plan = write_plan(str(tmp_path), make_rows([2, 1]), shard_rows=4, kinds=kinds)
    assert (plan.num_rows, plan.kinds) == (2 * 3 + 1 + 3 + 1, kinds)
    assert planned_keys(["a", "é"], ["mask", "labels"]) == [("a", "mask"), ("é", "mask"), ('["a", "é"]', "labels")]
    assert len(planned_keys(["a", "é"], kinds)) + len(planned_keys(["a"], kinds)) == plan.num_rows


def test_a_window_counts_as_much_as_an_image_of_its_own():
    rows = make_rows([1, 1, 1, 2])
    rows[1]["num_windows"] = rows[3]["num_windows"] = 4
    assert [len(shard) for shard in cut_shards(rows, shard_rows=5)] == [2, 1, 1]


def test_an_id_that_stands_twice_is_named(tmp_path):
    rows = make_rows([1] * 40)
    rows[33]["image_id"] = "i2"
    with pytest.raises(ManifestError, match="'i2' stands twice"):
        write_plan(str(tmp_path), rows, shard_rows=4)
    assert not list((tmp_path / "manifest").iterdir())
