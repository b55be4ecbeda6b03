"""Images, names and manifests that nobody should have made: errors of our own, and nothing outside its folder."""

import csv
import datetime
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlsm import storage
from vlsm.archive.archive import open_archive
from vlsm.archive.carried import Carry
from vlsm.cells import read_cell
from vlsm.errors import ImageError, ManifestError
from vlsm.export import export_masks
from vlsm.images.decode import decode_image
from vlsm.images.fetch import read_image_bytes
from vlsm.runs.carried import RESERVED
from vlsm.runs.plan import shard_table
from vlsm.runs.results import write_part
from vlsm.segmentation.masks import encode_mask

many = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4)), max_size=6)


def encode(kind):
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (24, 31, 3), dtype=np.uint8))
    sink = io.BytesIO()
    options = {
        "TIFF": {"compression": "tiff_lzw"},
        "JPEG": {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6"},
    }
    picture.save(sink, kind, **options.get(kind, {}))
    return sink.getvalue()


def mutate(data, changes, end):
    """Some bytes overwritten, and the rest cut off."""
    mutated = bytearray(data)
    for place, content in changes:
        start = int(place * len(mutated))
        mutated[start : start + len(content)] = content
    return bytes(mutated[: max(1, int(end * len(mutated)))])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
@many
@given(changes=edits, end=st.one_of(st.just(1.0), st.floats(0, 1)))
@pytest.mark.filterwarnings("ignore")  # Pillow's, about what it makes of them
def test_mutated_images_are_pictures_or_errors_of_ours(kind, changes, end):
    try:
        image = decode_image(mutate(encode(kind), changes, end), "x", max_pixels=1_000_000)
    except ImageError as error:
        assert error.reason in ("corrupt", "too_large", "unreadable")
    else:
        assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)


def write_manifest(path, kind):
    frame = pd.DataFrame({"image_uri": [f"a/{n}.png" for n in range(20)], "image_id": [f"case {n}" for n in range(20)]})
    frame["prompts"] = [["polyp", "flat"]] * 20
    frame = frame.assign(patient=[f"00{n}" for n in range(20)], age=range(20), dose=0.5, ok=True, status="é")
    if kind == "csv":
        frame.drop(columns="prompts").assign(prompt="polyp").to_csv(path, index=False)
    elif kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.assign(born=pd.Timestamp("2020-01-02"), day=datetime.date(2020, 1, 2)).to_parquet(path)
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@many
@given(changes=edits, end=st.one_of(st.just(1.0), st.floats(0, 1)))
def test_mutated_manifests_are_rows_or_errors_of_ours(kind, changes, end, tmp_path):
    path = tmp_path / f"list.{kind}"
    original = tmp_path / f"original.{kind}"
    data = original.read_bytes() if original.exists() else write_manifest(original, kind)
    path.write_bytes(mutate(data, changes, end))
    try:
        archive = open_archive(str(path), ("polyp",), carry=Carry("all", RESERVED))
        rows = list(archive.rows)
    except ManifestError as error:
        assert str(path) in str(error) and len(str(error)) < 2500
    else:
        assert shard_table(rows, archive.carried and archive.carried.type).num_rows == len(rows)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image_uri": 5}, "image_uri is 5"),
        ({"image_uri": ["a.png"]}, "it must name an image"),
        ({"image_uri": "a.png", "prompts": 3}, "prompts are 3"),
        ({"image_uri": "a.png", "prompts": []}, "prompts are []"),
        ({"image_uri": "a.png", "prompts": {"a": 1}}, "prompts are"),
        ({"image_uri": "a.png", "prompts": "x" * 10_000_000}, "a text of 10,000,000 bytes; 8,192 are the most: 'xxxx"),
        ({"image_uri": "y" * 10_000_000}, "a text of 10,000,000 bytes"),
        ({"image_uri": "a.png", "image_id": "\ud800"}, "is no Unicode text"),
        ({"image_uri": "what://a.png"}, "'what://a.png' is no location that is known here"),
    ],
)
def test_a_row_that_is_none_is_named_and_the_message_stays_short(tmp_path, row, message):
    (tmp_path / "list.jsonl").write_text(json.dumps(row))
    with pytest.raises(ManifestError) as caught:
        list(open_archive(str(tmp_path / "list.jsonl"), ("polyp",)).rows)
    assert "list.jsonl, row 1" in str(caught.value) and message in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_times_and_sizes_that_are_none_tell_versions_at_most(tmp_path):
    rows = [{"image_uri": "a.png", "mtime": value, "size_bytes": value} for value in (10**30, "noon", True, -1, [1])]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = list(open_archive(str(tmp_path / "list.jsonl"), ("polyp",)).rows)
    assert [(row["size_bytes"], row["mtime"]) for row in found[:2]] == [(None, None)] * 2
    assert found[1]["image_version"] == "'noon'"  # when it is another text, the file is another
    assert shard_table(found).num_rows == 5


@pytest.mark.parametrize(
    "place", ["file:///etc/passwd", "/etc/passwd", "s3://images-of-others/a.png", "http://x/a.png"]
)
def test_a_manifest_in_a_store_leads_nowhere_else_unless_that_is_allowed(s3_folder, place):
    uri = f"{s3_folder}/list.csv"
    storage.write_bytes(uri, f"image_uri\na.png\n{s3_folder}/b.png\n{place}\n".encode())
    with pytest.raises(ManifestError, match=r"row 3: image_uri .* lies outside of s3://images/; --set 'run.allow="):
        list(open_archive(uri, ("polyp",)).rows)
    allowed = place.rpartition("/")[0]
    rows = list(open_archive(uri, ("polyp",), allow=(allowed,)).rows)
    assert [row["image_uri"] for row in rows] == [f"{s3_folder}/a.png", f"{s3_folder}/b.png", place]


@pytest.mark.parametrize(
    "upwards",
    ["public/../private.png", "file://public/../private.png", "s3://images/../x.png"],
    ids=["path", "file", "s3"],  # prefixes of the store have these names
)
def test_what_is_allowed_is_not_left_upwards(s3_folder, tmp_path, upwards):
    uri, place = f"{s3_folder}/list.csv", upwards.replace("public", f"{tmp_path}/public")
    storage.write_bytes(uri, f"image_uri\n{place}\n".encode())
    with pytest.raises(ManifestError, match=r"row 1: image_uri .* leads upwards"):
        list(open_archive(uri, ("polyp",), allow=(f"{tmp_path}/public", f"file://{tmp_path}/public")).rows)


@pytest.mark.parametrize(
    "uri",
    ["a\0b.png", "s3://images/a\0b.png", "s3://images/../../etc/passwd", "s3://A B/x.png", "github://a/b.png"]
    + ["reference://x/a.png", "data:image/png,x", "zip://a.png", "gs://bucket/a.png"],
)
def test_names_that_no_disk_or_store_can_have_are_errors_of_ours(s3_server, uri):
    with pytest.raises(ImageError) as caught:
        read_image_bytes(uri, 10, 1000, patience_s=0.1)
    assert "\n" not in str(caught.value) and "\0" not in str(caught.value)


def test_a_name_cannot_write_a_line_into_the_log():
    error = ImageError("missing", "there is no file x/a\n12:00:00 all is well\x1b[2J")
    assert str(error) == r"missing: there is no file x/a\n12:00:00 all is well\x1b[2J"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60), unique=True, max_size=8)
)
def test_exports_never_leave_their_folder_and_never_collide(names, tmp_path):
    names += ["../../outside", "/etc/passwd", "a/../../b", "..", "a\nb", "a\0b", "CON", ".", "a//b", "a/b"]
    names = list(dict.fromkeys(names))
    place = tmp_path / "place"
    shutil.rmtree(place, ignore_errors=True)
    rows = [
        {
            "image_id": name,
            "image_uri": "x",
            "prompt": prompt,
            "kind": "mask",
            "model": "m",
            "status": "ok",
            "height": 2,
            "width": 2,
        }
        | {"mask_rle": encode_mask(np.ones((2, 2), np.uint8))}
        for name in names
        for prompt in ("polyp", "../p")
    ]
    write_part(str(place / "run"), 0, rows, "run", 0)
    assert export_masks(str(place / "run"), place / "pngs") == len(rows)
    files = {path for path in place.rglob("*") if path.is_file()}
    with (place / "pngs" / "index.csv").open(encoding="utf-8", newline="") as file:
        index = {
            place / "pngs" / read_cell(line["file"]): (read_cell(line["image_id"]), read_cell(line["prompt"]))
            for line in csv.DictReader(file)
        }
    assert list(index.values()) == [(row["image_id"], row["prompt"]) for row in rows]
    assert files == {*index, place / "pngs" / "index.csv", place / "run" / "masks" / "part-00000000.parquet"}
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["place"]


@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_hides_neither_the_picture_nor_which_way_is_up():
    """Every byte of it overwritten, one at a time."""
    picture = Image.fromarray(np.zeros((24, 31, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x9003] = 6, "maker", "2026:01:01 00:00:00"
    sink = io.BytesIO()
    picture.save(sink, "JPEG", exif=exif)
    data = sink.getvalue()
    start, shapes = data.index(b"Exif"), []
    for place in range(start, start + len(exif.tobytes())):
        for value in (0, 1, 255):
            shapes.append(decode_image(data[:place] + bytes([value]) + data[place + 1 :], "x").shape[:2])
    assert set(shapes) == {(24, 31), (31, 24)}
    assert shapes.count((31, 24)) > len(shapes) / 2
