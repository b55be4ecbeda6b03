"""Polygons and brush run lengths: the masks that they give back, for real masks and for the hardest ones."""

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.conftest import SHARED
from vlsm.images.brush_rle import decode_brush, encode_brush
from vlsm.images.polygons import drop_straight, fill_polygon, join_rings, trace_centers, trace_edges

DATA = SHARED / "data"


def real_masks():
    paths = (
        sorted((DATA / "kvasir_seg" / "masks").glob("*"))[:6] + sorted((DATA / "cvc_clinicdb" / "masks").glob("*"))[:6]
    )
    return [(np.asarray(Image.open(path).convert("L")) > 127).astype(np.uint8) for path in paths]


def hard_masks():
    """Small masks of noise: holes, islands of a pixel, corners that touch, the border; and an empty and a full one."""
    random = np.random.default_rng(7)
    for number in range(400):
        size = random.integers(1, 20, 2)
        mask = random.random(size) < (0.1, 0.4, 0.6, 0.9)[number % 4]
        if number % 3 == 0:
            mask = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 1) > 0.5
        yield mask.astype(np.uint8)
    yield from (np.zeros((5, 3), np.uint8), np.ones((1, 1), np.uint8), np.ones((7, 2), np.uint8))


def numbers(ring):
    return ring.ravel().astype(float).tolist()


def masks():
    return [*hard_masks(), *real_masks()]


def test_edges_give_the_mask_again_with_holes_and_as_one_ring():
    for mask in masks():
        filled, joined = np.zeros_like(mask), np.zeros_like(mask)
        for polygon in trace_edges(mask):
            filled |= fill_polygon([numbers(drop_straight(ring)) for ring in polygon], mask.shape)
            joined |= fill_polygon([numbers(drop_straight(join_rings(polygon)))], mask.shape)
        np.testing.assert_array_equal(filled, mask)
        np.testing.assert_array_equal(joined, mask)


def test_rings_along_edges_never_meet_themselves_and_have_the_area_of_the_pixels():
    for mask in hard_masks():
        area = 0
        for polygon in trace_edges(mask):
            for number, ring in enumerate(polygon):
                assert len({*map(tuple, ring.tolist())}) == len(ring)
                after = np.roll(ring, -1, axis=0)
                doubled = int((ring[:, 0] * after[:, 1] - after[:, 0] * ring[:, 1]).sum())
                assert doubled > 0 if number == 0 else doubled < 0
                area += doubled
        assert area == 2 * mask.sum()


def test_centers_give_the_mask_again_where_outlines_are_filled_too():
    for mask in masks():
        filled = np.zeros_like(mask)
        for polygon in trace_centers(mask):
            cv2.fillPoly(filled, [drop_straight(join_rings(polygon)).astype(np.int32)], 1)
        np.testing.assert_array_equal(filled, mask)


def test_a_hole_becomes_a_channel_to_the_left():
    mask = np.ones((5, 6), np.uint8)
    mask[2, 3] = 0
    (polygon,) = trace_edges(mask)
    assert [len(drop_straight(ring)) for ring in polygon] == [4, 4]
    ring = drop_straight(join_rings(polygon)).tolist()
    assert len(ring) == 10 and [3, 2] in ring and [0, 2] in ring
    assert {(x, y) for x, y in ring} == {(0, 0), (6, 0), (6, 5), (0, 5), (0, 2), (3, 2), (4, 2), (4, 3), (3, 3)}


def test_the_brush_gives_the_mask_again():
    for mask in masks():
        np.testing.assert_array_equal(decode_brush(encode_brush(mask), mask.shape), mask)


def pack(bits):
    return np.packbits(np.array([int(bit) for bit in bits], np.uint8)).tobytes()


def test_the_brush_reads_single_values_soft_edges_and_other_sizes_of_counts():
    header = f"{8:032b}00111" + f"{0:04b}{1:04b}{4:04b}{6:04b}"  # 2 pixels; counts of 1, 2, 5 and 7 bits
    single = "0" + "10" + f"{4:05b}" + "".join(f"{value:08b}" for value in (9, 9, 9, 128, 255))  # opacity of half
    run = "1" + "01" + f"{2:02b}" + f"{127:08b}"  # less than half
    np.testing.assert_array_equal(decode_brush(pack(header + single + run), (1, 2)), [[1, 0]])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "hold 0 pixels; the image has 2"),
        (encode_brush(np.ones((3, 4))), "hold 12 pixels; the image has 2"),
        (encode_brush(np.ones((1, 2)))[:8], "break off"),
        (encode_brush(np.ones((1, 2))) + bytes(200), "longer than its pixels"),
        (pack(f"{8:032b}01111" + "0" * 60), "values of 8 bits"),
        (pack(f"{8:032b}00111" + f"{15:04b}" * 4 + "100" + "1" * 60), "too many pixels"),
        (b"\xff" * 50, "hold 1,073,741,823 pixels"),
    ],
)
def test_a_damaged_brush_is_one_sentence(data, message):
    with pytest.raises(ValueError, match=message):
        decode_brush(data, (1, 2))
