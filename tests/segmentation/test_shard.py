import itertools

import numpy as np
import pytest
from PIL import Image

from vlsm.config import SegmentSettings
from vlsm.images.preprocess import Square
from vlsm.segmentation.finished import FinishedMask
from vlsm.segmentation.shard import SHARD_SCHEMA, Entry, Logits, ShardBatch, Unguarded, read_shard_images


def make_batch(*sizes, num_members=2):
    """A batch of three images, of which the third has the bytes of the first; the second cannot be read."""
    entries = [
        Entry(4, 3, 20, 30, first_window=0, num_windows=2, first_logit=0, content_sha256="a"),
        Entry(7, 2, error="corrupt: b.png is no image", first_logit=6),
        Entry(8, 1, 20, 30, first_window=0, num_windows=2, first_logit=6, content_sha256="a"),
    ]
    rng = np.random.default_rng(0)
    pixels = {
        Square(size, resize): rng.integers(0, 255, (2, size, size, 3), dtype=np.uint8)
        for size, resize in zip(sizes, itertools.cycle(["squeeze", "letterbox"]))
    }
    logits = {
        number: Logits(f"model@{number}", rng.normal(size=(8, 4 + number, 4 + number)).astype(np.float16))
        for number in range(num_members)
    }
    return ShardBatch(12, True, entries, pixels, logits)


@pytest.mark.parametrize("sizes", [(), (8,), (8, 16), (16, 8)])
@pytest.mark.parametrize("num_members", [0, 1, 2])
def test_a_batch_is_the_same_after_its_journey(sizes, num_members):
    batch = make_batch(*sizes, num_members=num_members)
    table = batch.pack()
    assert table.schema == SHARD_SCHEMA and len(table) == 1
    arrived = ShardBatch.unpack(table)
    assert (arrived.shard, arrived.exists, arrived.entries) == (12, True, batch.entries)
    assert arrived.pixels.keys() == batch.pixels.keys() and arrived.logits.keys() == batch.logits.keys()
    for square, pixels in batch.pixels.items():
        np.testing.assert_array_equal(arrived.pixels[square], pixels)
    for number, logits in batch.logits.items():
        assert arrived.logits[number].name == logits.name
        np.testing.assert_array_equal(arrived.logits[number].values, logits.values)


def test_large_arrays_are_not_copied():
    batch = make_batch(8, num_members=1)
    table = batch.pack()
    (square,) = batch.pixels
    assert np.shares_memory(ShardBatch.unpack(table).pixels[square], batch.pixels[square])
    assert np.shares_memory(ShardBatch.unpack(table).logits[0].values, batch.logits[0].values)


def test_a_batch_without_images_travels_too():
    arrived = ShardBatch.unpack(ShardBatch(3, False, [], {Square(8): np.zeros((0, 8, 8, 3), np.uint8)}).pack())
    assert (arrived.shard, arrived.entries, arrived.num_logits) == (3, [], 0)
    assert arrived.pixels[Square(8)].shape == (0, 8, 8, 3)


def test_logits_of_an_image_are_by_prompt_member_text_and_window():
    batch = make_batch(8)
    values = batch.logits[1].values
    first, second = batch.logits_of(batch.entries[0], [("polyp",), ("lesion", "flat lesion")])
    assert [member.shape for member in first] == [(1, 2, 4, 4), (1, 2, 5, 5)]
    np.testing.assert_array_equal(first[1], values[None, 0:2])
    np.testing.assert_array_equal(second[1], values[2:6].reshape(2, 2, 5, 5))
    ((_, twin),) = batch.logits_of(batch.entries[2], [("polyp",)])
    np.testing.assert_array_equal(twin, values[None, 6:8])


def test_images_are_decoded_once_and_cut_into_windows(tmp_path):
    rng = np.random.default_rng(1)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 255, (30, 70, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "d.png").write_bytes(b"no image")
    rows = [{"image_uri": str(tmp_path / f"{name}.png"), "selector": None} for name in "abcd"]
    settings = SegmentSettings(input="", output="", members=[{"checkpoint": "x"}], tile={"size": 40, "overlap": 0})
    squares = [Square(16), Square(16, "letterbox"), Square(16)]
    entries = [Entry(position, num_texts=2) for position in range(4)]
    batch = read_shard_images(ShardBatch(0, False, entries), rows, squares, settings, Unguarded())
    a, b, c, d = batch.entries
    assert (a.first_window, a.num_windows) == (c.first_window, c.num_windows)
    assert {a.first_window, b.first_window} == {0, 2} and a.num_windows == b.num_windows == 2
    assert [entry.first_logit for entry in batch.entries] == [0, 4, 8, 12]
    assert (d.num_windows, d.error.partition(":")[0]) == (0, "corrupt")
    assert batch.num_logits == 12 and {*batch.pixels} == {Square(16), Square(16, "letterbox")}
    image = np.asarray(Image.open(tmp_path / "b.png"))
    for square, pixels in batch.pixels.items():
        assert pixels.shape == (4, 16, 16, 3)
        np.testing.assert_array_equal(pixels[b.first_window + 1], square.resize_image(image[:, 30:]))


def test_masks_of_the_device_travel_in_place_of_logits():
    batch = make_batch(8)
    batch.entries[0].first_mask, batch.entries[0].num_masks = 0, 2
    batch.entries[2].first_mask, batch.entries[2].num_masks = 0, 2
    labels = np.arange(12, dtype=np.uint16).reshape(3, 4).T
    batch.masks = [
        FinishedMask(np.array([3, 70_000], np.uint32), 12.5, agreement=0.75),
        FinishedMask(np.zeros(0, np.uint32), 0.0, label_map=labels),
    ]
    batch.logits = {0: Logits("model@0", np.zeros((0, 4, 4), np.float16))}
    assert batch.num_logits == 0
    arrived = ShardBatch.unpack(batch.pack())
    assert arrived.entries == batch.entries and arrived.logits[0].name == "model@0"
    for mask, other in zip(arrived.masks, batch.masks, strict=True):
        assert (mask.probability_sum, mask.agreement) == (other.probability_sum, other.agreement)
        assert mask.changes.dtype == np.uint32
        np.testing.assert_array_equal(mask.changes, other.changes)
    assert arrived.masks[0].label_map is None and arrived.masks[1].label_map.dtype == np.uint16
    np.testing.assert_array_equal(arrived.masks[1].label_map, labels)
