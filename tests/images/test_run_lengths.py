"""COCO run lengths: the same as pycocotools' for every mask, and an error for everything else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco

from vlsm.images.run_lengths import check_run_lengths, decode_run_lengths, unpack_run_lengths

masks = arrays.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.integers(0, 1))


def pack(mask):
    return coco.encode(np.asfortranarray(mask))["counts"].decode()


@settings(max_examples=200, deadline=None)
@given(mask=masks)
def test_masks_come_back(mask):
    text = pack(mask)
    np.testing.assert_array_equal(decode_run_lengths(text, mask.shape), mask)
    runs = unpack_run_lengths(text)
    np.testing.assert_array_equal(np.repeat(np.arange(len(runs)) % 2, runs).reshape(mask.shape[::-1]).T, mask)


def test_long_runs_and_noise_come_back():
    noise = np.random.default_rng(0).integers(0, 2, (700, 900), np.uint8)
    noise[:, 100:800] = 0
    np.testing.assert_array_equal(decode_run_lengths(pack(noise), noise.shape), noise)


@settings(max_examples=500, deadline=None)
@given(text=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=12))
def test_any_other_text_is_an_error(text):
    try:
        mask = decode_run_lengths(text, (4, 5))
    except ValueError:
        return
    runs = unpack_run_lengths(text)
    assert runs.sum() == 20 and runs.min() >= 0 and mask.shape == (4, 5)


@pytest.mark.parametrize("text", ["PP", "P", "d", "d0P", "~~~", "", "1", "é0", "d00" + "o" * 9, "o" * 30 + "0", "J0n0"])
def test_damaged_run_lengths_never_reach_pycocotools(text):
    with pytest.raises(ValueError, match="the run lengths"):
        check_run_lengths(text, (4, 5))
