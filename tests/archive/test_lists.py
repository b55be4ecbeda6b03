"""Lists of images as people and programs write them: read as they are meant, or refused with the row."""

import csv
import gzip
import io
import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlsm.archive import text_tables
from vlsm.archive.archive import open_archive
from vlsm.archive.columns import Columns
from vlsm.errors import ManifestError
from vlsm.images.formats import Look

BOM = "\ufeff"


def read(path, **columns):
    """The image_id and the prompts of each row of a list."""
    return [
        (row["image_id"], row["prompts"])
        for row in open_archive(str(path), ("default",), look=Look(columns=columns)).rows
    ]


def write(folder, name, content):
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    return folder / name


def refusal(path, **columns):
    with pytest.raises(ManifestError) as caught:
        read(path, **columns)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


TWO = [("a.png", ["polyp"]), ("b.png", ["flat polyp"])]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", "image_uri,prompt\na.png,polyp\nb.png,flat polyp\n"),
        ("x.csv.gz", "image_uri,prompt\na.png,polyp\nb.png,flat polyp\n"),
        ("X.CSV", f"{BOM}image_uri,prompt\r\na.png,polyp\r\n\r\nb.png,flat polyp"),
        ("x.csv", "image_uri,prompt\ra.png,polyp\rb.png,flat polyp\r"),  # as old Macs end lines
        ("x.csv", " image_uri , prompt \na.png , polyp\nb.png, flat polyp \n"),
        ("x.csv", 'image_uri, prompt\na.png, "polyp"\nb.png, "flat polyp"\n'),
        ("x.csv", "Image URI,PROMPT\na.png,polyp \nb.png, flat polyp\n"),
        ("x.csv", f'{BOM}"image-uri","Prompts"\n"a.png","polyp"\n"b.png","flat polyp"\n'),
        ("x.csv", "image_uri;prompt\na.png;polyp\nb.png;flat polyp\n"),
        ("x.csv", "sep=;\nimage_uri;prompt\na.png;polyp\nb.png;flat polyp\n"),
        ("x.csv", "\n\nimage_uri,prompt,,\na.png,polyp,,\nb.png,flat polyp,,,\n"),
        ("x.csv", ",image_uri,prompt\n0,a.png,polyp\n1,b.png,flat polyp\n"),  # the index of pandas
        ("x.csv", "image_uri;prompt\r\na.png;polyp\r\n;\r\nb.png;flat polyp\r\n ;;\r\n"),  # blank rows of Excel
        ("x.csv", "image_uri,prompt\na.png,'polyp'\nb.png,\"\"\"flat polyp\"\"\"\n"),
        pytest.param("x.csv", f"image_uri,x,prompt\na.png,{'x' * 200_000},polyp\nb.png,,flat polyp\n", id="long"),
        ("x.csv", "image_uri,note,note,prompt\na.png,1,2,polyp\nb.png,,,flat polyp\n"),
        ("x.tsv", "image_uri\tprompt\na.png\tpolyp\nb.png\tflat polyp\n"),
        ("x.tsv.gz", "image_uri\tprompt\tnote\na.png\tpolyp\tx, y\nb.png\tflat polyp\n"),
        ("x.csv", "image_uri\tprompt\na.png\tpolyp\nb.png\tflat polyp\n".encode("utf-16")),  # Excel's "Unicode text"
        ("x.csv", "\ufeffimage_uri,prompt\na.png,polyp\nb.png,flat polyp\n".encode("utf-16-be")),
        ("x.csv", "image_uri,prompt\na.png,polyp\nb.png,flat polyp\n".encode("utf-32")),
        ("x.jsonl", '{"image_uri": "a.png", "prompt": "polyp"}\n\n{"Prompts": ["flat polyp"], "image_uri": "b.png"}'),
        ("x.jsonl.gz", BOM + '{"image_uri":"a.png","prompt":"polyp"}\n{"image_uri":"b.png","prompt":"flat polyp"}'),
        ("x.jsonl", '{"image_uri":"a.png","prompt":"polyp","mtime":NaN}\n{"image_uri":"b.png","prompt":"flat polyp"}'),
    ],
)  # fmt: skip
def test_a_list_is_read_as_it_is_meant(tmp_path, name, content):
    assert read(write(tmp_path, name, content)) == TWO


@pytest.mark.parametrize(
    ("cell", "prompts"),
    [
        ("['polyp', 'flat polyp']", ["polyp", "flat polyp"]),
        ('["polyp", "flat polyp"]', ["polyp", "flat polyp"]),
        ("('polyp', \"radiologist's polyp\")", ["polyp", "radiologist's polyp"]),
        ("['polyp' 'flat polyp']", ["polyp", "flat polyp"]),  # numpy
        ("['polyp'\n 'flat polyp']", ["polyp", "flat polyp"]),
        (" ['polyp',] ", ["polyp"]),
        ('["na\\u00efve", "a, b"]', ["naïve", "a, b"]),
        ("['it\\'s', 'a]b']", ["it's", "a]b"]),
        ('["[a]"]', ["[a]"]),
        ("(a small polyp)", ["(a small polyp)"]),
        ("polyp [3]", ["polyp [3]"]),
        ('5" lesion', ['5" lesion']),
        ("a, b", ["a, b"]),
        *((text, ["default"]) for text in ("", " ", "nan", "NaN", "None", "null", "NULL", "N/A", "<NA>")),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("column", ["prompt", "prompts"])
def test_a_prompt_that_is_a_list_or_nothing_written_as_text(tmp_path, kind, column, cell, prompts):
    path = tmp_path / f"x.{kind}"
    if kind == "csv":
        file = io.StringIO()
        csv.writer(file).writerows([["image_uri", column], ["a.png", cell]])
        path.write_text(file.getvalue())
    elif kind == "jsonl":
        path.write_text(json.dumps({"image_uri": "a.png", column: cell}))
    else:
        pq.write_table(pa.table({"image_uri": ["a.png"], column: [cell]}), path)
    if kind == "csv" or cell.strip():
        assert read(path) == [("a.png", prompts)]
    else:
        assert "prompts are '" in refusal(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "image_uri,prompt\nz.png,ok\na.png,sessile polyp, flat\n", "row 2 has 3 cells, but the header has 2"),
        ("x.csv", "image_uri,prompt,\na.png,sessile polyp, flat\n", "row 1 has 3 cells"),
        ("x.csv", "image_uri;prompt\na.png;polyp; flat\n", "row 1 has 3 cells"),
        ("x.tsv", "image_uri\tprompt\na.png\tpolyp\tflat\n", "row 1 has 3 cells"),
        ("x.csv", "image_uri,prompt\na.png, \"polyp, flat\"\n", "row 1 has 3 cells"),
        ("x.csv", 'image_uri,prompt\na.png,x\nb.png,"polyp\nc.png,flat\n', "behind row 1: unexpected end of data"),
        ("x.csv", 'image_uri,prompt\na.png,"polyp\nb.png,"flat"\n', "behind row 0"),
        ("x.csv", 'image_uri,prompt\na.png,"polyp\nb.png,flat\nc.png,"\n', "row 1: the prompt has a line break"),
        ("x.csv", 'image_uri,note,prompt\na.png,"x,polyp\nb.png,y,"\n', "row 1 has 2 cells with a line break"),
        ("x.csv", "image_uri,prompt\na.png,[polyp]\n", "row 1: the prompt '[polyp]' looks like a list but is none"),
        ("x.csv", "image_uri,prompt\na.png,\"['a', 'b' 'c']\"\n", "looks like a list"),
        ("x.csv", "image_uri,prompt\na.png,\"['a', ..., 'z']\"\n", "looks like a list"),
        ("x.csv", "image_uri,prompt\na.png,\"['a', None]\"\n", "looks like a list"),
        ("x.csv", "image_uri,prompt\na.png,\"array(['a'], dtype=object)\"\n", "looks like a list"),
        ("x.csv", "image_uri,prompt\na.png,\"{'a': 1}\"\n", "looks like a list"),
        # the end is cut off, or a quote that nobody closed swallows the next rows
        ("x.csv", "image_uri,prompt\na.png,\"['a', 'fla\"\n", "row 1: the prompt \"['a', 'fla\" looks like a list"),
        ("x.csv", 'image_uri,prompt\na.png,"[""a"", ""b"""\n', "looks like a list"),
        ("x.csv", "image_uri,prompt\na.png,\"['a'] b\"\n", "looks like a list"),
        ("x.csv", "image_uri,prompt\na.png,\"frozenset({'a'})\"\n", "looks like a list"),
        ("x.csv", "image_uri,prompt\na.png,\"['a'\nb.png,y\nc.png,z\"\n", "looks like a list"),
        ("x.csv", 'image_uri,prompt\na.png,"[a] b\nb.png,y\nc.png,"\n', "row 1: the prompt has a line break"),
        ("x.csv", 'image_uri,prompt\na.png,"(a\nb.png,y)"\n', "row 1: the prompt has a line break"),
        ("x.jsonl", '{"image_uri": "a.png", "prompts": "[\'a\', \'b"}', "looks like a list"),
        ("x.csv", "image_uri,prompt\na.png,x\n,\n,y\n", "row 3: image_uri is None"),
        ("x.csv", "image_uri,prompt\na.png,[]\n", "row 1: prompts are []"),
        ("x.csv", "image_uri,prompt\na.png,\"['a', '']\"\n", "row 1: prompts are ['a', '']"),
        ("x.csv", "image_uri,prompt\nnan,polyp\n", "row 1: image_uri is None"),
        ("x.csv", "image_uri,prompt,Prompt\na.png,x,y\n", "several columns prompt: 'prompt', 'Prompt'"),
        ("x.csv", "image_uri,image_uri\na.png,b.png\n", "several columns image_uri"),
        ("x.csv", "image_uri,prompt,prompts\na.png,x,y\n", "row 1 has the prompt 'x' and prompts 'y'; give one"),
        ("x.csv", "image_uri,prompt\nz.png,a\na.png,polype pédiculé\n".encode("latin-1"), "row 2: 'polype p\\udce9"),
        ("x.csv", "image_uri,prompt\na.png,polyp\n".encode("utf-16-le"), "has NUL bytes"),
        ("x.csv", b"image_uri,prompt\n" + b"a.png,polyp\n" * 1000 + b"a\0.png,polyp\n", "row 1001: "),
        pytest.param("x.csv", "image_uri,x\na.png," + "x" * 20_000_000, "line 2 has more than 16,777,216", id="long"),
        pytest.param("x.csv", "x" * 20_000_000, "line 1 has more than 16,777,216", id="long header"),
        *((name, content, "is empty; a manifest needs image_uri") for name in ("x.csv", "x.tsv.gz")
          for content in ("", "\n \n", BOM)),
        ("x.csv", gzip.compress(b"image_uri\na.png\n", mtime=0), "is packed with gzip; its name must end with .gz"),
        ("x.csv", b"PK\3\4\x14\0", "is a zip file, as .xlsx is; save it as CSV"),
        ("x.jsonl", '[{"image_uri": "a.png"}]', "line 1 is [{'image_uri': 'a.png'}]; a manifest's line is an object"),
        ("x.jsonl", '[\n{"image_uri": "a.png"}\n]', "line 1 is not JSON: Expecting value at column 2; each"),
        ("x.jsonl", '{"image_uri": "a.png"},\n{"image_uri": "b.png"}', "line 1 is not JSON: Extra data at column 23;"),
        ("x.jsonl", '{"image_uri": "a.png", "prompt": "x", "prompt": "y"}', "line 1 is not JSON: a key stands twice"),
        ("x.jsonl", '{"image_uri": "a.png"}\n{"bild": "b.png"}', "row 2 has the keys bild; a manifest needs image_uri"),
        ("x.jsonl", '{"image_uri": "a.png", "prompts": ["a", " "]}', "row 1: prompts are ['a', ' ']"),
        ("x.jsonl", '{"image_uri": "a.png", "prompts": [null]}', "row 1: prompts are [None]"),
    ],
)  # fmt: skip
def test_a_list_that_could_mean_something_else_is_refused_with_its_row(tmp_path, name, content, message):
    assert message in refusal(write(tmp_path, name, content))


def test_a_gzip_that_is_damaged_is_refused(tmp_path):
    whole = gzip.compress(b"image_uri\n" + b"".join(b"%d.png\n" % (n * n) for n in range(5000)))
    for number, data in enumerate((whole[:-300], b"image_uri\na.png\n", whole[:500] + b"?" * 100 + whole[600:])):
        (tmp_path / f"{number}.csv.gz").write_bytes(data)
        assert "cannot be read as a manifest" in refusal(tmp_path / f"{number}.csv.gz")


def list_with_header(folder, kind, **record):
    path = folder / f"x.{kind}"
    if kind == "csv":
        path.write_text(";".join(record) + "\n" + ";".join(record.values()) + "\n")
    elif kind == "jsonl":
        path.write_text(json.dumps(record))
    else:
        pq.write_table(pa.Table.from_pylist([record]), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize(
    "header", [*"path file filename file_name uri image image_path filepath url".split(), "File Name", " Path "]
)
def test_the_one_column_with_a_usual_name_for_locations_is_read_and_said(tmp_path, kind, header, caplog):
    caplog.set_level(logging.INFO, logger="vlsm")
    path = list_with_header(tmp_path, kind, caption="b", **{header: "a.png"})
    assert read(path, prompt="caption") == [("a.png", ["b"])]
    assert caplog.text.count(f"the column {header} of the list names the images; --set columns.image_uri=NAME") == 1


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize(
    ("headers", "setting"),
    [
        (["path", "file_name"], "columns.image_uri=path"),
        (["url", "Image Path"], "'columns.image_uri=Image Path'"),
        (["imageuri"], "columns.image_uri=imageuri"),
        (["bild"], "columns.image_uri=NAME names its column"),
    ],
)
def test_the_refusal_of_a_header_suggests_the_setting_that_reads_it(tmp_path, kind, headers, setting):
    import shlex

    from vlsm.config import SegmentSettings, load_settings

    path = list_with_header(tmp_path, kind, caption="b", **dict.fromkeys(headers, "a.png"))
    message = refusal(path)
    assert message.endswith(f"a manifest needs image_uri: --set {setting}")
    if "NAME" not in setting:
        words = shlex.split(message.rpartition("--set ")[2])
        arguments = {"input": "", "output": "", "members": [{"checkpoint": ""}]}
        settings = load_settings(SegmentSettings, None, [*words, "columns.prompt=caption"], arguments)
        assert read(path, **settings.columns) == [("a.png", ["b"])]


def test_columns_with_other_names_replace_those_with_the_known_names(tmp_path):
    path = write(tmp_path, "x.csv", "image_uri,Path,path,prompt,text,key\nu,U,a.png,wrong,\"['b', 'c']\",7\n")
    assert read(path, image_uri="path", prompts="text", image_id="key") == [("7", ["b", "c"])]
    assert read(path, image_uri="Path", prompt="text") == [("U", ["b", "c"])]
    assert "several columns image_uri: 'Path', 'path'" in refusal(path, image_uri="PATH")
    assert "columns.prompt is 'caption', but" in refusal(path, prompt="caption")
    path = write(tmp_path, "x.jsonl", '{"image_uri": "a.png"}\n{"image_uri": "b.png", "text": "c"}\n')
    assert read(path, prompt="text") == [("a.png", ["default"]), ("b.png", ["c"])]
    assert "columns.prompt is 'caption'; no record" in refusal(path, prompt="caption")


def test_a_list_says_once_which_columns_it_does_not_read_and_which_texts_are_no_value(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="vlsm")
    read(write(tmp_path, "x.csv", "image_uri,caption,prompt\na.png,x,nan\nb.png,y,nan\nc.png,z,None\n"))
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "columns that are not read: caption",
        "'nan' stands in 2 cells: it is read as no value",
        "'None' stands in 1 cells: it is read as no value",
    ]


def test_every_type_that_pandas_and_arrow_write(tmp_path):
    import pandas as pd

    uris = ["a.png", "b.png"]
    large, texts = pa.large_string(), pa.array(["p", None])
    objects = [pd.array(["p"], dtype="string").to_numpy(), None]
    tables = {
        "large": pa.table({"image_uri": pa.array(uris, large), "prompts": pa.array([["p"], None], pa.list_(large))}),
        "large lists": pa.table({"image_uri": uris, "prompts": pa.array([["p"], None], pa.large_list(large))}),
        "dictionary": pa.table({"image_uri": pa.array(uris).dictionary_encode(), "prompt": texts.dictionary_encode()}),
        "binary": pa.table({"image_uri": pa.array([b"a.png", b"b.png"]), "prompt": pa.array([b"p", None])}),
        "view": pa.table({"image_uri": pa.array(uris, pa.string_view()), "prompt": texts.cast(pa.string_view())}),
        "fixed": pa.table({"image_uri": uris, "prompts": pa.array([["p"], None], pa.list_(pa.string(), 1))}),
        "categories": pd.DataFrame({"image_uri": pd.Categorical(uris), "prompt": pd.Categorical(["p", None])}),
        "objects": pd.DataFrame({"image_uri": uris, "prompts": objects}, index=[7, 9]),
        "text": pd.DataFrame({"image_uri": uris, "prompt": pd.Series(["p", None], dtype="string")}),
        "floats": pd.DataFrame({"image_uri": uris, "prompt": ["p", float("nan")]}),
        "written": pd.DataFrame({"image_uri": uris, "prompts": ["['p']", "nan"]}),
    }  # fmt: skip
    for name, table in tables.items():
        path = tmp_path / f"{name}.parquet"
        table.to_parquet(path) if isinstance(table, pd.DataFrame) else pq.write_table(table, path)
        assert read(path) == [("a.png", ["p"]), ("b.png", ["default"])], name
    pq.write_table(pa.table({"image_uri": uris, "image_id": [7, 8], "prompt": pa.nulls(2), "x": pa.nulls(2)}), path)
    assert read(path) == [("7", ["default"]), ("8", ["default"])]


@pytest.fixture
def parts(tmp_path):
    """A function that writes list files below a folder."""

    def write_parts(files):
        for name, records in files.items():
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(records, str):
                path.write_text(records)
            else:
                pq.write_table(pa.Table.from_pylist(records), path)
        return tmp_path / "in"

    return write_parts


def test_a_folder_of_list_files_is_one_list(parts, tmp_path):
    folder = parts({
        "part-00000-1c.snappy.parquet": [{"image_uri": "../a.png", "prompt": "x"}],
        "part-00001-1c.snappy.parquet": [{"image_uri": "/b.png", "prompt": None}],
        "site=a/part-0.parquet": [{"image_uri": "c.png"}],
        "prompt=flat%20polyp/part-0.parquet": [{"image_uri": "d.png"}],
        "prompt=__HIVE_DEFAULT_PARTITION__/part-0.parquet": [{"image_uri": "e.png"}],
        "_SUCCESS": "", "_metadata": "x", ".part-00000.crc": "x", "README.md": "x",
        "_temporary/0/part-9.parquet": [{"image_uri": "never.png"}],
        ".hidden/part-9.parquet": [{"image_uri": "never.png"}],
    })  # fmt: skip
    archive = open_archive(str(folder), ("default",))
    assert not archive.is_listed  # it is planned at once, as every list
    found = {row["image_uri"]: row["prompts"] for row in archive.rows}
    assert found == {
        f"{folder}/../a.png": ["x"],
        "/b.png": ["default"],
        f"{folder}/c.png": ["default"],
        f"{folder}/d.png": ["flat polyp"],
        f"{folder}/e.png": ["default"],
    }


def test_a_row_of_a_part_is_named_with_its_file(parts):
    folder = parts({"0.csv": "image_uri,prompt\na.png,x\n", "1.csv": "image_uri;prompt\nb.png;y\nc.png;y;z\n"})
    with pytest.raises(ManifestError, match=r"in/1\.csv, row 2 has 3 cells"):
        read(folder)


def test_parts_with_different_columns_are_told(parts, caplog):
    folder = parts({"0.csv": "image_uri,prompt\na.png,x\n", "1.csv": "image_uri\nb.png\n"})
    assert [prompts for _, prompts in read(folder)] == [["x"], ["default"]]
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}/1.csv has the columns image_uri; the list's first file has image_uri, prompt"
    ]
    folder = parts({"j/0.jsonl": '{"image_uri": "a.png"}', "j/1.jsonl": '{"image_uri": "b.png", "text": "y"}'}) / "j"
    assert [prompts for _, prompts in read(folder, prompt="text")] == [["default"], ["y"]]


def test_a_folder_of_list_files_in_a_store(parts, s3_folder):
    import s3fs

    folder = parts({"0.parquet": [{"image_uri": f"{s3_folder}/a.png"}], "site=b/1.parquet": [{"image_uri": "b.png"}]})
    s3fs.S3FileSystem().put(f"{folder}/", f"{s3_folder}/list/", recursive=True)
    assert [row["image_uri"] for row in open_archive(f"{s3_folder}/list", ("p",)).rows] == [
        f"{s3_folder}/a.png",
        f"{s3_folder}/list/b.png",
    ]


def test_a_folder_with_lists_and_images_or_with_lists_of_two_kinds_is_no_list(parts):
    folder = parts({"0.parquet": [{"image_uri": "a.png"}], "sub/b.png": "x", "c.csv": "image_uri\nd.png\n"})
    archive = open_archive(str(folder), ("p",))
    assert [row["image_id"] for row in archive.rows] == ["sub/b.png"]
    assert archive.is_listed and archive.skipped == {".parquet without images": 1, ".csv": 1}
    (folder / "sub" / "b.png").unlink()
    archive = open_archive(str(folder), ("p",))
    assert (list(archive.rows), archive.is_listed) == ([], True)


def test_a_folder_with_the_output_of_the_run_and_one_whose_files_a_log_counts(parts):
    record = [{"image_uri": "a.png"}]
    folder = parts({"0.csv": "image_uri\na.png\n", "out/masks/part-0.parquet": record, "out/config.yaml": ""})
    archive = open_archive(str(folder), ("p",), exclude=str(folder / "out"))
    assert [row["image_id"] for row in archive.rows] == ["a.png"]
    folder = parts({"delta/0.parquet": record, "delta/_delta_log/0.json": ""}) / "delta"
    assert "is a Delta table" in refusal(folder)


class CountedText(io.StringIO):
    num_letters = 0

    def readline(self, size=-1):
        line = super().readline(size)
        self.num_letters += len(line)
        return line


@pytest.mark.parametrize("kind", ["csv header", "csv", "jsonl"])
def test_a_line_without_an_end_is_not_read_to_its_end(monkeypatch, kind):
    monkeypatch.setattr("vlsm.archive.text_tables.MAX_LINE_LETTERS", 1000)
    start = {"csv header": "image_uri,", "csv": "image_uri\n", "jsonl": '{"image_uri": "a.png"}\n{"image_uri": "'}[kind]
    text = CountedText(start + "x" * 10_000)
    read = text_tables.read_json if kind == "jsonl" else text_tables.read_csv
    with pytest.raises(ManifestError, match=f"line {1 if kind == 'csv header' else 2} has more than 1,000 letters"):
        list(read(text, "x", Columns({}), *(() if kind == "jsonl" else ((),))))
    assert text.num_letters < 2100


def test_a_line_of_the_largest_length_is_read(monkeypatch):
    monkeypatch.setattr("vlsm.archive.text_tables.MAX_LINE_LETTERS", 1000)
    rows = list(text_tables.read_csv(io.StringIO(f"image_uri,x\na.png,{'y' * 993}\nb.png,z\n"), "x", Columns({}), ()))
    assert [cells[0] for _, _, cells in rows] == ["a.png", "b.png"]
