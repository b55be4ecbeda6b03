"""Drawn archives: JPEG files, and manifests of any length whose rows repeat these files."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.phantoms import draw_phantom

SIDES_PX = (480, 640)  # usual sizes of endoscopy and ultrasound images
SMALL_PX = (48, 49)


def draw_file(seed: int, sides_px: tuple[int, int] = SIDES_PX) -> bytes:
    """Return a drawn image as the bytes of a JPEG file; its height and width lie between the two values of sides_px."""
    image, _ = draw_phantom(np.random.default_rng(seed), sides_px)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def write_files(
    folder: Path, count: int, sides_px: tuple[int, int] = SIDES_PX, num_drawings: int | None = None
) -> list[Path]:
    """Write `count` different JPEG files into a new folder, and return their paths.

    Files beyond `num_drawings` have the pictures of earlier ones: drawing takes time. Comments make their bytes differ.
    """
    folder.mkdir(parents=True)
    paths = [folder / f"{number:05d}.jpg" for number in range(count)]
    drawings = [draw_file(number, sides_px) for number in range(min(count, num_drawings or count))]
    for number, path in enumerate(paths):
        data = drawings[number % len(drawings)]
        comment = b"\xff\xfe\x00\x06" + number.to_bytes(4, "big")  # a segment of JPEG, right after its first marker
        path.write_bytes(data if number < len(drawings) else data[:2] + comment + data[2:])
    return paths


def write_manifest(path: Path, uris: Sequence[str], num_rows: int) -> None:
    """Write a manifest of `num_rows` rows that name `uris` in order, over and over: neighbouring rows differ."""
    import pyarrow as pa  # imported here: the gpu benchmark must run without pyarrow
    import pyarrow.parquet as pq

    schema = pa.schema([("image_id", pa.string()), ("image_uri", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for begin in range(0, num_rows, 100_000):
            numbers = range(begin, min(num_rows, begin + 100_000))
            ids = [f"{number:09d}" for number in numbers]
            writer.write_table(pa.table([ids, [uris[number % len(uris)] for number in numbers]], schema=schema))
