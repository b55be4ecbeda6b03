"""Small undamaged files of every format that is read, as seeds. All of them are drawn; some DICOM files are pydicom's.

Locations in the files are relative to the current folder, in which the reader runs.
"""

import gzip
import io
import json
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.benchmarks.fuzz_mutations import Files

WRITTEN = Path(__file__).parents[2] / "tests" / "written" / "v0"  # files of an earlier version, in a clone only
_CONFIGS = Path(__file__).parents[1] / "configs"
_MOST_BYTES = 40_000  # of a real file that becomes a seed: changes of a large file mostly hit its pixels
_SIZE = (24, 31)


def draw_images() -> list[Files]:
    """Files of the formats with one image."""
    picture, exif = _picture(), Image.Exif()
    exif[0x0112] = 6
    wide = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    made: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("a.png", picture, {}),
        ("b.png", picture.quantize(16), {"transparency": 3}),
        ("c.png", wide, {}),
        ("d.png", picture.convert("1"), {}),
        ("e.jpg", picture, {"exif": exif, "icc_profile": b"x" * 200}),
        ("f.jpg", picture, {"progressive": True, "subsampling": 2}),
        ("g.jpg", picture.convert("CMYK"), {}),
        ("h.bmp", picture, {}),
        ("i.webp", picture, {"lossless": True, "exif": exif}),
        ("j.gif", picture, {"save_all": True, "append_images": [picture.rotate(90)]}),
        ("k.jp2", picture, {}),
        ("l.avif", picture, {}),
    ]
    return [{name: _encode(name, image, **options)} for name, image, options in made]


def draw_tiff() -> list[Files]:
    """TIFF files with several pages, tiles, planes, depths and compressions."""
    import tifffile

    rgb = np.asarray(_picture())
    grey = rgb[..., 0]
    ways: list[tuple[np.ndarray, dict[str, Any]]] = [
        (rgb, {"compression": "lzw", "predictor": True}),
        (np.stack([grey] * 3), {"photometric": "minisblack", "metadata": None}),
        (np.tile(rgb, (3, 3, 1)), {"tile": (16, 16), "compression": "jpeg"}),
        (np.moveaxis(rgb, -1, 0), {"photometric": "rgb", "planarconfig": "separate"}),
        (grey.astype(np.float32), {"compression": "deflate"}),
        (grey.astype(np.uint16) * 200, {"bigtiff": True, "byteorder": ">"}),
        (grey > 100, {"compression": "packbits"}),
    ]
    seeds = []
    for values, options in ways:
        sink = io.BytesIO()
        tifffile.imwrite(sink, values, **options)
        seeds.append({"a.tif": sink.getvalue()})
    return seeds


def draw_dicom() -> list[Files]:
    """The small images among pydicom's own test files: all transfer syntaxes."""
    files = sorted(_dicom_folder().rglob("*.dcm"))
    readable = [path for path in files if re.match("SC_|MR_small|JPEG|693|image_dfl|examples", path.name)]
    odd = {"JPEG2000-embedded-sequence-delimiter.dcm"}  # damaged on purpose
    return [
        {"a.dcm": path.read_bytes()} for path in readable if path.name not in odd and path.stat().st_size <= _MOST_BYTES
    ]


def draw_volumes() -> list[Files]:
    """Volumes in NIfTI, NRRD and MetaImage: in one file, in two files, compressed."""
    import nibabel as nib

    values = np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4)
    nifti = nib.Nifti1Image(values, np.eye(4)).to_bytes()
    time = nib.Nifti2Image(np.stack([values] * 2, axis=-1), np.eye(4)).to_bytes()
    pair = bytearray(nifti[:348])
    pair[108:112], pair[344:348] = b"\0" * 4, b"ni1\0"  # the values start at 0 of the second file
    raw = values.tobytes(order="F")
    nrrd = b"NRRD0004\ntype: short\ndimension: 3\nsizes: 6 5 4\nendian: little\nspace: left-posterior-superior\n"
    nrrd += b"space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\n"
    meta = b"ObjectType = Image\nNDims = 3\nDimSize = 6 5 4\nElementType = MET_SHORT\nBinaryData = True\n"
    meta += b"ElementSpacing = 1 1 2\nElementByteOrderMSB = False\n"
    return [
        {"a.nii": nifti},
        {"a.nii.gz": gzip.compress(time, mtime=0)},
        {"a.hdr": bytes(pair), "a.img": raw},
        {"a.nrrd": nrrd + b"encoding: raw\n\n" + raw},
        {"a.nrrd": nrrd + b"encoding: gzip\n\n" + gzip.compress(raw, mtime=0)},
        {"a.nhdr": nrrd + b"encoding: raw\ndata file: a.raw\n\n", "a.raw": raw},
        {"a.mha": meta + b"ElementDataFile = LOCAL\n" + raw},
        {"a.mhd": meta + b"ElementDataFile = a.raw\n", "a.raw": raw},
    ]


def draw_videos() -> list[Files]:
    """Videos in four containers."""
    import av

    seeds = []
    for name, codec in (("a.mp4", "mpeg4"), ("a.avi", "mjpeg"), ("a.mkv", "mpeg4"), ("a.mpg", "mpeg2video")):
        sink = io.BytesIO()
        form = {"mkv": "matroska", "mpg": "mpeg"}.get(name[2:], name[2:])
        with av.open(sink, "w", format=form) as output:
            stream: Any = output.add_stream(codec, rate=25)
            stream.width, stream.height = 64, 48
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for number in range(30):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number * 8, np.uint8), format="rgb24")
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
        seeds.append({name: sink.getvalue()})
    return seeds


def draw_archives() -> list[Files]:
    """Tar, compressed tar and zip with images, volumes and text; Parquet files with images."""
    members = {"a/a.png": _png(), "a/b.jpg": draw_images()[4]["e.jpg"], "c.nii.gz": draw_volumes()[1]["a.nii.gz"]}
    members |= {"d.txt": b"no image", "e": draw_tiff()[1]["a.tif"]}
    return [{"a.tar": _tar(members)}, {"a.tar.gz": gzip.compress(_tar(members), mtime=0)}, {"a.zip": _zip(members)}]


def draw_parquet() -> list[Files]:
    """Parquet files with images: as struct, and as bytes with the name of a format."""
    images = [_png(), draw_images()[4]["e.jpg"], draw_tiff()[1]["a.tif"]]
    rows = [{"image": {"bytes": data, "path": f"{n}.{'tif' if n == 2 else 'png'}"}} for n, data in enumerate(images)]
    named = [{"png": data, "image_id": f"case {number}", "prompt": "polyp"} for number, data in enumerate(images[:2])]
    return [{"a.parquet": _parquet(rows)}, {"a.parquet": _parquet(named)}]


def draw_lists() -> list[Files]:
    """Lists of images: CSV, TSV, JSON Lines, Parquet, and a folder of parts."""
    images = {"a.png": _png(), "s.tif": draw_tiff()[1]["a.tif"]}
    rows: list[dict[str, Any]] = [
        {"image_uri": "a.png", "image_id": "case 1", "prompt": "polyp", "size_bytes": len(_png())},
        {
            "image_uri": "s.tif",
            "image_id": "case 2",
            "selector": "page=1",
            "prompts": ["polyp", "fold"],
            "mtime": 1.7e9,
        },
    ]
    table = b'image_uri,image_id,prompt\na.png,case 1,polyp\ns.tif,case 2,"a, b"\n'
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return [
        images | {"list.csv": table},
        images | {"list.tsv": b'image_uri\timage_id\tprompts\na.png\t1\t["a", "b"]\n'},
        images | {"list.jsonl": lines},
        images | {"list.parquet": _parquet(rows)},
    ]


def draw_datasets() -> list[Files]:
    """Labelled datasets: annotation files, paired folders, a list, COCO, volumes, classes of colours."""
    from vlsm.segmentation.masks import encode_mask

    image, mask = _png(), _encode("m.png", Image.fromarray(_mask() * 255))
    colours = _encode("m.png", Image.fromarray(_mask() * 2).quantize(3))
    records = [{"img_name": "a.png", "mask_name": "a.png", "prompts": {"p1": "polyp", "p2": ["one polyp", "two"]}}]
    shape = {"size": list(_SIZE), "counts": encode_mask(_mask())}
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
        "images": [{"id": 1, "file_name": "a.png", "height": _SIZE[0], "width": _SIZE[1]}],
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
        "i/a.png": _png(),
        "i/a.nii": draw_volumes()[0]["a.nii"],
        "i/a.dcm": (_dicom_folder() / "MR_small.dcm").read_bytes(),
    }
    sizes: dict[tuple[str, str | None], tuple[int, int]] = {("i/a.png", None): _SIZE, ("i/a.dcm", None): (64, 64)}
    sizes |= {("i/a.nii", f"slice={number}"): (5, 6) for number in range(4)}
    with tempfile.TemporaryDirectory() as folder:
        draw_output(Path(folder), images, sizes)
        drawn = read_folder(Path(folder))
    return [drawn, _localize(read_folder(WRITTEN / "output", "o"))]


def draw_trainings() -> list[Files]:
    """OUTPUT of a finished and of an interrupted training."""
    return [_localize(read_folder(WRITTEN / name, "o")) for name in ("training", "interrupted")]


def draw_evaluations() -> list[Files]:
    """OUTPUT of an evaluation."""
    return [_localize(read_folder(WRITTEN / "evaluation", "o"))]


def draw_http() -> list[Files]:
    """Answers of a web server, each with its head: an image, a volume and a tar."""
    made = {"a.png": _png(), "a.nii": draw_volumes()[0]["a.nii"], "a.tar": _tar({"a.png": _png()})}
    return [{name: _answer(data, etag='"1"', accept_ranges="bytes")} for name, data in made.items()]


def draw_s3() -> list[Files]:
    """Answers of an S3 store, each with its head: a listing, and an object."""
    item = "<Contents><Key>a.png</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;1&quot;</ETag>"
    item += f"<Size>{len(_png())}</Size><StorageClass>STANDARD</StorageClass></Contents>"
    listing = '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    listing += f"<Name>b</Name><KeyCount>1</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{item}"
    answers = {"listing": _answer((listing + "</ListBucketResult>").encode(), content_type="application/xml")}
    return [answers | {"object": _answer(_png(), etag='"1"', last_modified="Thu, 01 Jan 2026 00:00:00 GMT")}]


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


def _dicom_folder() -> Path:
    import pydicom.data

    return Path(pydicom.data.__file__).parent / "test_files"


def read_folder(folder: Path, name: str = "") -> Files:
    """Return the files of a folder by their paths, below another folder if it has a name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(Path(name) / path.relative_to(folder)): path.read_bytes() for path in paths}


def _localize(files: Files) -> Files:
    """Return the files with relative locations: no reader may ask the store that they were written in."""
    return {name: _without_store(name, data) for name, data in files.items() if "tensorboard" not in name}


def _without_store(name: str, data: bytes) -> bytes:
    if not name.endswith(".parquet"):
        return data.replace(b"s3://images/v0/", b"")
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(pa.BufferReader(data))
    for number, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            table = table.set_column(number, field, pc.replace_substring(table[number], "s3://images/v0/", ""))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def _picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 255, (*_SIZE, 3), dtype=np.uint8))


def _mask() -> np.ndarray:
    mask = np.zeros(_SIZE, np.uint8)
    mask[3:12, 4:20] = 1
    return mask


def _png() -> bytes:
    return _encode("a.png", _picture())


def _encode(name: str, image: Image.Image, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, Image.registered_extensions()[Path(name).suffix], **options)
    return sink.getvalue()


def _tar(members: Files) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def _zip(members: Files) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return sink.getvalue()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def _answer(body: bytes, **headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-').title()}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
