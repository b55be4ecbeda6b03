"""The test files of pydicom, nibabel and Pillow go through the job as one archive.

Every image is a row. The rows that fail are known, with the reason. The pictures are compared with what other readers
make of the files; `tests/images/test_dicom_corpus.py` compares those of pydicom.
"""

import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom.data
import pytest
import tifffile
from PIL import Image, ImageOps

from jobs import segment
from vlsm.config import SegmentSettings
from vlsm.images.formats import kind_of
from vlsm.images.reader import Reader
from vlsm.runs.results import read_masks
from vlsm.runs.verify import verify_run

pytestmark = [pytest.mark.ray, pytest.mark.nightly, pytest.mark.filterwarnings("ignore")]

# The images that fail, by the folder and the start of the file's name: damaged, made to be hostile, or not supported.
FAILED = {
    "nibabel/": {
        "analyze.hdr": "missing",  # the wheel has the headers alone
        "nifti1.hdr": "missing",
        "nifti2.hdr": "missing",
    },
    "pillow/": {
        # made to crash a decoder
        "crash-": "corrupt",
        "oom-": "corrupt",
        "timeout-": "corrupt",
        "decompression_bomb": "too_large",
        "libtiff_segfault.tif": "unreadable",
        "seek_too_large.tif": "corrupt",
        "tiff_overflow_rows_per_strip.tif": "corrupt",
        # damaged: Pillow reads none of these either
        "apng/syntax_num_frames_zero.png": "corrupt",
        "broken": "corrupt",
        "expected_to_read.jp2": "corrupt",
        "invalid_header_length.jp2": "corrupt",
        "l2rgb_read.bmp": "too_large",
        "not_enough_data.jp2": "corrupt",
        "truncated_": "corrupt",
        "ultrahdr.jpg": "corrupt",
        "unbound_variable.jp2": "corrupt",
        "unknown_mode.j2k": "corrupt",
        "zero_": "corrupt",
        "bmp/b/": "corrupt",
        "bmp/b/badwidth.bmp": "too_large",
        "bmp/b/reallybig.bmp": "too_large",
        # of a kind that Pillow does not read
        "00r": "corrupt",
        "balloon_eciRGBv2_aware.jp2": "corrupt",
        "bmp/g/rgb32bf.bmp": "corrupt",
        "bmp/q/": "corrupt",
    },
    "pydicom/test_files/": {
        "JPEG2000-embedded-sequence-delimiter.dcm": "corrupt",  # the delimiter stands in the size: no decoder reads it
        "MR_truncated.dcm": "corrupt",
        "meta_missing_tsyntax.dcm": "corrupt",  # made to test parsers: pixels without a description
        "nested_priv_SQ.dcm": "corrupt",
    },
}
# What differs from Pillow's picture, with the reason.
DIFFERENT = {
    "8bit.s.tif",  # signed: Pillow takes -1 for 255
    "crash-74d2a78403a5a59db1fb0a2b8735ac068a75f6e3.tif",  # damaged fax lines: each decoder guesses
    # pixels that are nearly transparent: Pillow rounds alpha to 8 bits before it divides
    "tiff_16bit_RGBa.tiff",
    "tiff_strip_planar_16bit_RGBa.tiff",
    "tiff_tiled_planar_16bit_RGBa.tiff",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder for each project that could be had."""
    folder = tmp_path_factory.mktemp("corpus")
    shutil.copytree(Path(nib.__file__).parent / "tests" / "data", folder / "nibabel")
    shutil.copytree(Path(pydicom.data.__file__).parent, folder / "pydicom", ignore=shutil.ignore_patterns("*.py*"))
    name = "pillow==11.3.0"  # the files are the same for every version
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", name]
    got = subprocess.run([*download, "--no-build-isolation", "-d", folder], capture_output=True, timeout=300)
    for path in folder.glob("*.tar.gz"):
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
        shutil.move(next(folder.glob("pillow-*/Tests/images")), folder / "pillow")
        shutil.rmtree(next(folder.glob("pillow-*[0-9]")))
        path.unlink()
    if got.returncode:
        print("without Pillow's files:", got.stderr.decode()[-200:])
    return folder


def expected_reason(name):
    """The reason for which a file may fail, or None; the longest beginning of its name counts."""
    for project, reasons in FAILED.items():
        if name.startswith(project):
            starts = [start for start in reasons if name[len(project) :].startswith(start)]
            return reasons[max(starts, key=len)] if starts else None
    return None


@pytest.fixture(scope="module")
def rows(corpus, ray_cluster, tiny_checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    words = ["--checkpoint", tiny_checkpoint, "--set", "run.max_failed_fraction=1", "--set", "prompts=[polyp]"]
    assert segment.main([str(corpus), str(output), *map(str, words)]) == 0
    assert not list(verify_run(str(output)))[-1].differences
    return list(read_masks(str(output)))


def name_of(row, corpus):
    return str(Path(row["image_uri"]).relative_to(corpus))


def test_every_image_is_a_row_and_the_failed_ones_are_known(rows, corpus):
    unexpected = {
        row["image_id"]: row["error"]
        for row in rows
        if row["status"] == "failed" and not row["error"].startswith(f"{expected_reason(name_of(row, corpus))}: ")
    }
    assert unexpected == {}
    assert all("object at 0x" not in (row["error"] or "") for row in rows)
    counts = Counter((name_of(row, corpus).split("/")[0], row["status"]) for row in rows)
    assert counts["nibabel", "ok"] > 250
    assert counts["pydicom", "ok"] > 70


def shown(row):
    settings = SegmentSettings(input="", output="", members=[{"checkpoint": "x"}])
    content, frame = Reader(settings).open(row)
    return content.decode(frame).pixels


def is_in_order(ours, values):
    """Whether grey levels rise, or fall, with the stored values: only the scale between the two is a choice."""
    order = np.argsort(values.ravel(), kind="stable")[: np.isfinite(values).sum()]  # NaN is last
    steps = np.diff(ours.ravel()[order].astype(int))
    return (steps >= 0).all() or (steps <= 0).all()


def test_slices_are_those_of_nibabel(rows, corpus):
    num_compared = 0
    for row in rows:
        name = name_of(row, corpus)
        if row["status"] != "ok" or not name.startswith("nibabel/") or kind_of(name) != "nifti":
            continue
        image = nib.load(row["image_uri"])
        if isinstance(image, nib.Cifti2Image):  # a matrix in a NIfTI file
            image = nib.Nifti2Image.from_filename(row["image_uri"])
        image = nib.as_closest_canonical(image)
        values = np.asarray(image.dataobj)
        parts = dict(part.split("=") for part in row["selector"].split(","))
        values = values[..., int(parts["slice"])] if values.ndim == 3 else values[:, :, int(parts["slice"])]
        values = values.reshape(*values.shape[:2], -1, order="F")[..., int(parts.get("volume", 0))]
        assert is_in_order(shown(row)[..., 0], values.T[::-1, ::-1].astype(float)), row["image_id"]
        num_compared += 1
    assert num_compared > 250


def test_pictures_are_those_of_pillow_and_tifffile(rows, corpus):
    if not (corpus / "pillow").exists():
        pytest.skip("Pillow's source distribution could not be had")
    different, num_compared = set(), 0
    for row in rows:
        name = name_of(row, corpus)
        if row["status"] != "ok" or not name.startswith("pillow/") or row["selector"] or kind_of(name) == "dicom":
            continue
        try:
            with Image.open(row["image_uri"]) as image:
                is_deep = image.mode.startswith(("I", "F"))
                theirs = np.asarray(image if is_deep else ImageOps.exif_transpose(image).convert("RGB"))
        except Exception:  # ours reads more
            continue
        if is_deep and kind_of(name) == "tiff":
            theirs = tifffile.imread(row["image_uri"], key=0)
        ours = shown(row)
        is_same = is_in_order(ours[..., 0], theirs) if is_deep else np.abs(ours.astype(int) - theirs).max() <= 2
        different |= set() if is_same else {name.removeprefix("pillow/")}
        num_compared += 1
    assert num_compared > 400
    assert different == DIFFERENT
