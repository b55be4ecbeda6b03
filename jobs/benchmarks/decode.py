"""Compare decoding and resizing in this package with other libraries, from file bytes to model input, on one core."""

import functools
import importlib.util
import io
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from jobs.benchmarks.figures import alternate, write_json
from jobs.phantoms import draw_phantom
from vlsm.images.decode import decode_image
from vlsm.images.preprocess import Square

SIZES = (224, 352)
OURS = "vlsm"
_FORMATS = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",)}
_PACKAGES = {"Pillow": "pillow", "OpenCV": "opencv-python-headless", "torchvision": "torchvision"}

Way = Callable[[bytes, int], np.ndarray]  # (file bytes, S) -> image (S, S, 3) uint8


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `python -m jobs.benchmark decode`."""
    parser.add_argument(
        "--folder", action="append", metavar="DIR", help="JPEGs and PNGs, recursive; may be repeated (drawn images)"
    )
    parser.add_argument("--images", type=int, default=60, metavar="N", help="images per format (60)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="interleaved rounds; the median counts (5)")


def measure(args: Namespace) -> int:
    """Measure images per second on one core, from file bytes to the model input (S, S, 3), in several libraries.

    It also compares the pixels with those of Pillow: largest and mean absolute difference, on a scale of 0 to 255.
    """
    torch.set_num_threads(1)
    Image.MAX_IMAGE_PIXELS = None  # decode_image checks its limit itself
    with tempfile.TemporaryDirectory() as drawn:
        folders = [Path(folder) for folder in args.folder or [_draw(Path(drawn), args.images)]]
        files = {name: _read(folders, suffixes, args.images) for name, suffixes in _FORMATS.items()}
    ways, left_out = _ways()
    for name in left_out:
        print(f"left out: {name} is not installed")
    print(f"{'format':6} {'size':>4} {'way':22} {'images/s':>9} {'to Pillow':>10} {'largest':>8} {'mean':>7}")
    rows = []
    for name, data in files.items():
        for size in SIZES if data else ():
            rows += _compare(name, data, size, ways, args.repeats)
    described = {
        name: {"images": len(data), "megapixels": round(float(np.mean([_num_pixels(file) for file in data])) / 1e6, 3)}
        for name, data in files.items()
        if data
    }
    versions = {way: version(package) for way, package in _PACKAGES.items() if way not in left_out}
    setup = {"files": described, "drawn": not args.folder, "repeats": args.repeats, "versions": versions}
    write_json(args.json, "decode", setup | {"left_out": left_out, "runs": rows})
    return 0


def tell(figures: dict[str, Any]) -> list[str]:
    """Return the measured figures as lines of Markdown for the documentation."""
    drawn = "drawn " if figures["drawn"] else ""
    files = " and ".join(
        f"{sample['images']} {drawn}{name}s of {sample['megapixels']:.2f} megapixels"
        for name, sample in figures["files"].items()
    )
    columns = list(dict.fromkeys((row["format"], row["size"]) for row in figures["runs"]))
    lines = [
        f"Images per second and core, from {files} on average to the model's square, and how many times Pillow's that "
        f"is; medians of {figures['repeats']}. Differences are levels of 255 from what Pillow gives, over all images.",
        "",
        f"| | {' | '.join(f'{name} to {size}' for name, size in columns)} | largest difference | mean |",
        f"|---{'|---' * (len(columns) + 2)}|",
    ]
    for way in dict.fromkeys(row["way"] for row in figures["runs"]):
        way_rows = {(row["format"], row["size"]): row for row in figures["runs"] if row["way"] == way}
        cells = [
            f"{way_rows[key]['images_per_s']:,.0f} ({way_rows[key]['to_pillow']:.2f}x)" if key in way_rows else ""
            for key in columns
        ]
        largest = max(row["largest_difference"] for row in way_rows.values())
        mean = np.mean([row["mean_difference"] for row in way_rows.values()])
        lines.append(f"| {way} | {' | '.join(cells)} | {largest} | {mean:.2f} |")
    return [
        *lines,
        "",
        "`vlsm` is simplejpeg, with Pillow for what it does not read, and fast_image_resize. torchvision would bring "
        "torch into every process that decodes (270 MB, and seconds to start), and its decoders are deprecated.",
    ]


def _compare(name: str, data: list[bytes], size: int, ways: dict[str, Way], repeats: int) -> list[dict[str, Any]]:
    ways = {way: call for way, call in ways.items() if name == "JPEG" or "draft" not in way}
    expected = [_pillow(file, size).astype(np.int16) for file in data]
    seconds = alternate(repeats, *(functools.partial(_do_all, call, data, size) for call in ways.values()))
    pillow_s = seconds[list(ways).index("Pillow")]
    rows = []
    for (way, call), way_s in zip(ways.items(), seconds, strict=True):
        differences = [np.abs(call(file, size) - other) for file, other in zip(data, expected, strict=True)]
        row: dict[str, Any] = {
            "format": name,
            "size": size,
            "way": way,
            "images_per_s": round(len(data) / way_s, 1),
            "to_pillow": round(pillow_s / way_s, 3),
            "largest_difference": int(max(difference.max() for difference in differences)),
            "mean_difference": round(float(np.mean([difference.mean() for difference in differences])), 4),
        }
        print("{format:6} {size:4} {way:22} {images_per_s:9,.0f} {to_pillow:9.2f}x".format(**row), end=" ")
        print("{largest_difference:8} {mean_difference:7.3f}".format(**row), flush=True)
        rows.append(row)
    return rows


def _do_all(call: Way, data: list[bytes], size: int) -> None:
    for file in data:
        call(file, size)


def _ways() -> tuple[dict[str, Way], list[str]]:
    """Return the ways by name, and the names of the libraries that are not installed."""
    ways: dict[str, Way] = {OURS: _ours, "Pillow": _pillow, "Pillow, draft mode": _pillow_draft}
    ways["simplejpeg and Pillow"] = lambda data, size: _shrink(decode_image(data, ""), size)
    ways["torchvision"] = _torchvision
    if importlib.util.find_spec("cv2") is None:
        return ways, ["OpenCV"]
    import cv2

    cv2.setNumThreads(1)
    for how, flag in (("area", cv2.INTER_AREA), ("linear", cv2.INTER_LINEAR)):
        ways[f"OpenCV, {how}"] = functools.partial(_opencv, flag=flag)
    return ways, []


def _ours(data: bytes, size: int) -> np.ndarray:
    return Square(size).resize_image(decode_image(data, ""))


def _shrink(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def _pillow(data: bytes, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def _pillow_draft(data: bytes, size: int) -> np.ndarray:
    """Resize a JPEG that Pillow decodes at 1/2, 1/4 or 1/8 of its size, if that is still at least `size`."""
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (size, size))
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def _torchvision(data: bytes, size: int) -> np.ndarray:
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2.functional import resize

    image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    return np.ascontiguousarray(resize(image, [size, size], antialias=True).permute(1, 2, 0).numpy())


def _opencv(data: bytes, size: int, flag: int) -> np.ndarray:
    import cv2

    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return np.asarray(cv2.resize(image, (size, size), interpolation=flag))


def _num_pixels(data: bytes) -> int:
    with Image.open(io.BytesIO(data)) as image:
        return image.width * image.height


def _read(folders: list[Path], suffixes: tuple[str, ...], count: int) -> list[bytes]:
    """Return up to `count` files of one format, evenly spaced over the sorted paths."""
    paths = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    count = min(count, len(paths))
    return [paths[len(paths) * number // count].read_bytes() for number in range(count)]


def _draw(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    for number in range(count):
        image = Image.fromarray(draw_phantom(rng, (400, 720))[0])
        image.save(folder / f"{number}.jpg", quality=92)
        image.save(folder / f"{number}.png")
    return folder
