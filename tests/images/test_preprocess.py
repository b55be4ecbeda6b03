import numpy as np
import pytest
from PIL import Image

from vlsm.images.preprocess import ImageSpec, Square


@pytest.mark.parametrize(("size", "content"), [((50, 100), (16, 48)), ((100, 50), (16, 48)), ((64, 64), (0, 64))])
def test_letterboxing_keeps_the_aspect_ratio_and_pads_with_black(size, content):
    square = Square(64, "letterbox")
    image = np.full((*size, 3), 200, np.uint8)
    resized = square.resize_image(image)
    assert resized.shape == (64, 64, 3) and resized.dtype == np.uint8
    if size[0] > size[1]:
        resized = resized.swapaxes(0, 1)
    start, stop = content
    assert (resized[start:stop] == 200).all()
    assert not resized[:start].any() and not resized[stop:].any()


@pytest.mark.parametrize("size", [(40, 120), (120, 40), (1, 300), (77, 31), (500, 333)])
@pytest.mark.parametrize("resize", ["squeeze", "letterbox"])
def test_logits_come_back_to_where_the_image_was(size, resize):
    """A region of the image is a region of the square, and the logits of that are the region again."""
    square = Square(96, resize)
    mask = np.zeros(size, np.uint8)
    mask[: max(1, size[0] // 2), : max(1, size[1] // 3)] = 1
    target = square.resize_mask(mask)
    assert target.shape == (96, 96) and set(np.unique(target)) <= {0, 1}
    logits = square.enlarge_logits(np.where(target, 5.0, -5.0), size)
    assert logits.shape == size and logits.dtype == np.float32
    assert np.mean((logits > 0) != mask) < 0.05


@pytest.mark.parametrize(
    "size", [(96, 96), (97, 560), (560, 97), (640, 511), (2000, 1500), (95, 96), (1, 300), (300, 1), (1, 70_000)]
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_logits_are_enlarged_as_pillow_enlarges_them_to_the_edges(size, dtype):
    logits = np.random.default_rng(0).normal(0, 20, (96, 96)).astype(dtype)
    expected = Image.fromarray(logits.astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR)
    enlarged = Square(96).enlarge_logits(logits, size)
    assert enlarged.dtype == np.float32 and enlarged.flags.f_contiguous
    np.testing.assert_allclose(enlarged, np.asarray(expected), rtol=0, atol=1e-4)


def test_logits_that_are_no_numbers_stay_so():
    logits = np.zeros((8, 8), np.float16)
    logits[0, 0], logits[0, 7] = np.nan, -60_000
    enlarged = Square(8).enlarge_logits(logits, (16, 16))
    assert np.isnan(enlarged[0, 0]) and enlarged[0, 15] == -60_000 == logits[0, 7]


def test_images_and_masks_are_resized_alike():
    mask = np.zeros((60, 200), np.uint8)
    mask[20:40, 50:150] = 1
    square = Square(64, "letterbox")
    image = square.resize_image(np.dstack([mask * 255] * 3))
    assert np.mean((image[..., 0] > 127) != square.resize_mask(mask)) < 0.02


def test_a_spec_has_its_square():
    assert ImageSpec(48, resize="letterbox").square == Square(48, "letterbox")
    assert ImageSpec(48).square == Square(48, "squeeze")
