import csv
import gzip
import io
import json
import tarfile
import zipfile

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
import yaml
from PIL import Image
from pydicom import uid
from pydicom.data import get_testdata_file

from tests.images.test_dicom import FRAMES, SECRET, items, make
from tests.images.test_dicom import save as save_dicom
from tests.images.test_nifti import BODY, STORED, save_pair, store
from tests.images.test_nifti import save as save_nifti
from tests.images.test_volumes import make as make_volume
from vlsm.export.__main__ import main
from vlsm.export.origins import file_id, source_of
from vlsm.images.formats import FORMATS, kind_of
from vlsm.runs.results import write_part
from vlsm.segmentation.masks import encode_mask

UIDS = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.3.4", "SOPInstanceUID": "1.2.3.4.5", "Modality": "OT"}


def row(uri, mask, prompt="polyp", selector=None, **more):
    image_id = more.pop("image_id", str(uri).rsplit("/", 1)[-1] + (f"#{selector}" if selector else ""))
    told = {"image_id": image_id, "image_uri": str(uri), "selector": selector, "prompt": prompt, "kind": "mask"}
    told |= {"height": mask.shape[0], "width": mask.shape[1], "mask_rle": encode_mask(mask), "area_px": int(mask.sum())}
    return told | {"confidence": 0.5, "model": "clipseg @ abcdef", "status": "ok"} | more


def png(array):
    sink = io.BytesIO()
    Image.fromarray(array).save(sink, "PNG")
    return sink.getvalue()


def label_row(uri, labels, names, **more):
    return row(uri, (labels > 0).astype(np.uint8), json.dumps(names), kind="labels", label_map=png(labels), **more)


@pytest.fixture
def write(tmp_path):
    def write(rows, name="out", parts=1, **settings):
        output = tmp_path / name
        for number in range(parts):
            part = rows[number * len(rows) // parts : (number + 1) * len(rows) // parts]
            write_part(str(output), number, part, "run", 0)
        record = {"config": {"prompts": ["polyp", "fold"]} | settings, "plan": {}, "planned_at": "2026-01-02T03:04:05"}
        (output / "config.yaml").write_text(yaml.safe_dump(record))
        return str(output)

    return write


def run(output, kind, folder, *words, code=0):
    assert main([output, str(folder), "--format", kind, *words]) == code
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != "index.csv")


def index(folder):
    with (folder / "index.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def checkers(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 2, shape, dtype=np.uint8)


# --- NIfTI


def slice_rows(path, axis, prompts=("polyp",), skip=()):
    """A row per slice and prompt of a volume file; and for each prompt the volume that they are slices of."""
    with path.open("rb") as file:
        grid = FORMATS[kind_of(path.name)].load().read_header(file, str(path), axis).grid
    volumes = {prompt: checkers((*grid.shape, grid.num_volumes), n) for n, prompt in enumerate(prompts)}
    rows = []
    for selector in grid.selectors():
        for prompt, volume in volumes.items():
            if selector in skip:
                grid.slice_of(volume, selector)[...] = 0
            else:
                rows.append(row(path, np.array(grid.slice_of(volume, selector)), prompt, selector))
    return rows, volumes


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("stored", STORED)
def test_masks_of_slices_are_a_volume_again(tmp_path, write, axis, stored):
    array, affine = store(*STORED[stored])
    path = tmp_path / "body.nii.gz"
    nib.save(nib.Nifti1Image(array, affine), path)
    rows, volumes = slice_rows(path, axis, ("polyp", "fold"))
    output = write(rows, parts=2, slices=axis)
    assert run(output, "nifti", tmp_path / "x") == ["body.nii.gz.fold.nii.gz", "body.nii.gz.polyp.nii.gz"]
    for prompt, volume in volumes.items():
        image = nib.load(tmp_path / "x" / f"body.nii.gz.{prompt}.nii.gz")
        np.testing.assert_array_equal(np.asarray(image.dataobj), volume[..., 0])
        np.testing.assert_allclose(image.affine, affine, atol=1e-6)
        assert image.get_data_dtype() == np.uint8


def test_slices_without_a_mask_are_zero_and_told(tmp_path, write, caplog):
    path = tmp_path / "four.nii"
    path.write_bytes(save_nifti(np.zeros((3, 4, 2, 2), np.int16)))
    rows, volumes = slice_rows(path, "axial", skip=["volume=1,slice=0"])
    failed = {**rows[0], "selector": "volume=1,slice=0", "status": "failed", "error": "corrupt: x", "mask_rle": None}
    run(write([*rows, failed]), "nifti", tmp_path / "x")
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "x/four.nii.polyp.nii.gz").dataobj), volumes["polyp"])
    assert "1 of 4 slices have no mask of 'polyp'" in caplog.text


def test_label_maps_of_slices_are_a_volume_of_labels(tmp_path, write):
    path = tmp_path / "body.nii"
    path.write_bytes(save_nifti(BODY))
    rows = [label_row(path, np.full((3, 2), n, np.uint8), ["a", "b", "c"], selector=f"slice={n}") for n in range(4)]
    (name,) = run(write(rows), "nifti", tmp_path / "x", "--filter", "kind == labels")
    assert name.endswith(".labels.nii.gz")
    labels = np.asarray(nib.load(tmp_path / "x" / name).dataobj)
    assert [np.unique(labels[..., n]).tolist() for n in range(4)] == [[0], [1], [2], [3]]


def test_other_images_are_volumes_of_one_slice(tmp_path, write):
    mask = checkers((3, 5))
    run(write([row(tmp_path / "a.png", mask)]), "nifti", tmp_path / "x")
    image = nib.load(tmp_path / "x" / "a.png.polyp.nii.gz")
    assert image.shape == (5, 3, 1)
    assert image.affine.tolist() == np.eye(4).tolist()
    np.testing.assert_array_equal(np.asarray(image.dataobj)[:, :, 0].T, mask)


def test_a_volume_that_is_gone_or_another_costs_only_its_own(tmp_path, write, caplog):
    path = tmp_path / "body.nii"
    path.write_bytes(save_nifti(BODY))
    rows, _ = slice_rows(path, "axial")
    gone = [one | {"image_uri": str(tmp_path / "gone.nii")} for one in rows]
    small = tmp_path / "small.nii"
    small.write_bytes(save_nifti(BODY[:, :2]))
    other = [one | {"image_uri": str(small)} for one in rows]
    assert run(write([*gone, *other, *rows]), "nifti", tmp_path / "x", code=1) == ["body.nii.polyp.nii.gz"]
    assert "there is no file" in caplog.text
    lines = index(tmp_path / "x")
    assert [(line["image_uri"], line["selector"]) for line in lines] == [
        (one["image_uri"], one["selector"]) for one in (*gone, *other, *rows)
    ]
    assert {line["error"].split(":")[0] for line in lines[:4]} == {"missing"}
    assert {line["error"] for line in lines[4:8]} == {f"corrupt: {small} changed its shape after segmentation"}
    assert {(line["file"], line["error"]) for line in lines[8:]} == {("body.nii.polyp.nii.gz", "")}


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_members_of_packed_files_are_found(tmp_path, write, kind):
    content, path = save_nifti(BODY), tmp_path / f"all.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr("a/body.nii", content)
    else:
        with tarfile.open(path, "w") as packed:
            info = tarfile.TarInfo("a/body.nii")
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    plain = tmp_path / "body.nii"
    plain.write_bytes(content)
    rows, volumes = slice_rows(plain, "axial")
    rows = [
        one
        | {
            "image_uri": str(path),
            "selector": f"a/body.nii#{one['selector']}",
            "image_id": f"{path.name}#a/body.nii#{one['selector']}",
        }
        for one in rows
    ]
    rows.append(row(path, checkers((2, 2)), selector="b.nii#slice=0"))
    assert run(write(rows), "nifti", tmp_path / "x", code=1) == [f"all.{kind}#a/body.nii.polyp.nii.gz"]
    image = nib.load(tmp_path / "x" / f"all.{kind}#a" / "body.nii.polyp.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), volumes["polyp"][..., 0])


def test_selectors_name_a_file_and_an_image_of_it():
    def told(uri, selector):
        source, inner = source_of({"image_uri": uri, "selector": selector})
        assert source.uri == uri
        return source.member, inner

    assert told("u.png", None) == (None, None)
    assert told("u.dcm", "frame=3") == (None, "frame=3")
    assert told("u.zip", "a/b.png") == ("a/b.png", None)
    assert told("u.tar", "a/b#1.dcm#volume=2,slice=17") == ("a/b#1.dcm", "volume=2,slice=17")
    packed = {"image_id": "p#a.dcm#frame=3", "image_uri": "u.tgz", "selector": "a.dcm#frame=3"}
    assert file_id(packed) == "p#a.dcm"
    assert file_id({"image_id": "case 7", "image_uri": "u", "selector": "frame=3"}) == "case 7"


def test_slices_that_come_again_after_others_are_still_one_volume(tmp_path, write):
    volume = np.zeros((4, 3, 4), np.uint8)
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "n.nii")
    mask = np.ones((3, 4), np.uint8)
    own = [row("n.nii", mask, image_uri=str(tmp_path / "n.nii"), selector=f"slice={number}") for number in range(4)]
    output = write([*own[:2], row("b.png", mask), *own[2:]])
    run(output, "nifti", tmp_path / "x")
    assert np.asarray(nib.load(tmp_path / "x" / "n.nii.polyp.nii.gz").dataobj).all()


# --- volumes coincide with their source


TURN = np.array([[0, -1.5, 0, 40], [2.5, 0, 0, -30], [0, 0, 4, 20], [0, 0, 0, 1]])  # determinant > 0
MIRROR = TURN * [-1, 1, 1, 1]
SHEAR = TURN + np.array([[0, 0, 0.4, 0], [0, 0, 0.3, 0], [0, 0, 0, 0], [0, 0, 0, 0]])  # a gantry tilt
OBLIQUE = np.array(
    [[0.97, 0.0012, 0.0005, -100], [-0.001, 0.9699, 0.02, -100], [0.0008, -0.0203, 2.5, -300], [0, 0, 0, 1]]
)


def source(shape=(3, 4, 2), kind=nib.Nifti1Image, dtype=np.int16, q=(TURN, 1), s=(TURN, 1), **fields):
    """A NIfTI file whose qform and sform are (affine, code), and with other fields of the header."""
    image = kind(np.zeros(shape, dtype), None)
    image.header.set_qform(*q)
    image.header.set_sform(*s)
    for name, value in fields.items():
        image.header[name] = value
    return image


SOURCES = {
    **{f"codes {q} {s}": source(q=(TURN, q), s=(TURN, s)) for q in range(6) for s in range(6)},
    "disagree": source(s=(np.diag([1, 1, 2, 1.0]) + [[0, 0, 0, 10], [0, 0, 0, -5], [0, 0, 0, 3], [0] * 4], 2)),
    "disagree, sform first": source(q=(np.eye(4), 2), s=(TURN, 1)),
    "sheared": source(s=(SHEAR, 1)),
    "sheared, no qform": source(q=(TURN, 0), s=(SHEAR, 1)),
    "gantry": source(q=(OBLIQUE, 1), s=(OBLIQUE, 1)),
    "mirrored": source(q=(MIRROR, 1), s=(MIRROR, 1)),
    "mirrored qform": source(q=(MIRROR, 1), s=(MIRROR, 0)),
    "metres": source(xyzt_units=1 | 8),
    "microns": source(xyzt_units=3 | 16),
    "unknown units": source(xyzt_units=0),
    "series": source((3, 4, 2, 5), pixdim=[1, 2.5, 1.5, 4, 2.2, 1, 1, 1], toffset=3, xyzt_units=2 | 8),
    "series in ms": source((3, 4, 2, 5), pixdim=[1, 2.5, 1.5, 4, 2200, 1, 1, 1], xyzt_units=2 | 16, slice_duration=70),
    "one volume of a series": source((3, 4, 2, 1), pixdim=[1, 2.5, 1.5, 4, 3, 1, 1, 1]),
    "vector": source((3, 4, 2, 1, 3), dtype=np.float32, intent_code=1007),
    "image": source((3, 4)),
    "image that is turned": source((3, 4), q=(MIRROR, 1), s=(MIRROR, 2)),
    "image of one slice": source((3, 4, 1)),
    "nifti 2": source(kind=nib.Nifti2Image, s=(MIRROR, 4)),
    "nifti 2 series": source((3, 4, 2, 2), kind=nib.Nifti2Image, pixdim=[1, 2.5, 1.5, 4, 2.2, 1, 1, 1]),
    "scaled": source(scl_slope=3, scl_inter=-7, cal_max=9, descrip=b"of a scanner", intent_code=4, intent_p1=2),
    "zero voxel sizes": source(pixdim=[1, 2.5, 0, 0, 0, 0, 0, 0]),
    "no voxel sizes": source(q=(TURN, 0), s=(TURN, 0), pixdim=[0] * 8),
    "no sform": source(s=(TURN, 1), srow_x=[0] * 4, srow_y=[0] * 4, srow_z=[0] * 4),
    "colour": source(dtype=np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])),
    "complex": source(dtype=np.complex64),
}  # fmt: skip


def place_of(path):
    """Size, spacing, origin and direction of a file as ITK reads them; None if ITK refuses the file."""
    import SimpleITK as sitk

    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError:
        return None
    return image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection()


KEPT = ["dim", "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y"]
KEPT += ["qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units", "toffset", "slice_duration", "descrip"]


@pytest.mark.parametrize("name", SOURCES)
def test_masks_are_where_their_volume_is_in_every_reader(tmp_path, write, name):
    path = tmp_path / ("v.nii" if len(name) % 2 else "v.nii.gz")
    image = SOURCES[name]
    head = image.header.copy()  # as it is; nibabel would change it when it writes
    head["vox_offset"], head["magic"] = 544, head.single_magic
    content = head.binaryblock.ljust(544, b"\0") + np.asarray(image.dataobj).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    rows, volumes = slice_rows(path, "axial")
    (written,) = run(write(rows), "nifti", tmp_path / "x")
    mask = nib.load(tmp_path / "x" / written)
    stored = nib.load(path).header
    for field in KEPT:
        np.testing.assert_array_equal(mask.header[field], stored[field], field)
    np.testing.assert_array_equal(np.asarray(mask.dataobj).ravel(order="F"), volumes["polyp"].ravel(order="F"))
    is_vector = len(image.shape) == 5
    assert mask.header.get_slope_inter() in ((1, 0), (None, None))
    assert (mask.get_data_dtype(), mask.header["cal_max"]) == (np.uint8, 0)
    assert (mask.header["intent_code"], mask.header["intent_p1"]) == (1007 if is_vector else 1002, 0)
    assert place_of(tmp_path / "x" / written) == place_of(path)
    assert (place_of(path) is None) == (name in ("sheared, no qform", "nifti 2", "nifti 2 series"))  # ITK refuses these


@pytest.mark.parametrize("name", ["v.nrrd", "v.nhdr", "v.mha", "v.mhd"])
@pytest.mark.parametrize("shape", [(2, 4, 3), (4, 3), (3, 2, 4, 3)], ids=str)
@pytest.mark.parametrize("axis", ["axial", "sagittal"])
def test_masks_of_other_volumes_are_where_they_are(tmp_path, write, name, shape, axis):
    import SimpleITK as sitk

    path = tmp_path / name
    turned = np.linalg.qr(np.array([[1, 0.2, 0.1], [0.1, -1, 0.3], [0.0, 0.2, 1]]))[0]
    direction = np.eye(len(shape))
    direction[: min(3, len(shape)), : min(3, len(shape))] = turned if len(shape) > 2 else [[0, 1], [-1, 0]]
    array = np.random.default_rng(3).integers(0, 100, shape, dtype=np.int16)
    sitk.WriteImage(make_volume(array, direction), str(path))
    rows, volumes = slice_rows(path, axis)
    (written,) = run(write(rows, slices=axis), "nifti", tmp_path / "x")
    mask = sitk.ReadImage(str(tmp_path / "x" / written))
    expected = place_of(path)
    for found, value in zip(place_of(tmp_path / "x" / written), expected, strict=True):
        np.testing.assert_allclose(found, value, atol=1e-5)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask).T.ravel(order="F"), volumes["polyp"].ravel(order="F"))


NRRD = "NRRD0005\ntype: uint8\ndimension: 3\nsizes: 4 3 2\nencoding: raw\n"
VECTORS = "space directions: (0,2,0) (-3,0,0) (0,0,4)\nspace origin: (5,6,7)\n"
META = "ObjectType = Image\nNDims = 3\nBinaryData = True\nDimSize = 4 3 2\nElementType = MET_UCHAR\n"
HEADERS = {  # that SimpleITK itself does not write
    "nothing.nrrd": NRRD,
    "spacings.nrrd": NRRD + "spacings: 2 3 4\n",
    "cells.nrrd": NRRD + "spacings: 2 3 4\naxis mins: 5 6 7\ncenterings: cell cell cell\n",
    "nodes.nrrd": NRRD + "spacings: 2 3 4\naxis mins: 5 6 7\ncenterings: node node node\n",
    "mixed.nrrd": NRRD + "spacings: 2 3 4\naxismins: 5 6 7\ncenters: node cell ???\n",
    "unknown.nrrd": NRRD + "spacings: 2 3 nan\naxis mins: 5 6 7\n",
    "bounds.nrrd": NRRD + "axis mins: 5 6 7\naxis maxs: 9 10 9\ncenters: cell cell node\n",
    "lps.nrrd": NRRD + "space: left-posterior-superior\n" + VECTORS,
    "ras.nrrd": NRRD + "space: RAS\n" + VECTORS,
    "las.nrrd": NRRD + "space: left-anterior-superior\n" + VECTORS,
    "scanner.nrrd": NRRD + "space: scanner-xyz\n" + VECTORS,
    "left handed.nrrd": NRRD + "space: 3D-left-handed\n" + VECTORS,
    "three.nrrd": NRRD + "space dimension: 3\n" + VECTORS,
    "no origin.nrrd": NRRD + "space: RAS\n" + VECTORS.partition("space origin")[0],
    "nothing.mha": META,
    "size.mha": META + "ElementSize = 2 3 4\nPosition = 5 6 7\n",
    "both.mha": META + "ElementSize = 9 9 9\nElementSpacing = 2 3 4\nOrigin = 5 6 7\n",
    "turned.mha": META + "ElementSpacing = 2 3 4\nOffset = 5 6 7\nRotation = 0 0 1 1 0 0 0 1 0\n",
    "orientation.mha": META + "ElementSpacing = 2 3 4\nOrientation = 0 -1 0 1 0 0 0 0 1\n",
    "negative.mha": META + "ElementSpacing = -2 3 4\nOffset = 5 6 7\n",
    "centred.mha": META + "Offset = 5 6 7\nCenterOfRotation = 1 2 3\nTransformMatrix = 0 1 0 1 0 0 0 0 -1\n",
    "named.mha": META + "AnatomicalOrientation = LPS\nOffset = 5 6 7\n",
}


@pytest.mark.parametrize("name", HEADERS)
def test_masks_are_where_itk_reads_a_header(tmp_path, write, name):
    path = tmp_path / name
    end = "\n" if name.endswith("nrrd") else "ElementDataFile = LOCAL\n"
    path.write_bytes((HEADERS[name] + end).encode() + bytes(range(24)))
    (written,) = run(write(slice_rows(path, "axial")[0]), "nifti", tmp_path / "x")
    expected = place_of(path)
    assert expected is not None
    for found, value in zip(place_of(tmp_path / "x" / written), expected, strict=True):
        np.testing.assert_allclose(found, value, atol=1e-5)


@pytest.mark.parametrize("name", ["v.nrrd", "v.mha"])
@pytest.mark.parametrize("dtype", ["u1", "f4"])
def test_masks_of_vectors_are_where_they_are(tmp_path, write, name, dtype):
    import SimpleITK as sitk

    path = tmp_path / name
    sitk.WriteImage(make_volume(np.zeros((2, 4, 5, 3), dtype), is_vector=True), str(path))
    rows, _ = slice_rows(path, "axial")
    (written,) = run(write(rows), "nifti", tmp_path / "x")
    mask, image = sitk.ReadImage(str(tmp_path / "x" / written)), sitk.ReadImage(str(path))
    assert mask.GetSize() == (*image.GetSize(), *((3,) if dtype == "f4" else ()))
    np.testing.assert_allclose(mask.GetOrigin()[:3], image.GetOrigin())
    np.testing.assert_allclose(mask.GetSpacing()[:3], image.GetSpacing())


@pytest.mark.parametrize("kind", ["nifti1", "nifti2", "analyze", "spm99"])
def test_masks_of_pairs_are_where_they_are(tmp_path, write, kind):
    path = tmp_path / "v.hdr"
    header, values = save_pair(kind, BODY.astype(np.int16), MIRROR if kind.startswith("nifti") else None)
    path.write_bytes(header)
    (tmp_path / "v.img").write_bytes(values)
    rows, volumes = slice_rows(path, "axial")
    (written,) = run(write(rows), "nifti", tmp_path / "x")
    assert written == "v.hdr.polyp.nii.gz"
    assert place_of(tmp_path / "x" / written) == place_of(path)
    mask = np.asarray(nib.load(tmp_path / "x" / written).dataobj)
    np.testing.assert_array_equal(mask, volumes["polyp"][..., 0])


# --- label maps


def test_masks_become_label_maps_in_the_order_of_the_prompts(tmp_path, write):
    left = np.array([[1, 1, 0]], np.uint8)
    right = np.array([[0, 1, 1]], np.uint8)
    rows = [
        row("x/a.png", left, "fold", confidence=0.9),
        row("x/a.png", right, "polyp", confidence=0.6),
        row("x/b.png", left, "fold", confidence=0.6),
        row("x/b.png", right, "polyp", confidence=0.9),
        row("x/b.png", right, "polyp", kind="member 1"),
        row("x/c.png", left, "other"),
    ]
    output = write(rows)
    assert run(output, "labels", tmp_path / "x") == [*(f"{name}.png.labels.png" for name in "abc"), "labels.json"]
    shown = {name: np.asarray(Image.open(tmp_path / "x" / f"{name}.png.labels.png")).tolist() for name in "abc"}
    assert shown == {"a": [[2, 2, 1]], "b": [[2, 1, 1]], "c": [[3, 3, 0]]}
    names = json.loads((tmp_path / "x" / "labels.json").read_text())
    assert names == {"0": "background", "1": "polyp", "2": "fold", "3": "other"}
    assert run(output, "labels", tmp_path / "y", "--filter", "image_id = b.png") == ["b.png.labels.png", "labels.json"]


def test_label_maps_of_the_run_are_written_with_a_palette_and_their_values(tmp_path, write):
    labels = np.array([[0, 1], [2, 2]], np.uint8)
    stored = label_row("x/a.png", labels, ["cyst", "stone"])
    output = write([row("x/a.png", (labels == 1).astype(np.uint8), "cyst"), stored])
    run(output, "labels", tmp_path / "x")
    with Image.open(tmp_path / "x" / "a.png.labels.png") as written:
        assert written.mode == "P" and np.array_equal(np.asarray(written), labels)
    assert json.loads((tmp_path / "x" / "labels.json").read_text()) == {"0": "background", "1": "cyst", "2": "stone"}


def test_masks_labels_and_members_do_not_share_a_file(tmp_path, write):
    mask = checkers((2, 2))
    rows = [row("x/a.png", mask), row("x/a.png", mask, kind="member 1"), row("x/a.png", mask, kind="member 2")]
    output = write(rows)
    assert run(output, "masks", tmp_path / "x") == ["a.png.polyp.png"]
    assert run(output, "masks", tmp_path / "y", "--filter", "kind != mask") == [
        "a.png.polyp.member_1.png",
        "a.png.polyp.member_2.png",
    ]


# --- DICOM


def read_seg(path):
    return hd.seg.segread(path)


def frames_of(seg, source):
    """(frames, H, W, segments) as highdicom reads them, of all frames of the source."""
    numbers = range(1, int(source.get("NumberOfFrames", 1)) + 1)
    return seg.get_pixels_by_source_frame(
        source.SOPInstanceUID,
        numbers,
        combine_segments=False,
        assert_missing_frames_are_empty=True,
        ignore_spatial_locations=True,
    )


def test_a_plain_image_becomes_a_segmentation_with_a_segment_per_prompt(tmp_path, write):
    source = get_testdata_file("CT_small.dcm", download=False)
    masks = {"fold": checkers((128, 128), 1), "polyp": checkers((128, 128), 2)}
    rows = [row(source, mask, prompt) for prompt, mask in masks.items()]
    rows.append(row(source, masks["fold"], "polyp", kind="member 1"))
    assert run(write(rows), "dicom-seg", tmp_path / "x") == ["CT_small.dcm.seg.dcm"]
    seg, ct = read_seg(tmp_path / "x" / "CT_small.dcm.seg.dcm"), pydicom.dcmread(source)
    assert [item.SegmentLabel for item in seg.SegmentSequence] == ["polyp", "fold"]
    pixels = seg.get_pixels_by_source_instance(
        [ct.SOPInstanceUID], combine_segments=False, ignore_spatial_locations=True
    )
    np.testing.assert_array_equal(pixels[0], np.stack([masks["polyp"], masks["fold"]], axis=-1))
    assert seg.SegmentationType == "BINARY"
    assert (seg.PatientID, seg.StudyInstanceUID, seg.FrameOfReferenceUID) == (
        ct.PatientID,
        ct.StudyInstanceUID,
        ct.FrameOfReferenceUID,
    )
    algorithm = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("clipseg", "abcdef")


def many(tmp_path, name="cine.dcm", **elements):
    path = tmp_path / name
    path.write_bytes(save_dicom(make(FRAMES, frames=3, **UIDS | elements)))
    return path


def test_frames_become_one_segmentation_and_the_same_again(tmp_path, write):
    path = many(tmp_path)
    masks = checkers((3, 4, 5))
    masks[1] = 0
    rows = [row(path, mask, "polyp", f"frame={frame}") for frame, mask in enumerate(masks)]
    output = write(rows, parts=3)
    assert run(output, "dicom-seg", tmp_path / "x") == ["cine.dcm.seg.dcm"]
    seg = read_seg(tmp_path / "x" / "cine.dcm.seg.dcm")
    np.testing.assert_array_equal(frames_of(seg, pydicom.dcmread(path))[..., 0], masks)
    run(output, "dicom-seg", tmp_path / "y")
    assert (tmp_path / "x/cine.dcm.seg.dcm").read_bytes() == (tmp_path / "y/cine.dcm.seg.dcm").read_bytes()
    other = [one | {"model": "clipseg @ 123456"} for one in rows]
    run(write(other, "other"), "dicom-seg", tmp_path / "z")
    assert read_seg(tmp_path / "z" / "cine.dcm.seg.dcm").SOPInstanceUID != seg.SOPInstanceUID


def test_frames_with_places_in_the_patient_keep_them(tmp_path, write):
    places = [[0, 0, 10], [0, 0, 0], [0, 0, 5]]  # not in order
    enhanced = many(
        tmp_path,
        "ct.dcm",
        FrameOfReferenceUID="1.2.9",
        SOPClassUID=uid.EnhancedCTImageStorage,
        SharedFunctionalGroupsSequence=items(
            PixelMeasuresSequence=items(PixelSpacing=[1, 1], SliceThickness=5),
            PlaneOrientationSequence=items(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        ),
        PerFrameFunctionalGroupsSequence=[
            items(PlanePositionSequence=items(ImagePositionPatient=place))[0] for place in places
        ],
    )
    masks = checkers((3, 4, 5))
    rows = [row(enhanced, mask, "polyp", f"frame={frame}") for frame, mask in enumerate(masks)]
    run(write(rows), "dicom-seg", tmp_path / "x")
    seg = read_seg(tmp_path / "x" / "ct.dcm.seg.dcm")
    np.testing.assert_array_equal(frames_of(seg, pydicom.dcmread(enhanced))[..., 0], masks)
    shown = {
        tuple(group.PlanePositionSequence[0].ImagePositionPatient): seg.pixel_array[number].tolist()
        for number, group in enumerate(seg.PerFrameFunctionalGroupsSequence)
    }
    assert shown == {tuple(place): mask.tolist() for place, mask in zip(places, masks, strict=True)}


def test_label_maps_are_segments(tmp_path, write):
    path = many(tmp_path)
    labels = np.random.default_rng(1).integers(0, 3, (3, 4, 5), dtype=np.uint8)
    names = ["a" * 80, "a" * 90]
    rows = [label_row(path, one, names, selector=f"frame={frame}") for frame, one in enumerate(labels)]
    run(write(rows), "dicom-seg", tmp_path / "x")
    seg = read_seg(tmp_path / "x" / "cine.dcm.seg.dcm")
    assert [item.SegmentLabel for item in seg.SegmentSequence] == ["a" * 64, "a" * 61 + " ~2"]
    pixels = frames_of(seg, pydicom.dcmread(path))
    for number in (1, 2):
        np.testing.assert_array_equal(pixels[..., number - 1], labels == number)


def test_empty_masks_are_a_segmentation_too(tmp_path, write):
    path = many(tmp_path)
    rows = [row(path, np.zeros((4, 5), np.uint8), selector=f"frame={frame}") for frame in range(3)]
    run(write(rows), "dicom-seg", tmp_path / "x")
    assert not read_seg(tmp_path / "x" / "cine.dcm.seg.dcm").pixel_array.any()


def test_what_cannot_be_a_segmentation_is_told_and_passed_over(tmp_path, write, caplog):
    good, bare = many(tmp_path), many(tmp_path, "bare.dcm")
    lacking = pydicom.dcmread(bare)
    del lacking.StudyInstanceUID
    lacking.save_as(bare)
    picture = tmp_path / "a"
    picture.write_bytes(png(np.zeros((4, 5), np.uint8)))
    mask = checkers((4, 5))
    rows = [row(path, mask, selector="frame=0") for path in (good, bare, tmp_path / "gone.dcm")]
    rows += [row(picture, mask), row("x/b.png", mask), row(good, checkers((9, 9)), selector="frame=0", image_id="c")]
    assert run(write(rows), "dicom-seg", tmp_path / "x", code=1) == ["cine.dcm.seg.dcm"]
    assert "the image is not DICOM: 1 mask" in caplog.text
    lines = index(tmp_path / "x")
    errors = {line["image_id"]: line["error"] for line in lines if not line["file"]}
    assert set(errors) == {"bare.dcm#frame=0", "gone.dcm#frame=0", "b.png", "c"}
    assert "bare.dcm lacks what a DICOM segmentation needs (StudyInstanceUID)" in errors["bare.dcm#frame=0"]
    assert "there is no file" in errors["gone.dcm#frame=0"]
    assert "cine.dcm changed its shape" in errors["c"]
    assert [line["image_id"] for line in lines if line["file"] == "cine.dcm.seg.dcm"] == ["cine.dcm#frame=0"]
    assert SECRET not in caplog.text + str(lines)


@pytest.mark.parametrize(
    "name",
    ["MR_small.dcm", "examples_ybr_color.dcm", "examples_palette.dcm", "SC_rgb_rle_2frame.dcm"],
)
def test_sources_of_other_makers_are_accepted(tmp_path, write, name, capfd):
    path = get_testdata_file(name, download=False)
    source = pydicom.dcmread(path)
    num_frames = int(source.get("NumberOfFrames", 1))
    masks = checkers((num_frames, source.Rows, source.Columns))
    rows = [row(path, mask, selector=f"frame={frame}" if num_frames > 1 else None) for frame, mask in enumerate(masks)]
    run(write(rows), "dicom-seg", tmp_path / "x")
    seg = read_seg(tmp_path / "x" / f"{name}.seg.dcm")
    assert seg.pixel_array.sum() == masks.sum()
    kinds = {one.value for one in seg.iterall() if one.keyword == "ReferencedSOPClassUID"}
    assert kinds == {source.SOPClassUID}
    assert str(source.get("PatientName", "?")) not in "".join(capfd.readouterr())


@pytest.mark.parametrize("kind", ["labels", "nifti", "dicom-seg"])
def test_no_file_leaves_its_folder(tmp_path, write, kind):
    path = many(tmp_path)
    mask = checkers((4, 5))
    ids = ["../../out", "/etc/x", "a/../../b", "n" * 300, "line\nbreak"]
    rows = [row(path, mask, selector=f"frame={n % 3}", image_id=f"{one}#frame={n % 3}") for n, one in enumerate(ids)]
    output = write(rows)
    before = {file for file in tmp_path.rglob("*") if file.is_file()}
    run(output, kind, tmp_path / "x")
    new = {file for file in tmp_path.rglob("*") if file.is_file()} - before
    assert new
    assert all(file.is_relative_to(tmp_path / "x") for file in new)


def test_limits_count_rows(tmp_path, write):
    rows = [row(f"x/{name}.png", checkers((2, 3))) for name in "abc"]
    assert len(run(write(rows), "nifti", tmp_path / "x", "--limit", "2")) == 2
