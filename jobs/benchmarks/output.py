"""Masks on disk: the run lengths in Parquet that the segment job writes, against PNG files and bitmaps."""

import functools
import hashlib
import shutil
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.benchmarks.figures import alternate, write_json
from jobs.phantoms import KINDS, write_labelled
from vlsm.images.decode import EXTENSIONS, decode_mask_file
from vlsm.images.preprocess import Square
from vlsm.runs.results import read_masks, write_part
from vlsm.segmentation.masks import describe_mask, encode_mask

SIDE = 352  # masks are measured at their own size and at SIDE x SIDE pixels
SHARD_ROWS = 256
OURS = "run lengths in Parquet"

Save = Callable[[list[np.ndarray], Path], object]
Load = Callable[[Path], list[np.ndarray]]


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `python -m jobs.benchmark output`."""
    parser.add_argument(
        "--folder", action="append", metavar="DIR", help="masks, recursive; may be repeated (drawn masks)"
    )
    parser.add_argument("--masks", type=int, default=256, metavar="N", help="masks per folder (256)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="interleaved rounds; the median counts (5)")


def measure(args: Namespace) -> int:
    """Measure bytes per mask, and milliseconds to write and read it: part files of the job against one file per mask.

    A part file has 256 rows with all columns of the job. The PNG files have 8 bits per pixel, as vlsm.export writes
    them, or 1 bit. A bitmap has 1 bit per pixel and no header.
    """
    rows = []
    print(f"{'masks of':20} {'size':>5} {'as':24} {'bytes':>8} {'to PNG':>7} {'write, ms':>10} {'read, ms':>9}")
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(folder) for folder in args.folder or [_draw(Path(temporary, "drawn"), args.masks)]]
        for folder in folders:
            masks = _read(folder, args.masks)
            name = folder.parent.name if folder.name == "masks" else folder.name
            for size in ("own", str(SIDE)):
                sized = masks if size == "own" else [Square(SIDE).resize_mask(mask) for mask in masks]
                rows += _compare(name, size, sized, Path(temporary, "files"), args.repeats)
    write_json(args.json, "output", {"repeats": args.repeats, "runs": rows})
    return 0


def tell(figures: dict[str, Any]) -> list[str]:
    """Return the measured figures as lines of Markdown for the documentation."""
    png, one_bit = "PNG", "PNG, 1 bit"
    lines = [
        f"A mask at its own size and at {SIDE} x {SIDE}, medians of {figures['repeats']}: the job's parts, with all "
        "columns, against a PNG of 8 bits for each mask, which `vlsm.export` writes, one of 1 bit, and bare bits.",
        "",
        "| masks of | size | bytes: parts | PNG | 1 bit | bits | parts to PNG | to 1 bit | ms to write: parts | PNG "
        "| to read: parts | PNG |",
        f"|---{'|---' * 11}|",
    ]
    cases = dict.fromkeys((row["name"], row["masks"], row["size"]) for row in figures["runs"])
    for name, count, size in cases:
        way_rows = {row["as"]: row for row in figures["runs"] if (row["name"], row["size"]) == (name, size)}
        num_bytes = {way: row["bytes"] for way, row in way_rows.items()}
        lines.append(
            f"| {name} ({count}) | {size} | {' | '.join(f'{value:,.0f}' for value in num_bytes.values())} | "
            f"{num_bytes[OURS] / num_bytes[png]:.2f} | {num_bytes[OURS] / num_bytes[one_bit]:.2f} | "
            f"{way_rows[OURS]['write_ms']:.2f} | {way_rows[png]['write_ms']:.2f} | "
            f"{way_rows[OURS]['read_ms']:.2f} | {way_rows[png]['read_ms']:.2f} |"
        )
    lines += ["", "A mask of dozens of objects, such as of nuclei, is all outline: its runs hold little that repeats."]
    return lines


def _compare(name: str, size: str, masks: list[np.ndarray], folder: Path, repeats: int) -> list[dict[str, Any]]:
    shapes = [mask.shape for mask in masks]
    ways: dict[str, tuple[Save, Load]] = {
        OURS: (functools.partial(_save_parts, rows=[_describe(mask) for mask in masks]), _load_parts),
        "PNG": (functools.partial(_save_pngs, mode="L"), _load_pngs),
        "PNG, 1 bit": (functools.partial(_save_pngs, mode="1"), _load_pngs),
        "bitmap": (_save_bitmaps, functools.partial(_load_bitmaps, shapes=shapes)),
    }
    folders = [folder / str(number) for number in range(len(ways))]
    for way_folder in folders:
        (way_folder / "masks").mkdir(parents=True)
    saves = [functools.partial(save, masks, target) for (save, _), target in zip(ways.values(), folders, strict=True)]
    write_s = alternate(repeats, *saves)
    loads = [functools.partial(load, way_folder) for (_, load), way_folder in zip(ways.values(), folders, strict=True)]
    for load in loads:
        for mask, loaded in zip(masks, load(), strict=True):
            np.testing.assert_array_equal(mask, loaded)
    read_s = alternate(repeats, *loads)
    num_bytes = [sum(file.stat().st_size for file in way_folder.rglob("*.*")) / len(masks) for way_folder in folders]
    shutil.rmtree(folder)
    rows = []
    for number, way in enumerate(ways):
        row: dict[str, Any] = {
            "name": name,
            "masks": len(masks),
            "size": size,
            "as": way,
            "bytes": round(num_bytes[number], 1),
            "to_png": round(num_bytes[number] / num_bytes[1], 3),
            "write_ms": round(1000 * write_s[number] / len(masks), 4),
            "read_ms": round(1000 * read_s[number] / len(masks), 4),
        }
        print("{name:20} {size:>5} {as:24} {bytes:8,.0f} {to_png:6.2f}x".format(**row), end=" ")
        print("{write_ms:10.3f} {read_ms:9.3f}".format(**row), flush=True)
        rows.append(row)
    return rows


def _describe(mask: np.ndarray) -> dict[str, Any]:
    """Return a row as the job writes it, without mask_rle."""
    digest = hashlib.sha256(mask.tobytes()).hexdigest()
    probability = np.random.default_rng(int(digest[:8], 16)).uniform(0.5, 1, mask.shape).astype(np.float32)
    return {
        "image_id": f"{digest[:3]}/{digest[3:9]}.jpg",
        "image_uri": f"s3://bucket/scans/{digest[:3]}/{digest[3:9]}.jpg",
        "image_version": digest[9:41],
        "content_sha256": digest,
        "prompt": "polyp",
        "kind": "mask",
        "height": mask.shape[0],
        "width": mask.shape[1],
        "model": f"clipseg @ {'0' * 12}",
        "status": "ok",
        **asdict(describe_mask(np.asfortranarray(mask).view(bool), probability)),
    }


def _save_parts(masks: list[np.ndarray], folder: Path, rows: list[dict[str, Any]]) -> None:
    coded = [row | {"mask_rle": encode_mask(mask)} for row, mask in zip(rows, masks, strict=True)]
    for start in range(0, len(coded), SHARD_ROWS):
        write_part(str(folder), start // SHARD_ROWS, coded[start : start + SHARD_ROWS], "run", patience_s=1)


def _load_parts(folder: Path) -> list[np.ndarray]:
    return [row["mask"] for row in read_masks(str(folder), columns=["mask_rle"])]


def _save_pngs(masks: list[np.ndarray], folder: Path, mode: str) -> None:
    for number, mask in enumerate(masks):
        image = Image.fromarray(mask * 255)
        (image.convert("1") if mode == "1" else image).save(folder / f"{number:06}.png")


def _load_pngs(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path).convert("L")) // 255 for path in sorted(folder.glob("*.png"))]


def _save_bitmaps(masks: list[np.ndarray], folder: Path) -> None:
    for number, mask in enumerate(masks):
        (folder / f"{number:06}.bits").write_bytes(np.packbits(mask).tobytes())


def _load_bitmaps(folder: Path, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    files = [np.frombuffer(path.read_bytes(), np.uint8) for path in sorted(folder.glob("*.bits"))]
    return [
        np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape) for bits, shape in zip(files, shapes, strict=True)
    ]


def _read(folder: Path, count: int) -> list[np.ndarray]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    count = min(count, len(paths))
    chosen = [paths[len(paths) * number // count] for number in range(count)]
    return [decode_mask_file(path.read_bytes(), path.name, 127) for path in chosen]


def _draw(folder: Path, count: int) -> Path:
    write_labelled(folder, {"test": -(-count // len(KINDS))}, seed=0)
    return folder / "masks"
