"""Exports of volumes and DICOM objects: what index.csv says, and what a bad row or file costs."""

import io
import tarfile
import zipfile

import highdicom as hd
import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.export.test_dicom_seg import SECRET, make, slices
from tests.export.test_volumes import (  # noqa: F401 - write is a fixture
    checkers,
    index,
    label_row,
    png,
    row,
    run,
    slice_rows,
    write,
)
from tests.images.test_nifti import BODY, save_pair
from tests.images.test_nifti import save as save_nifti
from vlsm.export import dicom_masks, volumes
from vlsm.segmentation.masks import encode_mask

FORMATS = ["nifti", "dicom-seg", "dicom-seg-series", "rtstruct"]
DICOM_FORMATS = FORMATS[1:]


def save(folder, *datasets):
    folder.mkdir(exist_ok=True, parents=True)
    paths = []
    for number, dataset in enumerate(datasets):
        dataset.save_as(folder / f"{number}.dcm", enforce_file_format=True)
        paths.append(folder / f"{number}.dcm")
    return paths


def lines_of(folder):
    """(image_id, prompt, kind, file, first word of the error) of each line of the index."""
    return [
        (line["image_id"], line["prompt"], line["kind"], line["file"], line["error"].split(":")[0])
        for line in index(folder)
    ]


def segments_of(path):
    """The masks of each segment of a SEG, by label and SOP Instance UID of the image; only frames that it has."""
    seg = hd.seg.segread(path)
    labels = [item.SegmentLabel for item in seg.SegmentSequence]
    frames = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    found = {}
    for frame, group in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        groups = (group, seg.SharedFunctionalGroupsSequence[0])
        (segment,) = (one.SegmentIdentificationSequence[0] for one in groups if "SegmentIdentificationSequence" in one)
        label = labels[segment.ReferencedSegmentNumber - 1]
        source = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        found[label, source] = frame
    return found


# --- which rows are in which file


@pytest.mark.parametrize("kind", FORMATS)
def test_each_row_is_once_in_the_index_and_each_file_exists(tmp_path, write, kind):  # noqa: F811
    paths = save(tmp_path / "in", *slices(0, 3, 6))
    rows = [row(path, checkers((4, 5), n), prompt) for n, path in enumerate(paths) for prompt in ("polyp", "fold")]
    names = run(write(rows), kind, tmp_path / "x")
    assert [line[:3] for line in lines_of(tmp_path / "x")] == [
        (one["image_id"], one["prompt"], one["kind"]) for one in rows
    ]
    assert sorted({line["file"] for line in index(tmp_path / "x")}) == names


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("limit", [0, 1, 3, 5, 9])
@pytest.mark.parametrize("order", ["files", "prompts", "mixed"])
def test_a_limit_counts_rows_wherever_they_are(tmp_path, write, kind, limit, order):  # noqa: F811
    paths = save(tmp_path / "in", *slices(0, 3, 6))
    rows = [row(path, checkers((4, 5), n), prompt) for n, path in enumerate(paths) for prompt in ("polyp", "fold")]
    rows = {"files": rows, "prompts": rows[::2] + rows[1::2], "mixed": [rows[n] for n in (0, 2, 1, 5, 4, 3)]}[order]
    names = run(write(rows, parts=2), kind, tmp_path / "x", "--limit", str(limit))
    lines = lines_of(tmp_path / "x") if limit else []
    assert sorted(line[:2] for line in lines) == sorted((one["image_id"], one["prompt"]) for one in rows[:limit])
    assert sorted({line[3] for line in lines}) == names
    if kind == "dicom-seg-series" and limit:
        assert len(segments_of(tmp_path / "x" / names[0])) == len(rows[:limit])


def test_a_volume_whose_rows_are_scattered_is_written_once_with_its_limit(tmp_path, write):  # noqa: F811
    for name in "ab":
        (tmp_path / f"{name}.nii").write_bytes(save_nifti(BODY))
    first, second = (slice_rows(tmp_path / f"{name}.nii", "axial")[0] for name in "ab")
    output = write([*first[:2], *second, *first[2:]], parts=3)
    names = run(output, "nifti", tmp_path / "x", "--limit", str(len(second) + 3))
    assert names == ["a.nii.polyp.nii.gz", "b.nii.polyp.nii.gz"]
    lines = [line["selector"] for line in index(tmp_path / "x") if line["file"] == names[0]]
    assert lines == ["slice=0", "slice=1", "slice=2"]
    assert not np.asarray(nib.load(tmp_path / "x" / names[0]).dataobj)[..., 3].any()


@pytest.mark.parametrize("kind", FORMATS)
def test_files_of_one_image_id_have_files_of_their_own(tmp_path, write, kind):  # noqa: F811
    first, second = slices(0, 3)
    second.SeriesInstanceUID = "1.2.3.5"
    paths = [*save(tmp_path / "a", first), *save(tmp_path / "b", second)]
    if kind == "nifti":
        for path in paths:
            path.write_bytes(save_nifti(BODY))
            path.rename(path.with_suffix(".nii"))
        rows = [one for path in paths for one in slice_rows(path.with_suffix(".nii"), "axial")[0]]
    else:
        rows = [row(path, checkers((4, 5))) for path in paths]
    assert len(run(write(rows), kind, tmp_path / "x")) == 2
    files = {line["file"]: line["image_uri"] for line in index(tmp_path / "x")}
    assert len(files) == len(set(files.values())) == 2


# --- bad rows


DAMAGES = [
    *({"mask_rle": rle} for rle in (None, "", "PP", "é", encode_mask(np.ones((4, 6), np.uint8)))),
    *({"height": value} for value in (None, -1, 0, 3, 2_000_000_000)),
    {"width": 6},
    {"area_px": 99},
    {"mask_rle": encode_mask(np.ones((3, 5), np.uint8)), "height": 3, "area_px": 15},
]
SELECTORS = [{"selector": selector} for selector in ("frame=1", "frame=-1", "page=0", "slice=0")]


@pytest.mark.parametrize("damage", [*DAMAGES, *SELECTORS], ids=str)
@pytest.mark.parametrize("kind", DICOM_FORMATS)
def test_a_damaged_row_costs_only_itself(tmp_path, write, kind, damage):  # noqa: F811
    paths = save(tmp_path / "in", *slices(0, 3))
    masks = [checkers((4, 5), n) for n in range(4)]
    rows = [row(paths[n // 2], masks[n], ("polyp", "fold")[n % 2]) for n in range(4)]
    rows[1] |= damage
    names = run(write(rows), kind, tmp_path / "x", code=1)
    assert [line[:2] for line in lines_of(tmp_path / "x") if line[4]] == [("0.dcm", "fold")]
    assert sorted({line[3] for line in lines_of(tmp_path / "x") if not line[4]}) == names
    if kind == "dicom-seg-series":
        found = segments_of(tmp_path / "x" / names[0])
        assert set(found) == {("polyp", "1.2.1"), ("polyp", "1.2.2"), ("fold", "1.2.2")}
        for key, mask in zip(sorted(found), (masks[3], masks[0], masks[2]), strict=True):
            np.testing.assert_array_equal(found[key], mask)


@pytest.mark.parametrize("damage", [*DAMAGES[:7], {"height": 9}, {"selector": "slice=9"}, {"selector": None}], ids=str)
def test_a_damaged_slice_costs_only_itself(tmp_path, write, caplog, damage):  # noqa: F811
    path = tmp_path / "body.nii"
    path.write_bytes(save_nifti(BODY))
    rows, expected = slice_rows(path, "axial")
    rows[1] |= damage
    assert run(write(rows), "nifti", tmp_path / "x", code=1) == ["body.nii.polyp.nii.gz"]
    volume = np.asarray(nib.load(tmp_path / "x" / "body.nii.polyp.nii.gz").dataobj)
    np.testing.assert_array_equal(volume[..., 2:], expected["polyp"][..., 2:, 0])
    assert not volume[..., 1].any()
    assert [bool(line["error"]) for line in index(tmp_path / "x")].count(True) == 1
    assert "1 of 4 slices have no mask of 'polyp'" in caplog.text


LABEL_DAMAGES = [
    *({"label_map": content} for content in (None, b"no", png(np.zeros((4, 5, 3), np.uint8)))),
    *({"prompt": prompt} for prompt in ("polyp", "3")),
]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("damage", LABEL_DAMAGES, ids=str)
def test_a_damaged_label_map_costs_only_itself(tmp_path, write, kind, damage):  # noqa: F811
    paths = save(tmp_path / "in", *slices(0, 3, 6))
    rows = [label_row(path, np.full((4, 5), n, np.uint8), ["a", "b"]) for n, path in enumerate(paths)]
    rows[1] |= damage
    if kind == "nifti" and "prompt" in damage:
        return  # a volume needs no names of classes
    words = ("--filter", "kind == labels") if kind == "nifti" else ()  # the others take label maps by themselves
    run(write(rows), kind, tmp_path / "x", *words, code=1)
    assert [line[0] for line in lines_of(tmp_path / "x") if line[4]] == ["1.dcm"]
    assert [line[0] for line in lines_of(tmp_path / "x") if line[3]] == ["0.dcm", "2.dcm"]


@pytest.mark.parametrize("kind", FORMATS)
def test_failed_rows_of_the_run_are_no_rows_of_an_export(tmp_path, write, kind):  # noqa: F811
    (path,) = save(tmp_path / "in", make())
    good = row(path, checkers((4, 5)))
    failed = row(tmp_path / "gone.dcm", checkers((4, 5)), status="failed", mask_rle=None, area_px=None)
    run(write([failed, good, failed]), kind, tmp_path / "x")
    assert [line[0] for line in lines_of(tmp_path / "x")] == ["0.dcm"]


@pytest.mark.parametrize("kind", DICOM_FORMATS)
def test_unreadable_sources_cost_only_their_rows(tmp_path, write, kind, caplog):  # noqa: F811
    paths = save(tmp_path / "in", *slices(0, 3, 6, 9))
    rows = [row(path, checkers((4, 5)), prompt) for path in paths for prompt in ("polyp", "fold")]
    paths[0].unlink()
    paths[1].write_bytes(b"")
    paths[2].write_bytes(paths[2].read_bytes()[:400])
    run(write(rows), kind, tmp_path / "x", code=1)
    assert [line[0] for line in lines_of(tmp_path / "x") if line[4]] == [f"{n}.dcm" for n in (0, 0, 1, 1, 2, 2)]
    assert [line[:2] for line in lines_of(tmp_path / "x") if line[3]] == [("3.dcm", "polyp"), ("3.dcm", "fold")]
    assert "6 rows could not be exported" in caplog.text
    assert SECRET not in caplog.text + (tmp_path / "x" / "index.csv").read_text()


# --- series whose slices come later


@pytest.mark.parametrize("bad", [(), (0,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_a_series_that_comes_again_is_whole_and_its_index_is_true(tmp_path, write, bad):  # noqa: F811
    first, other, second, third = slices(0, 0, 3, 6)
    other.SeriesInstanceUID = "1.9"
    paths = save(tmp_path / "in", first, other, second, third)
    masks = [checkers((4, 5), n) for n in range(4)]
    rows = [row(path, mask) for path, mask in zip(paths, masks, strict=True)]
    for number in bad:
        rows[number]["mask_rle"] = "PP"
    names = run(write(rows), "dicom-seg-series", tmp_path / "x", code=1 if bad else 0)
    (name,) = (one for one in names if one.startswith("1.2.3.4."))
    lines = lines_of(tmp_path / "x")
    assert sorted(line[0] for line in lines) == [f"{n}.dcm" for n in range(4)]
    assert sorted(line[0] for line in lines if line[4]) == [f"{n}.dcm" for n in bad]
    in_series = [n for n in (0, 2, 3) if n not in bad]
    assert sorted(line[0] for line in lines if line[3] == name) == [f"{n}.dcm" for n in in_series]
    found = segments_of(tmp_path / "x" / name)
    uids = [dataset.SOPInstanceUID for dataset in (first, other, second, third)]
    assert set(found) == {("polyp", uids[n]) for n in in_series}
    for n in in_series:
        np.testing.assert_array_equal(found["polyp", uids[n]], masks[n])


def test_a_series_that_grows_too_large_keeps_its_first_slices(tmp_path, write, monkeypatch):  # noqa: F811
    first, other, second = slices(0, 0, 3)
    other.SeriesInstanceUID = "1.9"
    rows = [row(path, checkers((4, 5))) for path in save(tmp_path / "in", first, other, second)]
    monkeypatch.setattr(dicom_masks, "MAX_EXPORT_BYTES", 20)
    names = run(write(rows), "dicom-seg-series", tmp_path / "x", code=1)
    assert len(names) == 2
    assert [(line[0], line[4]) for line in lines_of(tmp_path / "x")] == [
        ("0.dcm", ""),
        ("1.dcm", ""),
        ("2.dcm", "too_large"),
    ]
    (name,) = (one for one in names if one.startswith("1.2.3.4."))
    assert set(segments_of(tmp_path / "x" / name)) == {("polyp", "1.2.1")}


@pytest.mark.parametrize("is_apart", [False, True])
def test_the_first_file_of_several_with_one_uid_is_used(tmp_path, write, caplog, is_apart):  # noqa: F811
    first, other = slices(0, 3)
    other.SeriesInstanceUID = "1.9"
    paths = save(tmp_path / "in", *([first, other, first, first] if is_apart else [first, first, first, other]))
    masks = [checkers((4, 5), n) for n in range(4)]
    names = run(write([row(*pair) for pair in zip(paths, masks, strict=True)]), "dicom-seg-series", tmp_path / "x")
    (name,) = (one for one in names if one.startswith("1.2.3.4."))
    np.testing.assert_array_equal(segments_of(tmp_path / "x" / name)["polyp", "1.2.1"], masks[0])
    assert "an earlier file has the same SOP Instance UID: 2 masks" in caplog.text
    assert [line[0] for line in lines_of(tmp_path / "x") if line[3] == name] == ["0.dcm"]


def test_masks_of_members_are_segments_of_their_own(tmp_path, write):  # noqa: F811
    (path,) = save(tmp_path / "in", make())
    masks = {kind: checkers((4, 5), n) for n, kind in enumerate(["mask", "member 1", "member 2"])}
    rows = [row(path, mask, kind=kind) for kind, mask in masks.items()]
    (name,) = run(write(rows), "dicom-seg", tmp_path / "x", "--filter", "kind != labels")
    found = segments_of(tmp_path / "x" / name)
    names = {"mask": "polyp", "member 1": "polyp (member 1)", "member 2": "polyp (member 2)"}
    assert {label for label, _ in found} == set(names.values())
    for kind, mask in masks.items():
        np.testing.assert_array_equal(found[names[kind], "1.2.3.4.5"], mask)


# --- the format of a source


def content_of(dataset):
    sink = io.BytesIO()
    dataset.save_as(sink, enforce_file_format=True)
    return sink.getvalue()


def pack(path, members):
    """Write files below a folder, or into a zip or tar. Return (URI, selector) of each."""
    if not path.suffix:
        for member, content in members.items():
            (path / member).parent.mkdir(parents=True)
            (path / member).write_bytes(content)
        return [(path / member, None) for member in members]
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return [(path, member) for member in members]


@pytest.mark.parametrize("name", ["x.png", "x.JPG", "x.tif", "x.nii", "x.nii.gz", "x.bmp", "x", "x.001"])
@pytest.mark.parametrize("where", ["in", "in.zip", "in.tar", "in.tgz"])
def test_a_source_is_dicom_by_its_content(tmp_path, write, name, where, caplog):  # noqa: F811
    members = {f"a/{name}": content_of(make()), "b/y.png": png(np.zeros((4, 5), np.uint8))}
    places = pack(tmp_path / where, members)
    rows = [row(uri, checkers((4, 5)), selector=selector, image_id=str(n)) for n, (uri, selector) in enumerate(places)]
    assert run(write(rows), "dicom-seg", tmp_path / "x") == ["0.seg.dcm"]
    assert [line[0] for line in lines_of(tmp_path / "x")] == ["0"]
    assert "the image is not DICOM: 1 mask" in caplog.text


def test_other_sources_are_not_read_whole(tmp_path, write, caplog):  # noqa: F811
    """The values of a pair, and the rest of a large file, are not there at all."""
    (tmp_path / "v.hdr").write_bytes(save_pair("analyze", BODY.astype(np.int16), None)[0])
    (tmp_path / "v.mhd").write_text("ObjectType = Image\nElementDataFile = v.raw\n")
    (tmp_path / "v.tif").write_bytes(b"II*\0" + bytes(200))
    with (tmp_path / "v.nrrd").open("wb") as file:
        file.write(b"NRRD0004\n")
        file.truncate(1 << 33)  # larger than max_image_bytes
    rows = [row(tmp_path / f"v.{end}", checkers((4, 5)), selector="slice=0") for end in ("hdr", "mhd", "tif", "nrrd")]
    assert run(write(rows), "dicom-seg", tmp_path / "x") == []
    assert "the image is not DICOM: 4 mask" in caplog.text


def test_a_tiny_file_of_another_format_is_no_dicom(tmp_path, write, caplog):  # noqa: F811
    (tmp_path / "x.bmp").write_bytes(b"BM1")
    (tmp_path / "y.dcm").write_bytes(b"BM1")
    rows = [row(tmp_path / name, checkers((4, 5))) for name in ("x.bmp", "y.dcm")]
    assert run(write(rows), "dicom-seg", tmp_path / "x") == []
    assert "the image is not DICOM: 2 mask" in caplog.text


def test_dicom_in_parquet_has_a_segmentation(tmp_path, write):  # noqa: F811
    images = [content_of(make()), png(np.zeros((4, 5), np.uint8))]
    pq.write_table(pa.table({"image": [{"bytes": one, "path": None} for one in images]}), tmp_path / "i.parquet")
    rows = [row(tmp_path / "i.parquet", checkers((4, 5)), selector=f"row={n}") for n in range(2)]
    assert run(write(rows), "dicom-seg", tmp_path / "x") == ["i.parquet#row=0.seg.dcm"]


# --- limits, folders


def test_the_limit_of_a_volume_counts_bytes(tmp_path, write, monkeypatch):  # noqa: F811
    path = tmp_path / "body.nii"
    path.write_bytes(save_nifti(BODY))
    masks, _ = slice_rows(path, "axial")
    shape = masks[0]["height"], masks[0]["width"]
    labels = [
        label_row(path, np.full(shape, 3, np.uint16), [f"c{n}" for n in range(count)], selector=f"slice={number}")
        for count in (255, 256)
        for number in range(4)
    ]
    monkeypatch.setattr(volumes, "MAX_EXPORT_BYTES", BODY.size)
    for one in labels[:4]:
        one["label_map"] = png(np.full(shape, 3, np.uint8))
    names = run(write([*masks, *labels]), "nifti", tmp_path / "x", "--filter", "kind != null", code=1)
    assert len(names) == 2
    assert [line["error"].split(":")[0] for line in index(tmp_path / "x")] == [""] * 8 + ["too_large"] * 4
    monkeypatch.setattr(volumes, "MAX_EXPORT_BYTES", 2 * BODY.size)
    names = run(write([*masks, *labels]), "nifti", tmp_path / "y", "--filter", "kind != null")
    assert {nib.load(tmp_path / "y" / name).get_data_dtype() for name in names} == {np.dtype("u1"), np.dtype("<u2")}
