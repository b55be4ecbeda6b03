"""Passwords and signatures of locations: the plan has what it needs to fetch, and nothing else of a run has them."""

import csv
import http.server
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.conftest import save_square
from vlsm import storage
from vlsm.archive.archive import open_archive
from vlsm.cells import INDEX_COLUMNS, CsvWriter
from vlsm.config import SegmentSettings
from vlsm.datasets.changes import describe_changed_records, list_versions, renew_signatures
from vlsm.datasets.inspection import EXAMPLES_SCHEMA
from vlsm.datasets.overview import Overview, describe_overview
from vlsm.datasets.records import Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ManifestError
from vlsm.evaluation.lesions import add_lesions
from vlsm.evaluation.presence import add_presence
from vlsm.evaluation.sweep import COLUMNS, write_csv
from vlsm.evaluation.tables import TableRow, format_csv, format_markdown
from vlsm.export import export_masks
from vlsm.report.evaluations import _read_table
from vlsm.report.write import write_report
from vlsm.runs.compare import compare_run
from vlsm.runs.locations import Locations
from vlsm.runs.plan import read_plan, write_plan
from vlsm.runs.record import describe_differences, make_record, write_record
from vlsm.runs.results import part_name, write_part
from vlsm.runs.schema import RESULT_SCHEMA, with_format
from vlsm.runs.updates import update_plan
from vlsm.segmentation.masks import encode_mask
from vlsm.shown import public_uri, show_lines
from vlsm.training.settings import TrainSettings
from vlsm.training.trackers import _parameters

S = "S3cr3t"


def signed(number, signature, folder="https://host/data"):
    return f"{folder}/image?id={number}&X-Amz-Date=1&X-Amz-Signature={S}{signature}"


def listed(tmp_path, signature, numbers=(1, 2)):
    """The rows of a list of signed URLs."""
    path = tmp_path / "list.csv"
    path.write_text("\n".join(["image_uri", *(signed(number, signature) for number in numbers)]))
    return list(open_archive(str(path), ("polyp",)).rows)


def result(image, **more):
    mask = np.ones((2, 2), np.uint8)
    row = {name: image[name] for name in ("image_id", "image_uri")} | {"prompt": "polyp", "kind": "mask", "model": "m"}
    return row | {"status": "ok", "height": 2, "width": 2, "mask_rle": encode_mask(mask), "area_px": 4} | more


def everything(folder):
    """The content of all files below a folder but the plan, as text."""
    texts = []
    for path in folder.rglob("*"):
        if path.is_file() and path.parent.name != "manifest":
            is_table = path.suffix == ".parquet"
            texts.append(str(pq.read_table(path).to_pylist()) if is_table else path.read_text(encoding="utf-8"))
    return "\n".join(texts)


def settings_with(signature, **more):
    return SegmentSettings(
        input=f"https://user:{S}@host/a.zip?id=1&sig={S}{signature}",
        output="/out",
        members=[{"checkpoint": f"https://host/ck?token={S}"}],
        run={"allow": [f"https://user:{S}{signature}@host/"]},
        **more,
    )


def test_the_record_has_no_secret_and_the_same_command_with_another_signature_goes_on(tmp_path):
    record = make_record(settings_with("1"), {"checkpoint_digests": ["a"]}, {"id": "p"})
    write_record(str(tmp_path), record)
    text = (tmp_path / "config.yaml").read_text()
    assert S not in text and "input: https://host/a.zip?~" in text
    for recorded in (yaml.safe_load(text), record):  # the second one is as earlier versions have written it
        assert describe_differences(recorded, settings_with("2"), {}) == []
        (difference,) = describe_differences(recorded, settings_with("2", slices="coronal"), {})
        assert "slices" in difference
        other = settings_with("2").model_copy(update={"input": f"https://host/a.zip?id=2&sig={S}"})
        (difference,) = describe_differences(recorded, other, {})
        assert difference.startswith("input (there 'https://host/a.zip?~") and S not in difference


def test_a_list_gives_ids_without_signatures_that_tell_images_apart(tmp_path):
    first, second = listed(tmp_path, "1")
    assert first["image_id"] != second["image_id"] and S not in first["image_id"]
    assert first["image_uri"] == signed(1, "1")  # what the plan needs to fetch
    with pytest.raises(ManifestError, match="stands twice") as caught:
        write_plan(str(tmp_path), listed(tmp_path, "1") + listed(tmp_path, "2"), 8)
    assert S not in str(caught.value)


class _Server(http.server.BaseHTTPRequestHandler):
    """Serves a zip of two images to whoever signs."""

    content = b""

    def do_GET(self):
        if S not in self.path:
            self.send_error(403)
            return
        start, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        data = self.content[int(start) : int(end) + 1 if end else None]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {start}-{int(start) + len(data) - 1}/{len(self.content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *words):
        pass


@pytest.fixture
def signed_zip(tmp_path):
    for name in ("a.png", "b.png"):
        save_square(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("a.png", "b.png"):
            archive.write(tmp_path / name, name)
    _Server.content = (tmp_path / "x.zip").read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/x.zip"
        server.shutdown()


def test_a_signed_archive_is_listed_and_gone_on_with_under_another_signature(signed_zip):
    rows = list(open_archive(f"{signed_zip}?sig={S}1", ("polyp",)).rows)
    assert [row["image_id"] for row in rows] == ["x.zip#a.png", "x.zip#b.png"]
    assert {row["image_uri"] for row in rows} == {f"{signed_zip}?sig={S}1"}
    after = rows[0]["image_uri"], rows[0]["selector"]
    rows = list(open_archive(f"{signed_zip}?sig={S}2", ("polyp",), after=after).rows)
    assert [(row["image_id"], row["image_uri"]) for row in rows] == [("x.zip#b.png", f"{signed_zip}?sig={S}2")]


@pytest.mark.parametrize("is_earlier", [False, True])
def test_rows_have_no_secret_and_are_those_of_the_plan(tmp_path, is_earlier):
    """An earlier version planned ids with signatures, and wrote them into its rows: its OUTPUT goes on."""
    rows = listed(tmp_path, "1")
    rows = [row | {"image_id": row["image_uri"]} for row in rows] if is_earlier else rows
    plan = write_plan(str(tmp_path / "out"), rows, 8)
    done = [
        result(rows[0]),
        result(rows[1], status="failed", error=f"forbidden: no permission to read {signed(2, '1')}"),
    ]
    write_part(str(tmp_path / "out"), 0, done, "run", 0)
    assert (S in everything(tmp_path / "out")) == is_earlier
    assert compare_run(str(tmp_path / "out"), plan, "run").pending == {}
    if is_earlier:
        table = pa.Table.from_pylist(done, schema=with_format(RESULT_SCHEMA, **{"vlsm.run": "run"}))
        pq.write_table(table, tmp_path / "out" / "masks" / part_name(0))
        assert compare_run(str(tmp_path / "out"), plan, "run").pending == {}


@pytest.mark.parametrize("is_earlier", [False, True])
def test_an_update_recognises_an_image_by_a_new_signature_and_renews_the_plan(tmp_path, is_earlier):
    before = listed(tmp_path, "1")
    before = [row | {"image_id": row["image_uri"]} for row in before] if is_earlier else before
    output = str(tmp_path / "out")
    plan, update = update_plan(output, write_plan(output, before, 8), listed(tmp_path, "2", (1, 2, 3)), 8)
    assert (update.num_new, update.num_changed, update.num_vanished, update.num_renewed) == (1, 0, 0, 2)
    rows = [row for shard in read_plan(output, plan) for row in shard.to_pylist()]
    assert [row["image_uri"] for row in rows] == [signed(number, "2") for number in (1, 2, 3)]
    assert [row["image_id"] for row in rows[:2]] == [row["image_id"] for row in before]
    _, update = update_plan(output, plan, listed(tmp_path, "2", (1, 2, 3)), 8)
    assert update.num_renewed == update.num_changed == 0


def test_an_image_is_read_again_by_its_location_in_the_plan(tmp_path):
    rows = listed(tmp_path, "1")
    write_plan(str(tmp_path / "out"), rows, 8)
    locate = Locations(str(tmp_path / "out"))
    assert [locate(public_uri(row["image_uri"])) for row in rows] == [row["image_uri"] for row in rows]
    for uri in ("/a/b.png", "s3://bucket/a?b.png", "https://host/other"):
        assert locate(uri) == uri


def test_reports_and_exports_of_earlier_versions_have_no_secret_either(tmp_path, monkeypatch):
    """Their rows have whole URLs in all columns, and control characters."""
    monkeypatch.setattr("vlsm.images.fetch.QUICK_S", 0)  # the host does not exist
    output = tmp_path / "out"
    hostile = f"https://user:{S}@host/\x1b[2J\u202e</script>\"'><img src=x>/{{}}?id={{}}&sig={S}"
    images = [{"image_id": hostile.format(*pair), "image_uri": hostile.format(*pair)} for pair in ("a1", "b2", "c3")]
    rows = [result(image) for image in images[:2]]
    rows.append(
        result(images[2], status="failed", mask_rle=None, error=f"missing: there is no file {images[2]['image_uri']}")
    )
    write_record(str(output), {"config": {"members": [{"checkpoint": "x"}]}, "plan": {"num_images": 3}})
    record = yaml.safe_load((output / "config.yaml").read_text())
    record["config"] |= {"input": f"https://host/list.csv?sig={S}/tail", "members": [{"checkpoint": f"x://u:{S}@h/c"}]}
    (output / "config.yaml").write_text(yaml.safe_dump(record))
    (output / "masks").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=RESULT_SCHEMA), output / "masks" / part_name(0))
    page = Path(write_report(str(output), tmp_path / "report.html")).read_text(encoding="utf-8")
    assert export_masks(str(output), tmp_path / "x") == 2
    names = " ".join(str(path) for path in (tmp_path / "x").rglob("*"))
    index = (tmp_path / "x" / "index.csv").read_text(encoding="utf-8")
    for text in (page, names, index):
        assert S not in text and "/tail" not in text, text[text.find(S) - 200 :][:300]
    assert "\x1b" not in page and "\u202e" not in page and "<img src=x>" not in page and "host" in page


def test_a_training_recognises_its_records_by_new_signatures_and_takes_them():
    def record(signature):
        uris = [
            signed(1, signature),
            signed(1, signature, "https://host/masks"),
            signed(1, signature, "https://host/b"),
        ]
        where = f"https://host/list.csv?sig={S}{signature}, row 1"
        return Record("d", "train", where, *uris[:2], {"p1": ("polyp",)}, more_masks=(uris[2],), group=uris[0])

    old, new = record("1"), record("2")
    assert S not in old.where + old.group
    rows = [old.stated() | {"prompts": list(old.prompts.items())}]
    table = pa.Table.from_pylist(rows, schema=EXAMPLES_SCHEMA)
    for name in ("image_version", "mask_version"):
        table = table.append_column(name, pa.nulls(1, pa.string()))
    assert describe_changed_records(table, [new]) == []
    (phrase,) = describe_changed_records(table, [Record(**vars(new) | {"labels": (3,)})])
    assert "with another prompt, split, group or label" in phrase
    assert renew_signatures([old], [new]) == [new]
    assert renew_signatures([old], []) == [old]


def test_the_folder_of_a_signed_url_is_not_listed(monkeypatch):
    """A signature is for one file: a store would refuse the listing, or retry it for seconds."""
    asked = []
    monkeypatch.setattr(storage, "list_versions", lambda folder: asked.append(folder) or {"b.png": "etag"})
    records = [Record("d", "train", "x", signed(1, "1"), f"https://u:{S}@host/b.png", {})]
    assert list_versions([*records, Record("d", "train", "y", "s3://bucket/b.png", "s3://bucket/b.png", {})]) == [
        (None, None),
        ("etag", "etag"),
    ]
    assert asked == ["s3://bucket"]


def test_what_a_dataset_is_taken_for_is_told_without_secrets(tmp_path):
    save_square(tmp_path / "a.png")
    records = [Record("d", "train", "x", signed(1, "1"), f"https://user:{S}@host/masks/b.png?sig={S}", {})]
    overview = Overview("d", f"https://user:{S}@host/list.csv?sig={S}", records, [], [], [], DatasetSettings())
    text = show_lines("\n".join(describe_overview(overview)))  # as the command prints it
    assert S not in text and " masks/*.png (1)" in text and " data/* (1)" in text


def test_trackers_get_no_secret():
    datasets = {"a": f"https://user:{S}@host/a?sig={S}"}
    settings = TrainSettings(
        output=f"https://u:{S}@host/o", datasets=datasets, model="pixel", run={"mlflow": f"x://:{S}@h"}
    )
    assert _parameters(settings)["datasets.a"] == "https://host/a" and S not in str(_parameters(settings))


FORMULAS = ["=1+1", "-5", "@x", "+1", "\t=1", "＝1", "'=1", "a\r=b", '<a href="x">|[y](z)', "plain"]


def table_row(text):
    values = {name: None for name in TableRow.__dataclass_fields__} | {"n": 1, "n_failed": 0, "review_n": 0}
    names = {"dataset": text, "prompt_name": text, "prompt_class": "honest", "system": text}
    lesion = {"num_lesions": 1, "num_components": 1, "num_matched": 1, "num_found": 1, "num_right": 1}
    values |= {"lesions": add_lesions([lesion | {"matched_iou": 1.0, "lesion_dice": 1.0}])}
    values |= {"presence": replace(add_presence([]), negatives_n=1)}  # so that all sections are there
    return TableRow(**values | names | {"difference": -0.5, "hd95_n": 0, "asd_n": 0, "bad_n": 0, "bad_found": 0})


def test_tables_of_scores_have_no_formula_and_the_report_reads_the_names(tmp_path):
    text = format_csv(map(table_row, FORMULAS))
    (tmp_path / "table.csv").write_bytes(text.encode())
    cells = [cell for line in csv.reader(text.splitlines(keepends=True)) for cell in line]
    assert not [cell for cell in cells if cell[:1] and cell[0] in "=+@\t\r＝" or cell == "-5"] and "-0.5" in cells
    assert [row["system"] for row in _read_table(str(tmp_path))] == FORMULAS
    markdown = format_markdown([*map(table_row, FORMULAS)], "=<b>", {("<i>", "p"): "[x](y)"})
    assert not [mark for mark in ("<a", "<b", "<i", "](") if mark in markdown.replace("\\]", "")]
    rows = [dict.fromkeys(COLUMNS, text) | {"mean": -0.5} for text in FORMULAS]
    assert not [line for line in csv.reader(write_csv(rows).splitlines(keepends=True)) if line[0][:1] in set("=+@\t＝")]


def test_the_index_of_an_export_is_a_list_with_the_same_names(tmp_path):
    with (tmp_path / "index.csv").open("w", encoding="utf-8", newline="") as file:
        writer = CsvWriter(file, INDEX_COLUMNS)
        for text in FORMULAS:
            writer.write({"image_id": text, "image_uri": f"/data/{text}", "prompt": "- polyp"})
    rows = list(open_archive(str(tmp_path / "index.csv"), ("x",)).rows)
    assert [(row["image_id"], row["image_uri"]) for row in rows] == [(text, f"/data/{text}") for text in FORMULAS]
    assert {tuple(row["prompts"]) for row in rows} == {("- polyp",)}
    (tmp_path / "own.csv").write_text("image_uri\n'=a.png\n")  # a list of other people is read as it is
    assert [row["image_id"] for row in open_archive(str(tmp_path / "own.csv"), ("x",)).rows] == ["'=a.png"]
