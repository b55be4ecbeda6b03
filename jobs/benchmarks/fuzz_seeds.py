"""Small undamaged files of everything that is read: seeds that are damaged later.

Locations in the files are relative to the current folder, in which the reader runs.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.benchmarks.fuzz_files import (
    SIZE,
    dicom_folder,
    draw_archives,
    draw_dicom,
    draw_images,
    draw_lists,
    draw_parquet,
    draw_tiff,
    draw_videos,
    draw_volumes,
    encode_image,
    png_file,
    tar_file,
)
from jobs.benchmarks.fuzz_mutations import WAY, Files

WRITTEN = Path(__file__).parents[2] / "tests" / "written" / "v0"  # files of an earlier version, in a clone only
_CONFIGS = Path(__file__).parents[1] / "configs"
_OUTPUT_WAYS = ("masks", "verify", "status", "report")
_EXPORTS = ("=masks", "=overlays", "=probability", "=coco", "=labels", "=nifti", "=dicom-seg", "=rtstruct")


def draw_datasets() -> list[Files]:
    """Labelled datasets: annotation files, paired folders, a list, COCO, volumes, classes of colours."""
    from vlsm.segmentation.masks import encode_mask

    image, mask = png_file(), encode_image("m.png", Image.fromarray(_mask() * 255))
    colours = encode_image("m.png", Image.fromarray(_mask() * 2).quantize(3))
    records = [{"img_name": "a.png", "mask_name": "a.png", "prompts": {"p1": "polyp", "p2": ["one polyp", "two"]}}]
    shape = {"size": list(SIZE), "counts": encode_mask(_mask())}
    polygon = [[1, 1, 20, 1, 20, 15.5, 1, 15]]
    annotations: list[dict[str, Any]] = [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 1,
            "segmentation": polygon,
            "iscrowd": 0,
            "area": 5,
            "bbox": [1, 1, 9, 9],
        },
        {
            "id": 2,
            "image_id": 1,
            "category_id": 1,
            "segmentation": shape,
            "iscrowd": 1,
            "area": 5,
            "bbox": [1, 1, 9, 9],
        },
    ]
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "polyp"}],
    }
    volume = draw_volumes()[0]["a.nii"]
    return [
        {"d/anns/train.json": json.dumps(records).encode(), "d/images/a.png": image, "d/masks/a.png": mask},
        {"d/images/a.png": image, "d/masks/a_mask.png": mask, "d/images/b.png": image, "d/masks/b_mask.png": colours},
        {"d/list.csv": b"image_uri,mask_uri,split,group\na.png,m.png,train,p1\n", "d/a.png": image, "d/m.png": mask},
        {"d/coco.json": json.dumps(coco).encode(), "d/a.png": image},
        {"d/images/a.nii": volume, "d/labels/a.nii": volume},
        {
            "d/list.jsonl": b'{"image_uri":"a.png","mask_uri":"m.png","prompts":["polyp"]}',
            "d/a.png": image,
            "d/m.png": mask,
        },
    ]


def draw_settings() -> list[Files]:
    """Settings of a segment run, and of trainings and sweeps as `jobs/configs` has them."""
    segment = b"prompts: [polyp, fold]\nclasses: {lesion: [a lesion, one lesion]}\ntile: {size: 512, overlap: 0.25}\n"
    segment += b"run: {batch_size: 4, actors: 1..8, allow: [s3://b/]}\nwindow: [40, 400]\nthreshold: 0.5\n"
    segment += b"members:\n  - {checkpoint: c, weight: 2.0, flip: true, prompts: {polyp: a polyp}}\n"
    names = ["vlsm_b.yaml", "strong/clipseg.yaml", "sweeps/strong.yaml"]
    found = [{f"{'sweep' if 'sweeps' in name else 'train'}.yaml": (_CONFIGS / name).read_bytes()} for name in names]
    return [{"segment.yaml": segment}, *found]


def draw_checkpoints() -> list[Files]:
    """Checkpoints: one without a library's files, and those of an earlier version."""
    import vlsm

    with tempfile.TemporaryDirectory() as folder:
        vlsm.save_checkpoint(vlsm.build_model("pixel", image_size=32), folder, prompt="polyp")
        drawn = read_folder(Path(folder), "c")
    return [drawn, *(read_folder(WRITTEN / name, "c") for name in ("checkpoint", "clipseg"))]


def draw_outputs() -> list[Files]:
    """OUTPUT of a segment run: with label maps and probabilities, and the one of an earlier version."""
    from jobs.benchmarks.fuzz_output import draw_output

    images = {
        "i/a.png": png_file(),
        "i/a.nii": draw_volumes()[0]["a.nii"],
        "i/a.dcm": (dicom_folder() / "MR_small.dcm").read_bytes(),
    }
    sizes: dict[tuple[str, str | None], tuple[int, int]] = {("i/a.png", None): SIZE, ("i/a.dcm", None): (64, 64)}
    sizes |= {("i/a.nii", f"slice={number}"): (5, 6) for number in range(4)}
    with tempfile.TemporaryDirectory() as folder:
        draw_output(Path(folder), images, sizes)
        drawn = read_folder(Path(folder))
    written = _localize(read_folder(WRITTEN / "output", "o"))
    return [*_in_ways(drawn, *_OUTPUT_WAYS, *_EXPORTS), *_in_ways(written, *_OUTPUT_WAYS, "=labels")]


def draw_trainings() -> list[Files]:
    """OUTPUT of a finished and of an interrupted training."""
    runs = (_localize(read_folder(WRITTEN / name, "o")) for name in ("training", "interrupted"))
    return [files for run in runs for files in _in_ways(run, "state", "examples", "status", "report")]


def draw_evaluations() -> list[Files]:
    """OUTPUT of an evaluation."""
    return [_localize(read_folder(WRITTEN / "evaluation", "o"))]


def draw_http() -> list[Files]:
    """Answers of a web server, each with its head: an image, a volume and a tar."""
    made = {"a.png": png_file(), "a.nii": draw_volumes()[0]["a.nii"], "a.tar": tar_file({"a.png": png_file()})}
    return [{name: _answer(data, etag='"1"', accept_ranges="bytes")} for name, data in made.items()]


def draw_s3() -> list[Files]:
    """Answers of an S3 store, each with its head: a listing, and an object."""
    item = "<Contents><Key>a.png</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;1&quot;</ETag>"
    item += f"<Size>{len(png_file())}</Size><StorageClass>STANDARD</StorageClass></Contents>"
    listing = '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    listing += f"<Name>b</Name><KeyCount>1</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{item}"
    answers = {"listing": _answer((listing + "</ListBucketResult>").encode(), content_type="application/xml")}
    return [answers | {"object": _answer(png_file(), etag='"1"', last_modified="Thu, 01 Jan 2026 00:00:00 GMT")}]


SEEDS: dict[str, Callable[[], list[Files]]] = {
    "image": draw_images,
    "tiff": draw_tiff,
    "dicom": draw_dicom,
    "volume": draw_volumes,
    "video": draw_videos,
    "archive": draw_archives,
    "parquet": draw_parquet,
    "list": draw_lists,
    "dataset": draw_datasets,
    "settings": draw_settings,
    "checkpoint": draw_checkpoints,
    "output": draw_outputs,
    "training": draw_trainings,
    "evaluation": draw_evaluations,
    "http": draw_http,
    "s3": draw_s3,
}


def read_folder(folder: Path, name: str = "") -> Files:
    """Return the files of a folder by their paths, below another folder if it has a name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(Path(name) / path.relative_to(folder)): path.read_bytes() for path in paths}


def _in_ways(files: Files, *ways: str) -> list[Files]:
    """Return the files once for each way to read them."""
    return [files | {WAY: way.encode()} for way in ways]


def _localize(files: Files) -> Files:
    """Return the files with relative locations: no reader may ask the store that they were written in."""
    return {name: _without_store(name, data) for name, data in files.items() if "tensorboard" not in name}


def _without_store(name: str, data: bytes) -> bytes:
    if not name.endswith(".parquet"):
        return data.replace(b"s3://images/v0/", b"")
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    file, sink = pq.ParquetFile(pa.BufferReader(data)), pa.BufferOutputStream()
    with pq.ParquetWriter(sink, file.schema_arrow) as writer:
        for group in range(file.num_row_groups):  # one by one: in a plan, each is a shard
            table = file.read_row_group(group)
            for number, field in enumerate(table.schema):
                if pa.types.is_string(field.type):
                    local = pc.replace_substring(table[number], "s3://images/v0/", "")
                    table = table.set_column(number, field, local)
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _mask() -> np.ndarray:
    mask = np.zeros(SIZE, np.uint8)
    mask[3:12, 4:20] = 1
    return mask


def _answer(body: bytes, **headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-').title()}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
