"""Masks made on the models' device are the masks that the writing tasks make from logits."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vlsm.config import SegmentSettings
from vlsm.images.preprocess import Square
from vlsm.images.windows import plan_windows
from vlsm.segmentation import device_masks
from vlsm.segmentation.device_masks import ImageLogits, finish_images, mirrored_mean
from vlsm.segmentation.finished import cpu_reason
from vlsm.segmentation.image_rows import describe_finished_image, describe_image
from vlsm.segmentation.masks import decode_mask, decode_png

SIZES = [(40, 30), (7, 5), (1, 1), (100, 3), (3, 90), (16, 16), (17, 15), (41, 29), (40, 30)]


def make_settings(weights=(1,), **options):
    members = [{"checkpoint": str(number), "weight": weight} for number, weight in enumerate(weights)]
    return SegmentSettings(input="", output="", members=members, **{"threshold": 0.5} | options)


def both(sizes, settings, num_texts=(1,), resize="squeeze", shift=0.0):
    """The rows of images of random logits: from the device, and from the writing task."""
    rng = np.random.default_rng(0)
    squares = [Square(16 + 8 * number, resize) for number, _ in enumerate(settings.members)]
    images, wanted = [], []
    for size in sizes:
        num_windows = len(plan_windows(size, settings.tile))
        shapes = [(num_windows, sum(num_texts), square.size, square.size) for square in squares]
        logits = [rng.normal(shift, 3, shape).astype(np.float32) for shape in shapes]
        images.append(ImageLogits(size, num_texts, [torch.from_numpy(values) for values in logits]))
        ends = np.cumsum(num_texts)[:-1]
        members = [np.split(values.swapaxes(0, 1), ends) for values in logits]
        wanted.append(list(describe_image(list(zip(*members, strict=True)), size, settings, squares)))
    masks = finish_images(images, settings, squares)
    rows = zip(masks, sizes, strict=True)
    return [describe_finished_image(own, size, settings) for own, size in rows], wanted


def assert_equal_rows(found, wanted, size):
    """Float noise may move a pixel on the threshold; random logits leave hardly any there."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        differing = (decode_mask(one.mask_rle, size) != decode_mask(other.mask_rle, size)).sum()
        assert differing <= 1e-3 * size[0] * size[1]
        assert one.confidence == pytest.approx(other.confidence, abs=1e-4)
        assert one.agreement == pytest.approx(other.agreement, abs=1e-3)
        assert one.review == other.review
        assert (one.label_map is None) == (other.label_map is None)
        if differing == 0:
            assert (one.mask_rle, one.area_px, one.bbox) == (other.mask_rle, other.area_px, other.bbox)
        if one.label_map is not None:
            assert (decode_png(one.label_map) != decode_png(other.label_map)).mean() <= 1e-3


@pytest.mark.parametrize("resize", ["squeeze", "letterbox"])
@pytest.mark.parametrize(
    ("weights", "num_texts", "options"),
    [
        ((1,), (1,), {"review": {"min_confidence": 0.8, "area_fraction": [0.3, 0.6]}}),
        ((1,), (2, 1), {"threshold": 0.3}),
        ((1, 2), (1, 3), {"member_rows": True, "label_maps": True}),
        ((1, 1, 1), (1,), {"combine": "vote", "member_rows": True}),
        ((1, 1), (1, 1), {"combine": "vote", "label_maps": True}),
        ((1, 2), (2, 1), {"tile": {"size": 32}, "member_rows": True, "label_maps": True}),
    ],
)
def test_rows_of_images_of_all_sizes_are_equal(weights, num_texts, options, resize):
    settings = make_settings(weights, **options)
    found, wanted = both(SIZES, settings, num_texts, resize)
    for rows, other_rows, size in zip(found, wanted, SIZES, strict=True):
        assert_equal_rows(rows, other_rows, size)


@pytest.mark.parametrize("most", [2000, 40])  # some columns at a time, and parts of a column
def test_large_images_are_made_in_areas_with_the_same_result(most, monkeypatch):
    settings = make_settings((1, 2), member_rows=True, label_maps=True, tile={"size": 48})
    sizes = [(60, 20), (50, 1), (8, 8), (1, 70)]
    whole, wanted = both(sizes, settings, (1, 1))
    monkeypatch.setattr(device_masks, "MOST_VALUES", most)
    in_parts, _ = both(sizes, settings, (1, 1))
    for rows, other_rows, third, size in zip(in_parts, whole, wanted, sizes, strict=True):
        assert_equal_rows(rows, third, size)
        assert [row.mask_rle for row in rows] == [row.mask_rle for row in other_rows]
        assert [row.label_map for row in rows] == [row.label_map for row in other_rows]


def test_no_array_is_larger_than_the_limit_however_large_the_image(monkeypatch):
    """A long image of one pixel across needs no weights of its whole length, and a group of images is bounded too."""
    settings, most = make_settings(), 4096
    monkeypatch.setattr(device_masks, "MOST_VALUES", most)
    largest, areas = [], []
    sigmoid = torch.sigmoid
    monkeypatch.setattr(torch, "sigmoid", lambda values: largest.append(values.numel()) or sigmoid(values))
    for size in [(20_000, 1), (1, 20_000), (200, 150)]:
        (rows,), (wanted,) = both([size], settings)
        assert_equal_rows(rows, wanted, size)
        areas.append(len(largest))
    both([(40, 30)] * 9, settings)
    assert max(largest) <= most and areas == [5, 10, 18]
    assert len(largest) == 18 + 3


@pytest.mark.parametrize("shift", [-50.0, 50.0])
def test_empty_and_full_masks(shift):
    settings = make_settings((1, 1), member_rows=True, label_maps=True)
    sizes = [(9, 4), (30, 31)]
    for rows, wanted, size in zip(*both(sizes, settings, (1,), shift=shift), sizes, strict=True):
        assert_equal_rows(rows, wanted, size)
        assert {row.area_px for row in rows} == {0 if shift < 0 else size[0] * size[1]}
        assert rows[0].agreement == 1.0


def test_more_than_255_prompts_have_a_label_map_of_16_bits():
    found, wanted = both([(6, 5)], make_settings(label_maps=True), (1,) * 300, shift=-2)
    assert_equal_rows(found[0], wanted[0], (6, 5))
    assert np.asarray(Image.open(io.BytesIO(found[0][-1].label_map))).max() > 255


def test_images_of_alike_sizes_are_made_together():
    """One call for the whole batch, since starting the kernels of each image would take longer than its pixels."""
    settings, calls = make_settings(), []
    probability = device_masks._Group._probability
    spy = SimpleNamespace(call=lambda *words: calls.append(1) or probability(*words))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_masks._Group, "_probability", lambda *words: spy.call(*words))
        both([(40 + number % 3, 50 - number % 2) for number in range(24)], settings)
        assert len(calls) == 1
        both([(1, 1), (400, 300), (2, 1)], settings)
    assert len(calls) == 3


def test_the_mean_with_the_mirror_image_is_that_of_probabilities():
    one, mirrored = torch.randn(2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 3
    found = torch.sigmoid(mirrored_mean(one, mirrored))
    wanted = (torch.sigmoid(one) + torch.sigmoid(mirrored.flip(-1))) / 2
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    extremes = mirrored_mean(torch.full((1, 2, 2), 900.0), torch.full((1, 2, 2), -900.0))
    assert torch.isfinite(extremes).all()
    assert torch.sigmoid(mirrored_mean(torch.tensor([[20.0]]), torch.tensor([[20.0]]))).item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "on_gpu", "reason"),
    [
        ({}, True, None),
        ({}, False, "the models run on CPUs"),
        ({"run": {"finish": "device"}}, False, None),
        ({"run": {"finish": "cpu"}}, True, "run.finish is cpu"),
        ({"clean": {"fill_holes": True}}, True, "masks are cleaned (settings clean.)"),
        ({"probability_maps": "review"}, True, "probability_maps is review"),
        ({"run": {"placement": "apart"}}, True, "run.placement is apart"),
        ({"label_maps": True, "tile": {"size": 32}, "combine": "vote"}, True, None),
    ],
)
def test_one_rule_says_where_masks_are_made(options, on_gpu, reason):
    assert cpu_reason(make_settings((1, 1), **options), on_gpu) == reason
