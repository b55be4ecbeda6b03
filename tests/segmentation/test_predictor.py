"""A shard through the models: the same rows from masks made on the device and from logits."""

import contextlib
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import vlsm
from tests.conftest import SHARED, save_square
from vlsm.checkpoints import read_checkpoint
from vlsm.config import SegmentSettings
from vlsm.segmentation import predictor as predictor_module
from vlsm.segmentation.image_rows import describe_entry
from vlsm.segmentation.masks import decode_mask, decode_png
from vlsm.segmentation.predictor import Predictor
from vlsm.segmentation.shard import Entry, ShardBatch, Unguarded, read_shard_images


class Careful(Unguarded):
    """A guard after a death: it notes which image is under way."""

    is_careful = True

    def __init__(self, *blamed):
        self.blamed, self.seen, self.under_way = frozenset(blamed), [], None

    @contextlib.contextmanager
    def image(self, position):
        self.seen.append(position)
        self.under_way = position
        yield
        self.under_way = None


@pytest.fixture(scope="module")
def members(tiny_checkpoint, bright_checkpoint):
    return [bright_checkpoint, tiny_checkpoint]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, drawn):
    """Images of all kinds, some real: alike, tiny, long, twins, and one that is none."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number, size in enumerate([(1, 1), (400, 3), (50, 70), (50, 70), (31, 33)]):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    real = [
        path for kind in ("busi", "kvasir_seg") for path in sorted((SHARED / "data" / kind / "images").glob("*"))[:2]
    ]
    for number, path in enumerate(real or sorted((drawn / "images").iterdir())):
        shutil.copy(path, folder / f"real {number}{path.suffix}")
    shutil.copy(folder / "2.png", folder / "twin.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def make_settings(members, finish, **options):
    words = [{"checkpoint": str(path), "weight": 1 + number} for number, path in enumerate(members)]
    run = options.pop("run", {}) | {"finish": finish, "batch_size": options.pop("batch_size", 4)}
    return SegmentSettings(input="", output="", members=words, run=run, **{"threshold": 0.5} | options)


def segment(folder, settings, prompts=("a",), guard=None, report=lambda *words: None):
    """The batch after its journey, the texts, the squares and the rows of the images that can be read."""
    files = {number: read_checkpoint(member.checkpoint) for number, member in enumerate(settings.members)}
    predictor = Predictor(settings, files, "cpu")
    squares = [square for _, square in sorted(predictor.squares.items())]
    rows = [{"image_uri": str(path), "selector": None} for path in sorted(folder.iterdir())]
    texts = [settings.texts_of(prompts)] * len(rows)
    entries = [Entry(position, num_texts=sum(map(len, texts[0]))) for position in range(len(rows))]
    batch = read_shard_images(ShardBatch(0, False, entries), rows, squares, settings, Unguarded())
    predicted = predictor.predict(ShardBatch.unpack(batch.pack()), texts, guard or Unguarded(), report)
    batch = ShardBatch.unpack(replace(predicted, pixels={}).pack())
    described = {
        entry.position: describe_entry(batch, entry, texts[0], settings, squares)
        for entry in batch.entries
        if entry.error is None
    }
    return batch, described


def assert_equal_rows(found, wanted, batch):
    """Logits travel as float16, and a mask may differ where its probability is on the threshold."""
    sizes = {entry.position: (entry.height, entry.width) for entry in batch.entries}
    assert found.keys() == wanted.keys() and len(found) >= 9
    for position, rows in found.items():
        assert len(rows) == len(wanted[position])
        for one, other in zip(rows, wanted[position], strict=True):
            size = sizes[position]
            differing = (decode_mask(one.mask_rle, size) != decode_mask(other.mask_rle, size)).mean()
            assert differing < 0.003
            assert one.confidence == pytest.approx(other.confidence, abs=2e-3)
            assert one.agreement == pytest.approx(other.agreement, abs=5e-3)
            if one.label_map:
                assert (decode_png(one.label_map) != decode_png(other.label_map)).mean() < 0.003


@pytest.mark.parametrize(
    ("num_members", "prompts", "options"),
    [
        (1, ("a",), {"threshold": 0.55}),
        (1, ("a", "b", "c"), {"tile": {"size": 64}, "label_maps": True}),
        (2, ("a", "b"), {"classes": {"a": ["x", "y"]}, "member_rows": True, "label_maps": True}),
        (2, ("a",), {"combine": "vote", "tile": {"size": 200}}),
    ],
)
def test_rows_are_the_same_from_the_device_and_from_logits(folder, members, num_members, prompts, options):
    found, rows = segment(folder, make_settings(members[:num_members], "device", **options), prompts)
    plain, wanted = segment(folder, make_settings(members[:num_members], "cpu", **options), prompts)
    assert_equal_rows(rows, wanted, found)
    assert all(logits.values.size == 0 for logits in found.logits.values())  # no logits travel
    assert not plain.masks and found.masks
    assert {number: logits.name for number, logits in found.logits.items()} == {
        number: logits.name for number, logits in plain.logits.items()
    }
    names = [path.name for path in sorted(folder.iterdir())]
    by_name = {names[entry.position]: entry for entry in found.entries}
    assert by_name["broken.png"].error.startswith("corrupt") and by_name["broken.png"].num_masks == 0
    assert by_name["twin.png"].first_mask == by_name["2.png"].first_mask


def test_a_member_that_is_mirrored_too_has_the_same_mask(folder, members):
    settings = [make_settings(members, finish) for finish in ("device", "cpu")]
    flipped = [
        one.model_copy(update={"members": tuple(m.model_copy(update={"flip": True}) for m in one.members)})
        for one in settings
    ]
    (found, rows), (_, wanted) = (segment(folder, one) for one in flipped)
    assert_equal_rows(rows, wanted, found)
    _, plain = segment(folder, settings[0])
    assert [row[0].mask_rle for row in plain.values()] != [row[0].mask_rle for row in rows.values()]


@pytest.mark.parametrize("finish", ["device", "cpu"])
def test_rows_do_not_depend_on_the_batch_size_or_on_care(folder, members, finish):
    settings = make_settings(members, finish, tile={"size": 150}, batch_size=1)
    _, wanted = segment(folder, settings)
    for size, guard in ((7, None), (64, Careful())):
        run = settings.run.model_copy(update={"batch_size": size})
        batch, rows = segment(folder, settings.model_copy(update={"run": run}), guard=guard)
        assert_equal_rows(rows, wanted, batch)


@pytest.mark.parametrize("finish", ["device", "cpu"])
def test_all_work_on_an_image_is_within_its_guard_and_a_blamed_one_has_none(folder, members, finish, monkeypatch):
    guard, places = Careful(2), []
    for name in ("MasksOutput", "LogitsOutput"):
        kind = getattr(predictor_module, name)

        def add(self, windows, logits, add=kind.add):
            places.append((guard.under_way, windows[0].entries[0].position))
            return add(self, windows, logits)

        monkeypatch.setattr(kind, "add", add)
    batch, rows = segment(folder, make_settings(members[:1], finish), guard=guard)
    assert places and all(under_way == position for under_way, position in places)
    assert 2 not in guard.seen and 2 not in rows
    assert {entry.error.partition(":")[0] for entry in batch.entries if entry.error} == {"crashed", "corrupt"}


def test_every_window_is_reported_once(folder, members):
    reports = []
    settings = make_settings(members[:1], "device", tile={"size": 64}, batch_size=5)
    batch, _ = segment(folder, settings, report=lambda *words: reports.append(words))
    distinct = {entry.first_window: entry.num_windows for entry in batch.entries if entry.error is None}
    assert sum(windows for _, windows, _ in reports) == sum(distinct.values())
    assert reports[-1][0] == len(distinct) and all(seconds >= 0 for *_, seconds in reports)


def test_an_image_with_too_many_logits_for_the_device_is_finished_in_the_task(folder, members, monkeypatch):
    settings = make_settings(members, "device", tile={"size": 64}, label_maps=True)
    _, wanted = segment(folder, settings)
    limit = 5 * 4 * 2 * 32 * 32  # of five windows
    monkeypatch.setattr(predictor_module, "MOST_LOGIT_BYTES", limit)
    batch, rows = segment(folder, settings)
    good = [entry for entry in batch.entries if entry.error is None]
    assert {entry.num_windows > 5 for entry in good} == {True, False}
    assert all((entry.num_masks == 0) == (entry.num_windows > 5) for entry in good)
    assert batch.num_logits == sum(entry.num_windows for entry in good if entry.num_windows > 5)
    assert_equal_rows(rows, wanted, batch)


@pytest.mark.parametrize("finish", ["device", "cpu"])
def test_many_prompts_make_smaller_batches(folder, members, finish, monkeypatch):
    reports, prompts = [], [f"text {number}" for number in range(7)]
    monkeypatch.setattr(predictor_module, "MOST_LOGIT_BYTES", 3 * 7 * 4 * 32 * 32)
    settings = make_settings(members[:1], finish, batch_size=64)
    _, found = segment(folder, settings, prompts, report=lambda *words: reports.append(words))
    assert {windows for _, windows, _ in reports[:-1]} == {3}
    monkeypatch.undo()
    batch, wanted = segment(folder, settings, prompts)
    assert_equal_rows(found, wanted, batch)


def test_masks_travel_in_a_fraction_of_the_bytes_of_logits(tmp_path):
    model = vlsm.build_model("pixel", image_size=352)
    with torch.no_grad():
        model.network.weight.fill_(1)
    vlsm.save_checkpoint(model, tmp_path / "ck", prompt="x")
    (tmp_path / "in").mkdir()
    for number in range(4):
        save_square(tmp_path / "in" / f"{number}.png", size=(560 + number, 560))
    sizes = []
    for finish in ("device", "cpu"):
        batch, rows = segment(tmp_path / "in", make_settings([tmp_path / "ck"], finish))
        sizes.append(batch.pack().nbytes)
        assert len(rows) == 4
    assert sizes[0] < 4 * 6000 < 4 * 352 * 352 * 2 <= sizes[1]


def test_settings_that_need_probabilities_keep_the_logits(folder, members):
    batch, rows = segment(folder, make_settings(members, "device", clean={"keep_largest": 1}))
    assert not batch.masks and batch.num_logits
    batch, rows = segment(folder, make_settings(members, "device", probability_maps="all"))
    assert not batch.masks and all(row.probability_map for own in rows.values() for row in own)


def test_logits_of_calibrated_checkpoints_are_divided_on_the_device(folder, members):
    from vlsm.checkpoints import Calibration

    checkpoint = vlsm.load_checkpoint(members[1])
    image = np.random.default_rng(0).integers(0, 255, (1, 32, 32, 3), dtype=np.uint8)
    plain = vlsm.Segmenter(checkpoint, "cpu").predict_logits(image, [["x"]])[0]
    calibrated = checkpoint.settings.model_copy(update={"calibration": Calibration.model_construct(temperature=2.0)})
    segmenter = vlsm.Segmenter(replace(checkpoint, settings=calibrated), "cpu")
    logits, _ = segmenter.predict_tensor(segmenter.prepare(torch.from_numpy(image)), [["x"]])
    np.testing.assert_allclose(logits.numpy(), plain / 2, rtol=1e-5)
