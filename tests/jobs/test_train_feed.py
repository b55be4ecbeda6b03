"""The loading actors of a training worker, on Ray."""

import psutil
import pytest

from jobs.phantoms import write_labelled
from jobs.train_feed import Feed, _Loader, keep_decoded, plan_loaders
from vlsm.datasets.read import read_dataset
from vlsm.errors import ImageError
from vlsm.images.preprocess import Square
from vlsm.training.sampling import ExampleOrder
from vlsm.training.settings import TrainSettings

SQUARE = Square(24)


@pytest.fixture
def drawn(tmp_path):
    """Settings with augmentation, records and the micro-batches of some epochs."""
    write_labelled(tmp_path / "drawn", {"train": 9, "val": 2, "test": 1}, seed=2)
    tree = {"output": "out", "model": "pixel", "datasets": {"drawn": str(tmp_path / "drawn")}}
    tree |= {"data": {"augment": {"rotate_degrees": 20}}, "optim": {"batch_size": 3}}
    settings = TrainSettings.model_validate(tree)
    records = read_dataset("drawn", str(tmp_path / "drawn"), settings.data)
    order = ExampleOrder(records, settings)
    return settings.data, records, [batch for epoch in range(3) for batch in order.train(epoch)]


def loaders():
    children = psutil.Process().children(recursive=True)
    return [process for process in children if "ray::_Loader" in "".join(process.cmdline())]


def loaded(drawn, batches):
    data, records, _ = drawn
    return [_Loader(data, SQUARE, None).load(batch, [records[n] for n in batch.examples]) for batch in batches]


def assert_equal(found, expected, batches):
    assert [batch for batch, _, _ in found] == batches
    for (_, *arrays), wanted in zip(found, expected, strict=True):
        assert all((array == other).all() for array, other in zip(arrays, wanted, strict=True))


def test_micro_batches_come_in_order_whatever_becomes_of_the_loading_actors(ray_cluster, drawn):
    data, records, batches = drawn
    feed = Feed(records, data, SQUARE, None, num_loaders=2, max_bytes=1 << 20)  # its actors live as long
    stream = feed.stream(iter(batches))
    found = [next(stream)]
    first = loaders()
    for process in first:
        process.kill()
    found += stream
    assert_equal(found, loaded(drawn, batches), batches)
    assert {process.pid for process in loaders()} - {process.pid for process in first}


def test_decoded_examples_are_augmented_one_micro_batch_at_a_time_where_these_are_large(ray_cluster, drawn):
    data, records, batches = drawn
    taken = []
    feed = Feed(records, data, SQUARE, keep_decoded(records, data, SQUARE, True), num_loaders=1, max_bytes=1)
    stream, found = feed.stream(taken.append(batch) or batch for batch in batches), []
    for number in range(len(batches)):
        found.append(next(stream))
        assert len(taken) == number + 1
    assert_equal(found, loaded(drawn, batches), batches)


def test_what_a_loading_actor_cannot_read_is_its_own_error(ray_cluster, drawn, tmp_path):
    data, records, batches = drawn
    for record in records:
        (tmp_path / "drawn" / "images" / record.image_uri.rpartition("/")[2]).write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"^corrupt: .*train_\d+.jpg is not a JPEG"):
        list(Feed(records, data, SQUARE, None, num_loaders=1, max_bytes=1 << 20).stream(iter(batches)))


def test_a_worker_has_actors_for_the_cpus_that_no_worker_takes(monkeypatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 96.0, "object_store_memory": 1e9})
    assert plan_loaders(8, 1) == (11, 37_500_000)
    assert plan_loaders(1, 1) == (16, 300_000_000)
    assert plan_loaders(4, 24) == (1, 75_000_000)
