"""What a run says of one image: masks of one model and of several, label maps, windows, cleaning."""

import io
import itertools
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from vlsm.config import CleanSettings, SegmentSettings, TileSettings
from vlsm.images.preprocess import Square
from vlsm.images.windows import count_windows, plan_windows
from vlsm.segmentation.cleaning import clean_mask
from vlsm.segmentation.image_rows import describe_image
from vlsm.segmentation.masks import decode_mask, decode_probability
from vlsm.segmentation.results import segmentation_of
from vlsm.segmentation.tiles import probability_map


def make_settings(weights=(1,), **options):
    members = [{"checkpoint": str(number), "weight": weight} for number, weight in enumerate(weights)]
    return SegmentSettings(input="", output="", members=members, **{"threshold": 0.5} | options)


def describe(members, size, settings):
    """The rows of an image with one prompt and one window; a member's logits are (texts, S, S)."""
    squares = [Square(logits.shape[-1]) for logits in members]
    return list(describe_image([[logits[:, None] for logits in members]], size, settings, squares))


def members(rng, size=16):
    """Three members with squares of their own, of which the first gives two texts."""
    return [rng.normal(0, 2, (texts, side, side)) for texts, side in ((2, size), (1, size), (1, 2 * size))]


def probabilities(logits, size):
    return np.mean(
        [1 / (1 + np.exp(-Square(len(one)).enlarge_logits(one, size).astype(np.float64))) for one in logits], axis=0
    )


def differing(found, mask):
    """The share of pixels; where a probability lies on the threshold, float noise decides."""
    return (found != mask).mean()


def test_the_record_of_a_mask_is_what_pycocotools_reads():
    logits = np.full((1, 16, 16), -3.0)
    logits[0, 4:8, 2:14] = 2
    (record,) = describe([logits], (32, 48), make_settings())
    mask = segmentation_of(logits, np.zeros((32, 48, 3), np.uint8), "x", 0.5, Square(len(logits[0]))).mask
    theirs = coco.decode({"size": [32, 48], "counts": record.mask_rle})
    np.testing.assert_array_equal(mask, theirs)
    rows, columns = np.nonzero(mask)
    assert record.area_px == mask.sum()
    assert record.area_fraction == pytest.approx(mask.mean())
    assert record.bbox == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    assert record.confidence == pytest.approx(probabilities(logits, (32, 48))[mask == 1].mean(), abs=1e-6)
    assert record.agreement is None
    assert record.max_probability == pytest.approx(probabilities(logits, (32, 48)).max(), abs=1e-6)


def test_an_empty_mask_has_no_box_and_no_confidence():
    (record,) = describe([np.full((1, 8, 8), -4.0)], (10, 12), make_settings())
    assert (0, 0.0, None, None) == (record.area_px, record.area_fraction, record.bbox, record.confidence)
    assert not decode_mask(record.mask_rle, (10, 12)).any()
    assert record.max_probability == pytest.approx(1 / (1 + np.exp(4)))
    assert (
        record.max_probability < describe([np.full((1, 8, 8), 20.0)], (10, 12), make_settings())[0].max_probability < 1
    )


def test_members_are_joined_by_the_weighted_mean_at_the_images_size():
    all_logits, size = members(np.random.default_rng(0)), (30, 50)
    found, *rows = describe(all_logits, size, make_settings([1, 2, 1], threshold=0.6, member_rows=True))
    own = [probabilities(logits, size) for logits in all_logits]
    mean = (own[0] + 2 * own[1] + own[2]) / 4
    assert differing(decode_mask(found.mask_rle, size), mean >= 0.6) < 0.001
    assert found.confidence == pytest.approx(mean[mean >= 0.6].mean(), abs=1e-3)
    assert found.max_probability == pytest.approx(mean.max(), abs=1e-3)
    masks = [one >= 0.6 for one in own]
    dices = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in itertools.combinations(masks, 2)]
    assert found.agreement == pytest.approx(np.mean(dices), abs=1e-3)
    assert len(rows) == 3
    for row, mask in zip(rows, masks, strict=True):
        assert differing(decode_mask(row.mask_rle, size), mask) < 0.001
        assert row.agreement is None
    highest = [one.max() for one in own]
    assert [row.max_probability for row in rows] == pytest.approx(highest, abs=1e-3)


@pytest.mark.parametrize(("weights", "least"), [([1, 1, 1], 2), ([0.1, 0.1, 0.2], 3), ([3, 1, 1], 1)])
def test_a_vote_takes_more_than_half_of_the_weights(weights, least):
    all_logits, size = members(np.random.default_rng(1)), (30, 50)
    (found,) = describe(all_logits, size, make_settings(weights, combine="vote"))
    votes = [probabilities(logits, size) >= 0.5 for logits in all_logits]
    wanted = {2: sum(votes) >= 2, 3: votes[2] & (votes[0] | votes[1]), 1: votes[0]}[least]
    assert differing(decode_mask(found.mask_rle, size), wanted) < 0.001


def test_empty_masks_agree():
    logits = np.random.default_rng(2).normal(0, 2, (1, 16, 16))
    (empty,) = describe([logits - 100, logits - 100], (20, 20), make_settings([1, 1]))
    assert (empty.area_px, empty.agreement, empty.confidence) == (0, 1.0, None)


@pytest.mark.parametrize("weights", [(1,), (1, 2)])
def test_a_label_map_gives_each_pixel_to_the_most_probable_of_the_masks(weights):
    size, rng = (20, 30), np.random.default_rng(3)
    prompts = [[rng.normal(0, 2, (1, 1, 16, 16)) for _ in weights] for _ in range(3)]
    *masks, found = describe_image(prompts, size, make_settings(weights, label_maps=True), [Square(16)] * len(weights))
    assert len(masks) == 3
    means = [np.average([probabilities(own[0], size) for own in one], axis=0, weights=weights) for one in prompts]
    wanted = np.where(np.max(means, axis=0) >= 0.5, np.argmax(means, axis=0) + 1, 0)
    labels = np.asarray(Image.open(io.BytesIO(found.label_map)))
    assert differing(labels, wanted) < 0.002
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    np.testing.assert_array_equal(decode_mask(found.mask_rle, size), labels > 0)
    assert found.confidence == pytest.approx(np.max(means, axis=0)[labels > 0].mean(), abs=1e-3)


@pytest.mark.parametrize(
    ("weights", "num_texts", "size", "options"),
    [
        ((1,), 1, (40, 30), {}),
        ((1,), 1, (7, 5), {}),  # smaller than the square
        ((1,), 2, (40, 30), {}),
        ((1, 3), 1, (40, 30), {"member_rows": True}),
        ((1, 3), 2, (40, 30), {"label_maps": True, "clean": {"keep_largest": 1}}),
        ((1, 1, 1), 1, (40, 30), {"combine": "vote"}),
        ((1,), 1, (40, 90), {"tile": {"size": 32}}),
        ((1, 2), 2, (70, 50), {"tile": {"size": 32}, "member_rows": True}),
    ],
)
@pytest.mark.parametrize("resize", ["squeeze", "letterbox"])
def test_a_map_at_the_threshold_is_the_mask_before_cleaning(weights, num_texts, size, options, resize):
    settings = make_settings(weights, threshold=0.37, probability_maps="all", **options)
    windows, rng = plan_windows(size, settings.tile), np.random.default_rng(5)
    logits = [rng.normal(0, 2, (num_texts, len(windows), 16, 16)).astype(np.float16) for _ in weights]
    squares = [Square(16, resize)] * len(weights)
    rows = list(describe_image([logits], size, settings, squares))
    plain = list(describe_image([logits], size, settings.model_copy(update={"probability_maps": "none"}), squares))
    assert plain == [replace(row, probability_map=None) for row in rows]
    uncleaned = list(describe_image([logits], size, settings.model_copy(update={"clean": CleanSettings()}), squares))
    maps = [decode_probability(row.probability_map) for row in rows if row.label_map is None]
    assert len(maps) == 1 + (len(weights) if settings.has_member_rows else 0)
    for row, probability in zip(uncleaned, maps, strict=False):
        assert probability.shape == size and probability.dtype == np.float32
        certain = np.abs(probability - 0.37) > 0.5001 / 255
        assert certain.mean() > 0.95
        if settings.combine == "mean":
            np.testing.assert_array_equal((probability > 0.37)[certain], decode_mask(row.mask_rle, size)[certain] == 1)
    # the mean of texts and members, computed in another way
    members = [np.mean([probability_map(text, windows, size, squares[0]) for text in one], axis=0) for one in logits]
    for probability, wanted in zip(maps, [np.average(members, axis=0, weights=weights), *members], strict=False):
        np.testing.assert_allclose(probability, wanted, atol=0.5001 / 255)


def test_maps_are_kept_of_the_masks_that_the_setting_names():
    rng = np.random.default_rng(6)
    sure, unsure = rng.choice([-9.0, 9.0], (1, 1, 16, 16)), rng.normal(0, 0.1, (1, 1, 16, 16))
    prompts = [[sure, sure], [unsure, unsure], [sure - 99, sure - 99]]

    def kept(**options):
        settings = make_settings([1, 1], review={"min_confidence": 0.8}, member_rows=True, **options)
        rows = describe_image(prompts, (20, 30), settings, [Square(16)] * 2)
        return "".join("-" if row.probability_map is None else "x" for row in rows)

    # for each prompt the mask and those of two members; then the label map
    assert kept() == "---------"
    assert kept(probability_maps="review") == "---x-----"
    assert kept(probability_maps="all") == "xxxxxxxxx"
    assert kept(probability_maps="all", label_maps=True) == "xxxxxxxxx-"


@pytest.mark.parametrize("size", [(100, 100), (64, 200), (333, 64), (10, 12), (65, 129)])
def test_windows_cover_an_image_with_the_overlap_that_was_asked_for(size):
    windows = plan_windows(size, TileSettings(size=64))
    assert len(windows) == count_windows(size, 64, 0.25)
    count = np.zeros(size)
    for window in windows:
        assert (window.height, window.width) == (min(size[0], 64), min(size[1], 64))
        window.cut(count)[:] += 1
    assert count.min() == 1
    for starts, length in ((sorted({w.top for w in windows}), size[0]), (sorted({w.left for w in windows}), size[1])):
        assert starts[0] == 0 and starts[-1] == max(0, length - 64)
        assert all(one - other <= 48 for other, one in itertools.pairwise(starts))
    assert plan_windows(size, TileSettings()) == plan_windows(size, TileSettings(size=1000))


def test_windows_are_joined_without_a_seam():
    size = 150, 200
    ys, xs = np.mgrid[: size[0], : size[1]]
    truth = np.sin(ys / 30) * 3 + np.cos(xs / 25) * 2
    windows = plan_windows(size, TileSettings(size=64, overlap=0.5))
    joined = probability_map(np.stack([window.cut(truth) for window in windows]), windows, size, Square(64))
    np.testing.assert_allclose(joined, 1 / (1 + np.exp(-truth)), atol=1e-5)
    # where two windows tell different things, the probability changes from one to the other and does not jump
    halves = plan_windows((64, 112), TileSettings(size=64))
    joined = probability_map(np.stack([np.full((8, 8), -4.0), np.full((8, 8), 4.0)]), halves, (64, 112), Square(8))
    assert joined[32, 0] < 0.02 and joined[32, -1] > 0.98
    assert 0 < np.diff(joined[32]).max() < 0.3


def test_an_image_of_one_window_is_done_as_without_windows():
    logits = np.random.default_rng(4).normal(0, 2, (1, 16, 16))
    tiled = make_settings(tile={"size": 64})
    assert describe([logits], (64, 50), tiled) == describe([logits], (64, 50), make_settings())


def test_masks_are_cleaned_before_they_are_described():
    mask = np.zeros((12, 20), bool)
    mask[1:6, 1:6] = True
    mask[3, 3] = False  # a hole
    mask[8:10, 8:12] = True
    mask[11, 19] = True

    def areas(**options):
        cleaned = clean_mask(np.asfortranarray(mask), CleanSettings(**options))
        assert cleaned.flags.f_contiguous and cleaned.dtype == bool
        return [int(cleaned[:7, :7].sum()), int(cleaned[8:10, 8:12].sum()), int(cleaned[11, 19])]

    assert areas() == [24, 8, 1]
    assert areas(fill_holes=True) == [25, 8, 1]
    assert areas(min_area_px=2) == [24, 8, 0]
    assert areas(keep_largest=1) == [24, 0, 0]
    assert areas(keep_largest=2, min_area_px=10) == [24, 0, 0]
    logits = np.where(mask, 5.0, -5.0)[None]
    (record,) = describe([logits], mask.shape, make_settings(clean={"keep_largest": 1, "fill_holes": True}))
    assert (record.area_px, record.bbox) == (25, [1, 1, 5, 5])
    pair = describe([logits, logits], mask.shape, make_settings([1, 1], clean={"keep_largest": 1}, member_rows=True))
    assert [row.area_px for row in pair] == [24, 24, 24]
