import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlsm.archive.archive import open_archive
from vlsm.errors import ConfigError, ManifestError


def ids(uri, **options):
    return [row["image_id"] for row in open_archive(str(uri), ("p",), **options).rows]


@pytest.fixture
def tree(tmp_path):
    names = [
        "b.jpg",
        "a.PNG",
        "sub/b.jpg",
        "sub/deep/c.tiff",
        "notes.txt",
        "README",
        "._b.jpg",
        "d [1] 100% ü::x#?.jpg",
    ]
    for name in names:
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "tree"


def test_a_folder_is_listed_whole_and_in_order(tree):
    assert ids(tree) == ["a.PNG", "b.jpg", "d [1] 100% ü::x#?.jpg", "sub/b.jpg", "sub/deep/c.tiff"]


def test_rows_say_where_and_how_large_and_how_new(tree):
    row = next(iter(open_archive(str(tree), ("p", "q")).rows))
    assert row["image_uri"] == str(tree / "a.PNG")
    assert (row["size_bytes"], row["prompts"]) == (1, ["p", "q"])
    assert row["mtime"].timestamp() == pytest.approx((tree / "a.PNG").stat().st_mtime, abs=1e-3)


def test_what_is_passed_over_is_counted_by_extension(tree):
    archive = open_archive(str(tree), ("p",))
    list(archive.rows)
    assert archive.skipped == {".txt": 1, "no extension": 1, ".jpg": 1}


def test_an_output_folder_inside_the_archive_is_no_input(tree):
    assert "sub/b.jpg" not in ids(tree, exclude=str(tree / "sub"))


def test_a_glob_keeps_ids_relative_to_its_plain_part(tree):
    assert ids(f"{tree}/**/*.jpg") == ["b.jpg", "d [1] 100% ü::x#?.jpg", "sub/b.jpg"]
    assert ids(f"{tree}/s*b/*.jpg") == ["sub/b.jpg"]


def test_a_folder_with_brackets_in_its_name_is_a_folder(tmp_path):
    (tmp_path / "scan [7]").mkdir()
    (tmp_path / "scan [7]" / "a.png").write_bytes(b"x")
    assert ids(tmp_path / "scan [7]") == ["a.png"]


def test_one_image_is_an_archive(tree):
    assert ids(tree / "b.jpg") == ["b.jpg"]


def test_nothing_there_is_said_with_its_name(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        open_archive(str(tmp_path / "nowhere"), ("p",))


def write_parquet(path, records):
    pq.write_table(pa.Table.from_pylist(records), path)


def write_jsonl(path, records):
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n")


@pytest.mark.parametrize(("name", "write"), [("m.parquet", write_parquet), ("m.jsonl", write_jsonl)])
def test_manifests_give_ids_places_and_prompts(tmp_path, name, write):
    elsewhere = f"{tmp_path.parent}/y.png"
    records = [
        {"image_uri": "images/x.png", "image_id": "007", "prompts": ["a", "b", "a"]},
        {"image_uri": elsewhere, "image_id": None, "prompts": None},
        {"image_uri": "s3://bucket/k%20 z.png", "image_id": "z", "prompts": ["c"]},
    ]
    write(tmp_path / name, records)
    rows = list(open_archive(str(tmp_path / name), ("default",)).rows)
    assert [row["image_id"] for row in rows] == ["007", elsewhere, "z"]
    assert [row["image_uri"] for row in rows] == [f"{tmp_path}/images/x.png", elsewhere, "s3://bucket/k%20 z.png"]
    assert [row["prompts"] for row in rows] == [["a", "b"], ["default"], ["c"]]


def test_a_csv_is_text_all_through(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text(
        'image_uri,image_id,prompt\nx.png,007,"a, b"\ny.png,,\n"two\nlines.png",NA,NA\n', encoding="utf-8-sig"
    )
    rows = list(open_archive(str(path), ("default",)).rows)
    assert [row["image_id"] for row in rows] == ["007", "y.png", "NA"]
    assert [row["prompts"] for row in rows] == [["a, b"], ["default"], ["NA"]]
    assert rows[2]["image_uri"] == f"{tmp_path}/two\nlines.png"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "bild,prompt\nx.png,a\n", "needs image_uri"),
        ("m.csv", "", "needs image_uri"),
        ("m.csv", "image_uri,prompt\n\nx.png\n,a\n", "image_uri is None"),
        ("m.jsonl", '{"image_uri": 3}\n', "image_uri is 3"),
        ("m.jsonl", '{"image_uri": "x.png"\n', "line 1 is not JSON"),
        ("m.jsonl", "[1]\n", "is an object"),
        ("m.jsonl", '{"image_uri": "x.png", "prompts": []}\n', "prompts are []"),
        ("m.jsonl", '{"image_uri": "x.png", "prompts": [1]}\n', "prompts are [1]"),
        ("m.parquet", "no parquet", "cannot be read as a manifest"),
    ],
)
def test_a_wrong_manifest_is_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ManifestError) as caught:
        list(open_archive(str(tmp_path / name), ("p",)).rows)
    assert message in str(caught.value)
    assert name in str(caught.value)


def test_links_to_files_are_files_and_links_to_folders_are_told(tree):
    (tree / "link.jpg").symlink_to(tree / "sub" / "b.jpg")
    (tree / "lost.jpg").symlink_to(tree / "nowhere.jpg")
    (tree / "loop").symlink_to(tree)
    archive = open_archive(str(tree), ("p",))
    rows = {row["image_id"]: row for row in archive.rows}
    assert rows["link.jpg"]["size_bytes"] == 1
    assert rows["lost.jpg"]["size_bytes"] is None
    assert archive.skipped["of type link"] == 1
    found = {row["image_id"]: row for row in open_archive(f"{tree}/l*.jpg", ("p",)).rows}
    assert found == {name: rows[name] for name in ("link.jpg", "lost.jpg")}


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_listing_that_was_broken_off_goes_on_behind_any_file(tree, s3_folder, place):
    for name in ("sub-b/x.jpg", "sub b/x.jpg", "sub/deep/b.jpg", "sub.jpg"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_bytes(b"x")
    if place == "s3":
        import s3fs

        s3fs.S3FileSystem().put(f"{tree}/", f"{s3_folder}/in/", recursive=True)
    uri = str(tree) if place == "disk" else f"{s3_folder}/in"
    rows = list(open_archive(uri, ("p",)).rows)
    assert len({row["image_id"] for row in rows}) == len(rows) == 9
    for number, row in enumerate(rows):
        rest = [row["image_id"] for row in open_archive(uri, ("p",), after=(row["image_uri"], row["selector"])).rows]
        assert rest == [row["image_id"] for row in rows[number + 1 :]]
