"""Drawn archives: JPEG files, and manifests of any length that name them in turns."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.phantoms import draw_phantom

SIDES_PX = (480, 640)  # what endoscopes and ultrasound archives hold
SMALL_PX = (48, 49)


def draw_file(seed: int, sides_px: tuple[int, int] = SIDES_PX) -> bytes:
    """A drawn image as a JPEG; between sides_px height and width vary."""
    image, _ = draw_phantom(np.random.default_rng(seed), sides_px)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def write_files(folder: Path, count: int, sides_px: tuple[int, int] = SIDES_PX) -> list[Path]:
    """So many of them, all different, in a folder of their own."""
    folder.mkdir(parents=True)
    paths = [folder / f"{number:05d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(draw_file(number, sides_px))
    return paths


def write_manifest(path: Path, uris: Sequence[str], num_rows: int) -> None:
    """A list of so many rows, which name the files in turns: as many rows as there are files are all different."""
    import pyarrow as pa  # here, for a machine that has torch and the networks' libraries alone
    import pyarrow.parquet as pq

    schema = pa.schema([("image_id", pa.string()), ("image_uri", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for begin in range(0, num_rows, 100_000):
            numbers = range(begin, min(num_rows, begin + 100_000))
            ids = [f"{number:09d}" for number in numbers]
            writer.write_table(pa.table([ids, [uris[number % len(uris)] for number in numbers]], schema=schema))
