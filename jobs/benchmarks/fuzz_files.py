"""Small undamaged files of every image format, and lists of them. All are drawn, but for DICOM files of pydicom."""

import gzip
import io
import json
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.benchmarks.fuzz_mutations import Files

SIZE = (24, 31)  # (height, width) of most images in pixels
_MOST_BYTES = 40_000  # of a real file: changes of a large file mostly hit its pixels


def draw_images() -> list[Files]:
    """Files of the formats with one image."""
    picture, exif = draw_picture(), Image.Exif()
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
    return [{name: encode_image(name, image, **options)} for name, image, options in made]


def draw_tiff() -> list[Files]:
    """TIFF files with several pages, tiles, planes, depths and compressions."""
    import tifffile

    rgb = np.asarray(draw_picture())
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
    files = sorted(dicom_folder().rglob("*.dcm"))
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
    members = {"a/a.png": png_file(), "a/b.jpg": draw_images()[4]["e.jpg"], "c.nii.gz": draw_volumes()[1]["a.nii.gz"]}
    members |= {"d.txt": b"no image", "e": draw_tiff()[1]["a.tif"]}
    return [
        {"a.tar": tar_file(members)},
        {"a.tar.gz": gzip.compress(tar_file(members), mtime=0)},
        {"a.zip": _zip(members)},
    ]


def draw_parquet() -> list[Files]:
    """Parquet files with images: as struct, and as bytes with the name of a format."""
    images = [png_file(), draw_images()[4]["e.jpg"], draw_tiff()[1]["a.tif"]]
    rows = [{"image": {"bytes": data, "path": f"{n}.{'tif' if n == 2 else 'png'}"}} for n, data in enumerate(images)]
    named = [{"png": data, "image_id": f"case {number}", "prompt": "polyp"} for number, data in enumerate(images[:2])]
    return [{"a.parquet": _parquet(rows)}, {"a.parquet": _parquet(named)}]


def draw_lists() -> list[Files]:
    """Lists of images: CSV, TSV, JSON Lines, Parquet, and a folder of parts."""
    images = {"a.png": png_file(), "s.tif": draw_tiff()[1]["a.tif"]}
    rows: list[dict[str, Any]] = [
        {"image_uri": "a.png", "image_id": "case 1", "prompt": "polyp", "size_bytes": len(png_file())},
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


def dicom_folder() -> Path:
    """Return the folder of pydicom's test files."""
    import pydicom.data

    return Path(pydicom.data.__file__).parent / "test_files"


def draw_picture() -> Image.Image:
    """Return a small picture of noise."""
    return Image.fromarray(np.random.default_rng(1).integers(0, 255, (*SIZE, 3), dtype=np.uint8))


def png_file() -> bytes:
    """Return this picture as a PNG."""
    return encode_image("a.png", draw_picture())


def encode_image(name: str, image: Image.Image, **options: Any) -> bytes:
    """Return an image in the format that a file name states."""
    sink = io.BytesIO()
    image.save(sink, Image.registered_extensions()[Path(name).suffix], **options)
    return sink.getvalue()


def tar_file(members: Files) -> bytes:
    """Return a tar with these members."""
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
