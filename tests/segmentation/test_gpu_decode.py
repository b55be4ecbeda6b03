"""The setting decode=gpu, with torchcodec on the CPU: files travel, and become the pixels that the CPU would give."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from vlsm.config import SegmentSettings
from vlsm.errors import ConfigError, ImageError
from vlsm.images.gpu_jpegs import find_jpeg
from vlsm.images.preprocess import Square
from vlsm.images.stored import upright
from vlsm.segmentation import gpu_decode
from vlsm.segmentation.gpu_decode import check_gpu_decoding, decode_images, resize_on_device
from vlsm.segmentation.shard import Entry, ShardBatch, Unguarded, read_shard_images

SQUARES = [Square(24), Square(16, "letterbox")]


def draw(height=90, width=130, seed=0):
    """A smooth image: the resizers and decoders of several libraries agree on it."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return np.stack([255 * x, 255 * y, 255 * (0.5 + 0.5 * np.sin(6 * (x + y) + seed))], axis=2).astype(np.uint8)


def jpeg(image=None, mode="RGB", orientation=None, **options):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
        exif[0x010E] = "a" * 3000
    file = io.BytesIO()
    picture = Image.fromarray(draw() if image is None else image).convert(mode)
    picture.save(file, "JPEG", quality=95, exif=exif, comment=b"made for a test", **options)
    return file.getvalue()


def read(folder, files, decode, **settings):
    """The shard of files by name, and its pixels."""
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    tree = {"input": "", "output": "", "members": [{"checkpoint": "x"}], "decode": decode}
    checked = SegmentSettings.model_validate(tree | settings)
    rows = [{"image_uri": str(folder / name), "selector": None} for name in files]
    entries = [Entry(position, num_texts=1) for position in range(len(rows))]
    batch = read_shard_images(ShardBatch(0, False, entries), rows, SQUARES, checked, Unguarded())
    batch = ShardBatch.unpack(batch.pack())
    return batch, decode_images(batch, SQUARES, checked, Unguarded(), "cpu")


def compare(tmp_path, files, **settings):
    """Read files both ways; return the shards, after a comparison of all that must be equal."""
    plain, expected = read(tmp_path / "a", files, "cpu", **settings)
    batch, pixels = read(tmp_path / "a", files, "gpu", **settings)
    for entry, other in zip(batch.entries, plain.entries, strict=True):
        assert (entry.height, entry.width, entry.grey_rule) == (other.height, other.width, other.grey_rule)
        assert (entry.content_sha256, entry.num_windows) == (other.content_sha256, other.num_windows)
        for square in SQUARES if entry.error is None else ():
            ours, theirs = (
                array[one.first_window : one.first_window + one.num_windows].astype(int)
                for array, one in ((pixels[square], entry), (expected[square], other))
            )
            assert np.abs(ours - theirs).max() <= 2
    return batch, plain


def test_whole_jpegs_travel_as_files_and_all_else_as_pixels(tmp_path):
    pytest.importorskip("torchcodec")
    png = io.BytesIO()
    Image.fromarray(draw()).save(png, "PNG")
    files = {
        "rgb.jpg": jpeg(), "grey.jpg": jpeg(mode="L"), "progressive.jpg": jpeg(progressive=True),
        "png.jpg": png.getvalue(), "cmyk.jpg": jpeg(mode="CMYK"), "noend.jpg": jpeg(draw(seed=1))[:-2],
        "cut.jpg": jpeg()[:2000], "twin.jpg": jpeg(), "444.jpg": jpeg(subsampling=0),
        "keep_rgb.jpg": jpeg(keep_rgb=True), "none.jpg": b"\xff\xd8 no image",
    }  # fmt: skip
    batch, plain = compare(tmp_path, files)
    position = {name: number for number, name in enumerate(files)}
    starts = {image.row for image in batch.encoded}
    travelling = {name for name, number in position.items() if batch.entries[number].first_window in starts}
    failed = {name for name, number in position.items() if batch.entries[number].error}
    assert travelling - failed == {"rgb.jpg", "grey.jpg", "progressive.jpg", "444.jpg", "twin.jpg"}
    assert failed == {"cut.jpg", "none.jpg"} == {name for name in files if plain.entries[position[name]].error}
    assert batch.entries[0].first_window == batch.entries[position["twin.jpg"]].first_window
    assert not any(b"made for a test" in image.data for image in batch.encoded)


@pytest.mark.parametrize("orientation", range(9))
def test_images_are_turned_as_on_the_cpu_and_metadata_stays_behind(tmp_path, orientation):
    pytest.importorskip("torchcodec")
    batch, _ = compare(tmp_path, {"a.jpg": jpeg(orientation=orientation)}, tile={"size": 70, "overlap": 0})
    (image,) = batch.encoded
    assert (batch.entries[0].height, batch.entries[0].width) == ((130, 90) if orientation > 4 else (90, 130))
    assert image.num_windows == 4 and b"Exif" not in image.data and b"made for" not in image.data


@pytest.mark.parametrize("orientation", range(10))
def test_turns_are_those_of_arrays(orientation):
    torch = pytest.importorskip("torch")
    image = draw(5, 7)
    turned = gpu_decode._turn(torch.from_numpy(image), orientation).numpy()
    np.testing.assert_array_equal(turned, upright(image, orientation))


@pytest.mark.parametrize("size", [(90, 130), (9, 13), (300, 40), (1, 1)])
@pytest.mark.parametrize("square", SQUARES)
def test_a_device_resizes_as_the_cpu_does(size, square):
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    resized = resize_on_device(torch.from_numpy(image), square).numpy()
    assert np.abs(resized.astype(int) - square.resize_image(image)).max() <= 1


def test_one_file_that_the_decoder_refuses_costs_no_other(tmp_path, monkeypatch):
    """Its table of codes has more entries than there are codes; no header shows this, and the CPU says what it is."""
    pytest.importorskip("torchcodec")
    good, damaged = jpeg(), jpeg(draw(seed=2))
    start = damaged.index(b"\xff\xc4") + 5
    damaged = damaged[:start] + b"\xff" * 16 + damaged[start + 16 :]
    decode, seen = gpu_decode._decode_on_device, []

    def count(images, sizes, device):
        seen.append(len(images))
        return decode(images, sizes, device)

    monkeypatch.setattr(gpu_decode, "_decode_on_device", count)
    batch, pixels = read(tmp_path / "a", {"a.jpg": good, "b.jpg": damaged, "c.jpg": jpeg(draw(seed=3))}, "gpu")
    plain, expected = read(tmp_path / "a", {"a.jpg": good, "b.jpg": damaged, "c.jpg": jpeg(draw(seed=3))}, "cpu")
    assert [entry.error is None for entry in batch.entries] == [True, False, True]
    assert plain.entries[1].error.partition(":")[0] == batch.entries[1].error.partition(":")[0] == "corrupt"
    assert "b.jpg" in batch.entries[1].error
    for index in (0, 2):
        row, other = batch.entries[index].first_window, plain.entries[index].first_window
        assert np.abs(pixels[SQUARES[0]][row].astype(int) - expected[SQUARES[0]][other]).max() <= 2
    assert seen == [3, 1, 1, 1]


def test_sizes_are_checked_before_anything_travels_or_is_decoded(tmp_path, monkeypatch):
    pytest.importorskip("torchcodec")
    batch, plain = compare(tmp_path, {"a.jpg": jpeg()}, max_pixels=11_000)
    assert batch.entries[0].error == plain.entries[0].error and "too_large" in batch.entries[0].error
    assert not batch.encoded
    monkeypatch.setattr("vlsm.images.gpu_jpegs._MOST_PIXELS", 11_000)
    assert find_jpeg(jpeg(), "a", 1 << 30) is None  # the CPU decodes what takes too much memory of a GPU
    with pytest.raises(ImageError, match="too_large"):
        find_jpeg(jpeg(), "a", 100)


def test_a_header_that_lies_about_the_size_is_an_error_of_that_image(tmp_path):
    """The bytes of the actor's file are decoded again; the size must still be that of the plan."""
    pytest.importorskip("torchcodec")
    batch, _ = read(tmp_path / "a", {"a.jpg": jpeg(), "b.jpg": jpeg(draw(seed=4))}, "gpu")
    first = min(batch.encoded, key=lambda image: image.row)
    position = first.data.index(b"\xff\xc0") + 5
    lie = first.data[:position] + struct.pack(">HH", 40, 40) + first.data[position + 4 :]
    batch.encoded = [type(first)(**(vars(first) | {"data": lie})), *[i for i in batch.encoded if i is not first]]
    settings = SegmentSettings(input="", output="", members=[{"checkpoint": "x"}])
    decode_images(batch, SQUARES, settings, Unguarded(), "cpu")
    assert sorted((entry.error or "").partition(":")[0] for entry in batch.entries) == ["", "corrupt"]


def test_images_are_decoded_together_within_a_bound():
    images = [type("Image", (), {"row": row}) for row in range(5)]
    sizes = {0: (10, 10), 1: (10, 10), 2: (10, 10), 3: (30, 30), 4: (10, 10)}
    chunks = [[image.row for image in chunk] for chunk in gpu_decode._chunks(images, sizes, 250)]
    assert chunks == [[0, 1], [2], [3], [4]]


def test_without_gpus_the_setting_is_refused():
    with pytest.raises(ConfigError, match="decode is gpu, but the model actors have no GPU; set decode=cpu"):
        check_gpu_decoding(has_gpu=False)
