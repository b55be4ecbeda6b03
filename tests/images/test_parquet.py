"""Images inside Parquet files, as hubs of datasets, img2dataset, Spark and pandas write them."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.images.test_containers import dicom, nifti, pages, png, read, rows
from vlsm import storage
from vlsm.archive.archive import open_archive
from vlsm.config import SegmentSettings, TileSettings
from vlsm.errors import ImageError, ManifestError
from vlsm.export.origins import source_of
from vlsm.images.formats import Look
from vlsm.images.parquet import ParquetImages
from vlsm.images.reader import Reader, open_images

STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def write(file, group=2, /, **columns):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file, row_group_size=group)
    return file


def cells(*pairs, kind=STRUCT):
    return pa.array([pair and {"bytes": pair[0], "path": pair[1]} for pair in pairs], kind)


def found(path, **columns):
    """Each image's selector, prompts and the value of its pixels, read as rows of the results are."""
    settings = {"columns": columns} if columns else {}
    return [
        (
            row["selector"],
            row["prompts"],
            read({"image_uri": row["image_uri"], "selector": row["selector"]}, **settings),
        )
        for row in open_archive(str(path), ("default",), look=Look(columns=columns)).rows
    ]


HUB = [cells(*((png(n), f"{n}.png") for n in range(1, 6))), cells(*((png(n), None) for n in range(1, 6)))]
LARGE = pa.struct({"path": pa.large_string(), "bytes": pa.large_binary()})


@pytest.mark.parametrize(
    "columns",
    [
        {"image": HUB[0], "label": [0, 1, 2, 3, 4]},
        {"image": HUB[1]},
        {"id": list("abcde"), "picture": HUB[0]},
        {"image": HUB[0], "mask": HUB[1]},
        {"image": cells(*((png(n), "x") for n in range(1, 6)), kind=LARGE)},
        {"image": pa.array([{"bytes": png(n)} for n in range(1, 6)])},
        {
            "key": list("01234"),
            "url": ["http://x/a.gif"] * 5,
            "caption": ["c"] * 5,
            "jpg": [png(n) for n in range(1, 6)],
        },
        {"path": [f"s3://b/{n}.png" for n in range(5)], "length": [9] * 5, "content": [png(n) for n in range(1, 6)]},
        {"image": pa.array([png(n) for n in range(1, 6)]).dictionary_encode()},
        {"image.bytes": ["x"] * 5, "image.path": ["y.tif"] * 5, "image": HUB[0]},
        {
            "image": pa.array([png(n) for n in range(1, 6)], pa.large_binary()),
            "hash": [b"1"] * 5,
            "path": list(range(5)),
        },
    ],
    ids="hub,no path,other name,and mask,large,no path field,img2dataset,spark,dictionary,flat,pandas".split(","),
)
def test_the_images_of_a_parquet_file_are_its_rows(tmp_path, columns):
    path = write(tmp_path / "x.parquet", **columns)
    archive = open_archive(str(path), ("p",))
    assert [row["image_id"] for row in archive.rows] == [f"x.parquet#row={n}" for n in range(5)]
    assert archive.is_listed
    assert found(path) == [(f"row={n}", ["default"], n + 1) for n in range(5)]


def test_the_rows_state_their_prompts_and_ids_as_a_list_does(tmp_path):
    columns = {"prompt": ["a", "nan", "['b', 'c']", None, "d"], "image_id": ["7", None, "9", "10", "11"]}
    path = write(tmp_path / "prompt=z" / "x.parquet", image=HUB[0], **columns)
    assert [row["image_id"] for row in rows(path)[0]] == ["7", "x.parquet#row=1", "9", "10", "11"]
    prompts = [["a"], ["default"], ["b", "c"], ["default"], ["d"]]
    assert [row[1] for row in found(path)] == prompts
    bare = write(path.parent / "y.parquet", image=HUB[0], caption=list("abcde"))
    assert [row[1] for row in found(bare)] == [["z"]] * 5  # the folder's, as Hive means it
    assert [row[1] for row in found(bare, prompt="caption")] == [["a"], ["b"], ["c"], ["d"], ["e"]]
    with pytest.raises(ManifestError, match=r"columns\.prompt is 'text'; .*y\.parquet has no such column"):
        found(bare, prompt="text")
    wrong = write(tmp_path / "w.parquet", image=HUB[0], prompt=["a", "b", "[c]", "d", "e"])
    with pytest.raises(ManifestError, match=r"w\.parquet, row 2: the prompt '\[c\]' looks like a list"):
        found(wrong)


def test_rows_with_several_images_are_all_of_them(tmp_path):
    files = [(pages(1, 2), "a.tif"), (png(3), "b"), (dicom(4, 5), "c.dcm"), (nifti(6, 7), "d.nii"), (png(8), "e.png")]
    path = write(tmp_path / "x.parquet", image=cells(*files), image_id=list("abcde"))
    selectors = ["row=0#page=0", "row=0#page=1", "row=1", "row=2#frame=0", "row=2#frame=1", "row=3#slice=0"]
    assert found(path) == [
        (selector, ["default"], value)
        for selector, value in zip([*selectors, "row=3#slice=1", "row=4"], range(1, 9), strict=True)
    ]
    assert [row["image_id"] for row in rows(path)[0]][:3] == ["a#page=0", "a#page=1", "b"]
    source, frame = source_of({"image_uri": str(path), "selector": "row=3#slice=1"})
    reader = Reader(SegmentSettings(input="", output="", members=[{"checkpoint": ""}]))
    assert (source.read(reader), frame) == (files[3][0], "slice=1")


def test_bytes_whose_name_states_no_format_are_one_image_or_refused(tmp_path):
    files = [(pages(1), None), (dicom(2), ""), (pages(1, 2), None), (dicom(1, 2), "IM1"), (b"no image", None)]
    path = write(tmp_path / "x.parquet", image=cells(*files))
    assert [value for *_, value in found(path)] == [1, 2, "unreadable", "unreadable", "corrupt"]


def test_a_row_without_bytes_fails_alone(tmp_path):
    path = write(
        tmp_path / "x.parquet", image=cells((png(1), "a.png"), None, (None, "b.png"), (b"", None), (png(5), ""))
    )
    assert [value for *_, value in found(path)] == [1, "empty", "empty", "empty", 5]
    row = {"image_uri": str(path), "selector": "row=5"}
    assert read(row) == "missing" and read(row | {"selector": "a.png"}) == "missing"
    assert read(row | {"selector": "row=0"}, max_image_bytes=50) == "too_large"


def test_a_row_that_only_refers_to_its_image_says_so(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    only_paths = pa.array([{"bytes": None, "path": f"{tmp_path}/a.png"}])
    for number, column in enumerate((only_paths, only_paths.cast(STRUCT))):
        (row,) = rows(write(tmp_path / f"{number}.parquet", image=column))[0]
        with pytest.raises(ImageError, match=r"no bytes in the column image, only the path '.*a\.png'; a list with"):
            Reader(SegmentSettings(input="", output="", members=[{"checkpoint": ""}])).open(row)


def test_which_of_several_columns_holds_the_images(tmp_path, caplog):
    path = write(tmp_path / "x.parquet", before=HUB[0], after=HUB[1], hash=[png(9)] * 5)
    with pytest.raises(ManifestError, match=r"in the columns before, after; --set columns\.image=before chooses one"):
        found(path)
    assert [value for *_, value in found(path, image="after")] == [1, 2, 3, 4, 5]
    assert {value for *_, value in found(path, image="hash")} == {9}
    with pytest.raises(ManifestError, match=r"columns\.image is 'x'; the columns with bytes are: before, after, hash"):
        found(path, image="x")
    with pytest.raises(ManifestError, match=r"columns\.image_uri is 'uri', but .* has the columns before, after, hash"):
        found(path, image_uri="uri")
    path = write(tmp_path / "y.parquet", image_uri=["a.png"], thumbnail=[png(1)], image=cells((png(2), None)))
    assert [row["image_uri"] for row in rows(path)[0]] == [f"{tmp_path}/a.png"]  # a list; unless the setting says so
    assert found(path, image="image") == [("row=0", ["default"], 2)]
    write(path, image=HUB[0], mask=HUB[1])
    rows(path)
    assert [record.getMessage() for record in caplog.records][-2:] == [
        f"{path} is read as a list of image_uri; --set columns.image=image reads the images there",
        f"{path} is read for the images in image; --set columns.image=mask reads the images there",
    ]


def test_mutated_files_are_images_or_errors_of_ours(tmp_path):
    path = tmp_path / "x.parquet"
    original = write(path, image=cells(*((png(n), f"{n}.png") for n in range(5))), prompt=list("abcde")).read_bytes()
    generator = np.random.default_rng(5)
    for _ in range(60):
        data = np.frombuffer(original, np.uint8).copy()
        places = generator.integers(0, len(data), generator.choice([1, 3, 9]))
        data[places] = generator.integers(0, 256, len(places))
        path.write_bytes(data.tobytes()[: generator.choice([len(data), len(data), len(data) - 9])])
        try:
            assert 1 <= len(found(path)) <= 5
        except ManifestError as error:
            assert str(path) in str(error)


def test_a_parquet_file_without_images_in_a_folder_is_skipped(tmp_path):
    write(tmp_path / "in" / "0.parquet", url=["a"], key=["0"], label_map=[png(1)], embedding=[b"123"])
    write(tmp_path / "in" / "1.parquet", image=HUB[0])
    (tmp_path / "in" / "a.png").write_bytes(png(7))
    (tmp_path / "in" / "2.parquet").write_bytes(b"PAR1 no")
    listed, skipped = rows(tmp_path / "in")
    assert [row["image_id"] for row in listed] == [*(f"1.parquet#row={n}" for n in range(5)), "2.parquet", "a.png"]
    assert skipped == {".parquet without images": 1}
    assert read(listed[5]) == "corrupt"


def test_a_folder_of_parquet_files_with_images_is_an_archive_that_goes_on_after_any_row(tmp_path):
    for name in ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"):
        write(tmp_path / "hub" / name, image=HUB[0])
    (tmp_path / "hub" / "README.md").write_text("x")
    everything = [row["image_id"] for row in rows(tmp_path / "hub")[0]]
    assert everything[4:6] == ["data/train-00000-of-00002.parquet#row=4", "data/train-00001-of-00002.parquet#row=0"]
    for count, row in enumerate(rows(tmp_path / "hub")[0], start=1):
        after = row["image_uri"], row["selector"]
        assert [row["image_id"] for row in rows(tmp_path / "hub", after=after)[0]] == everything[count:]


def test_windows_are_counted_from_the_headers(tmp_path):
    path = write(tmp_path / "x.parquet", image=cells((png(1, (8, 12)), None), (png(1, (30, 40)), "a"), (b"no", None)))
    look = Look(tile=TileSettings(size=16, overlap=0))
    assert [row["num_windows"] for row in rows(path, look=look)[0]] == [1, 6, 1]
    assert [row["problem"] is None for row in rows(path, look=look)[0]] == [True, True, False]


class Counted(io.BytesIO):
    num_bytes = 0

    def read(self, *size):
        data = super().read(*size)
        self.num_bytes += len(data)
        return data


@pytest.mark.parametrize("group", [4, 100])
def test_only_what_is_needed_is_read(group):
    """A row group where it is small; in a large one, not more than the rows up to the wanted one."""
    noise = np.random.default_rng(0)
    values = [noise.bytes(100_000) for _ in range(100)]
    file = Counted()
    table = pa.table({"image": cells(*((value, None) for value in values))})
    pq.write_table(
        table,
        file,
        row_group_size=group,
        use_dictionary=False,
        compression="none",
        data_page_size=100_000,
        write_batch_size=1,
    )
    file.num_bytes = 0
    images = ParquetImages(file)
    assert list(images.read_cells([])) == [(None, ())] * 100
    assert images.read(9, "x") == (values[9], None)
    assert file.num_bytes < 3_000_000
    for row in (8, 10, 11, 40, 0, 99, 39):
        assert images.read(row, "x")[0] == values[row]


def test_damage_costs_the_rows_that_it_touches(tmp_path):
    path = write(tmp_path / "x.parquet", image=cells(*((png(n), f"{n}.png") for n in range(1, 6))))
    data = bytearray(path.read_bytes())
    begin = pq.read_metadata(path).row_group(1).column(0).dictionary_page_offset
    data[begin : begin + 60] = b"\xff" * 60
    path.write_bytes(data)
    assert [value for *_, value in found(path)] == [1, 2, "corrupt", "corrupt", 5]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ManifestError, match="cannot be read as a manifest"):
        found(path)


def test_threads_share_a_reader_and_a_store_that_hiccups_costs_nothing(tmp_path, s3_folder, monkeypatch):
    path = write(tmp_path / "x.parquet", image=cells(*((png(n), f"{n}.png") for n in range(1, 21))))
    uri = f"{s3_folder}/x.parquet"
    storage.write_bytes(uri, path.read_bytes())
    listed = list(open_archive(uri, ("p",)).rows)
    settings = SegmentSettings(input="", output="", members=[{"checkpoint": ""}])
    opened = {number: opening() for number, opening in open_images(listed[::-1], settings)}
    assert [int(opened[number][0].decode(None).pixels[0, 0, 0]) for number in range(20)] == list(range(20, 0, -1))

    fs = storage.open_uri(uri)[0]
    faults = iter([True, False, True])
    file_type = type(fs.open(uri, "rb"))
    fetch = file_type._fetch_range

    def fail_twice(self, start, end):
        if next(faults, False):
            raise OSError("the store hiccuped")
        return fetch(self, start, end)

    monkeypatch.setattr(file_type, "_fetch_range", fail_twice)
    monkeypatch.setattr(storage, "_delays", lambda patience_s: iter([0.0, 0.0]))
    assert read(listed[3]) == 4


def test_a_file_that_is_no_image_column_at_all_is_refused_with_what_it_has(tmp_path):
    path = write(tmp_path / "x.parquet", scan=[png(1)], label=[3])
    with pytest.raises(ManifestError, match="has the columns scan, label; a manifest needs image_uri"):
        found(path)
    assert found(path, image="scan") == [("row=0", ["default"], 1)]
    with pytest.raises(ImageError, match="there is no x"):
        ParquetImages(io.BytesIO(path.read_bytes())).read(0, "x")


def repeated(value, count=3000):
    """A column of one value in each row, which the file stores once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([value]))


def test_a_long_path_of_every_row_is_a_problem_and_not_unpacked(tmp_path):
    path = write(tmp_path / "a.parquet", 3000, image=pa.nulls(3000, pa.binary()), path=repeated("x" * (1 << 17)))
    before = pa.total_allocated_bytes()
    (row,) = rows(path)[0]
    assert "a text has 131,072 bytes" in row["problem"]
    assert pa.default_memory_pool().max_memory() - before < 100 << 20  # 3,000 paths would be 393 MB


def test_a_long_location_of_every_row_is_a_sentence(tmp_path):
    path = write(tmp_path / "a.parquet", 3000, image_uri=repeated("x" * (1 << 17)))
    with pytest.raises(ManifestError, match="a text has 131,072 bytes"):
        rows(path)


def test_repeated_locations_are_read(tmp_path):
    path = write(tmp_path / "a.parquet", 3000, image_uri=repeated("a.png", 5), prompts=pa.array([["p", "q"]] * 5))
    assert [row["prompts"] for row in rows(path)[0]] == [["p", "q"]] * 5


def test_a_large_image_of_every_row_is_unpacked_for_one_row(tmp_path):
    image = png(1) + bytes(16 << 20)
    path = write(tmp_path / "a.parquet", 3000, image=repeated(image, 40))
    before = pa.total_allocated_bytes()
    images = ParquetImages(open(path, "rb"))  # noqa: SIM115
    assert [len(images.read(row, "x")[0]) for row in (0, 1, 39)] == [len(image)] * 3
    assert pa.default_memory_pool().max_memory() - before < 8 * len(image)  # 40 of them are 640 MB


def test_more_rows_than_the_limit_are_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr("vlsm.images.parquet.MAX_IMAGES", 50)
    assert len(rows(write(tmp_path / "a.parquet", 100, image=pa.nulls(50, pa.binary())))[0]) == 50
    (row,) = rows(write(tmp_path / "b.parquet", 100, image=pa.nulls(51, pa.binary())))[0]
    assert row["problem"].startswith("too_large: ")
    assert "51 rows; 50 are the most" in row["problem"]


def test_a_damaged_footer_ends_no_process(tmp_path):
    """Pyarrow ends the process if the footer of a column is damaged, and somebody asks for the column's size."""
    data = write(tmp_path / "x.parquet", 5, image=HUB[0]).read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    code = """
import sys
from pathlib import Path
from tests.images.test_parquet import found
from vlsm.errors import VlsmError
path, footer = Path(sys.argv[1]), int(sys.argv[2])
data = path.read_bytes()
for position in range(footer, len(data) - 8, 5):
    damaged = bytearray(data)
    damaged[position] ^= 4
    path.write_bytes(damaged)
    try:
        found(path)
    except VlsmError:
        pass
print("all of them")
"""
    words = [sys.executable, "-c", code, str(tmp_path / "x.parquet"), str(footer)]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ended.stdout == "all of them\n", ended.stderr[-1500:]
