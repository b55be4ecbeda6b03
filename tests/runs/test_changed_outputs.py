"""A finished OUTPUT that something has changed: `jobs.verify` finds every change, and nothing in the unchanged one."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs import verify
from vlsm.archive.carried import Carried
from vlsm.runs.plan import write_plan
from vlsm.runs.results import part_name, read_rows, write_part
from vlsm.segmentation.masks import describe_mask, encode_png

SIZE = (6, 8)
PROMPTS = ["polyp", "lesion"]
STRUCT = pa.struct([("site", pa.string()), ("age", pa.int64())])


def mask_of(number):
    """No two masks are equal; mask 0 is empty."""
    mask = np.zeros(SIZE, bool, order="F")
    mask.reshape(-1, order="F")[:number] = True
    return mask


def rows_of(image, number):
    common = {key: image[key] for key in ("image_id", "image_uri", "image_version")} | {"model": "m"} | image["carried"]
    for position, prompt in enumerate(PROMPTS):
        mask = mask_of(number + 10 * position)
        record = vars(describe_mask(mask, np.full(SIZE, 0.5 + number / 20)))
        record |= {"height": SIZE[0], "width": SIZE[1], "content_sha256": f"{number:064d}", "status": "ok"}
        yield common | {"prompt": prompt, "kind": "mask"} | record
    labels = {"prompt": json.dumps(PROMPTS), "kind": "labels", "label_map": encode_png(mask.astype(np.uint8))}
    yield common | record | labels


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of six images in three parts, of which one has failed; each has a column of the list."""
    folder = tmp_path_factory.mktemp("finished") / "output"
    images = [
        {"image_id": f"{n}.png", "image_uri": f"/scans/{n}.png", "prompts": PROMPTS, "image_version": f"v{n}"}
        | {"carried": {"site": "ab"[n % 2], "age": 40 + n}}
        for n in range(6)
    ]
    carried = Carried({"site": "site", "age": "age"}, STRUCT)
    plan = write_plan(str(folder), images, 4, ["mask", "labels"], carried)
    assert (plan.num_shards, plan.num_rows) == (3, 18)
    config = {"input": "/scans", "output": str(folder), "members": [{"checkpoint": "/c"}], "prompts": PROMPTS}
    record = {"config": config, "plan": dataclasses.asdict(plan), "run_id": "r"}
    (folder / "config.yaml").write_text(yaml.safe_dump(record))
    for shard in range(3):
        rows = [row for n in (2 * shard, 2 * shard + 1) for row in rows_of(images[n], n)]
        if shard == 2:
            keys = ("image_id", "image_uri", "image_version", "prompt", "kind", "model", "site", "age")
            failed = {"status": "failed", "error": "corrupt: it is"}
            rows[3:] = [{key: row[key] for key in keys} | failed for row in rows[3:]]
        write_part(str(folder), shard, rows, "r", 0, STRUCT)
    summary = {"planned": 6, "ok": 5, "failed": 1, "vanished": 0, "rows": 18, "failed_by_reason": {"corrupt": 1}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def part(output, shard=0):
    return output / "masks" / part_name(shard)


def edit(change, shard=0):
    """A change of the rows of a part file by a program that keeps its metadata."""

    def apply(output):
        table = pq.ParquetFile(part(output, shard)).read()
        rows = table.to_pylist()
        rows = change(rows) or rows
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), part(output, shard))

    return apply


def cells(number=0, **values):
    """Other values in one row."""
    return edit(lambda rows: rows[number].update(values))


def swap(first, second, *columns):
    def change(rows):
        for column in columns:
            rows[first][column], rows[second][column] = rows[second][column], rows[first][column]

    return edit(change)


def swap_masks_of_parts(output):
    """The masks of two images, each with its statistics; the rows stay where they were."""
    tables = [pq.ParquetFile(part(output, shard)).read() for shard in (0, 1)]
    rows = [table.to_pylist() for table in tables]
    for column in STATISTICS:
        rows[0][0][column], rows[1][0][column] = rows[1][0][column], rows[0][0][column]
    for shard in (0, 1):
        pq.write_table(pa.Table.from_pylist(rows[shard], schema=tables[shard].schema), part(output, shard))


def summary(**values):
    def apply(output):
        path = output / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def plan_file(change):
    def apply(output):
        (path,) = (output / "manifest").iterdir()
        parquet = pq.ParquetFile(path)
        groups = [parquet.read_row_group(group) for group in range(parquet.num_row_groups)]
        groups[0] = pa.Table.from_pylist(change(groups[0].to_pylist()), schema=parquet.schema_arrow)
        with pq.ParquetWriter(path, parquet.schema_arrow) as writer:
            for group in groups:
                writer.write_table(group)

    return apply


def truncate(output):
    part(output).write_bytes(part(output).read_bytes()[:-20])


def of_an_older_run(output):
    table = pq.ParquetFile(part(output)).read()
    metadata = table.schema.metadata | {b"vlsm.run": b"older"}
    pq.write_table(table.replace_schema_metadata(metadata), part(output))


def through_pandas(output):
    pq.read_table(part(output)).to_pandas().to_parquet(part(output))


STATISTICS = ("mask_rle", "area_px", "area_fraction", "bbox", "confidence", "content_sha256", "max_probability")
EMPTY = vars(describe_mask(mask_of(0), np.zeros(SIZE)))
CHANGES = {
    "a row is dropped": (edit(lambda rows: rows[1:]), "not exactly the planned rows for 1 image: '0.png'"),
    "a row is doubled": (edit(lambda rows: [*rows, rows[0]]), "not exactly the planned rows for 1 image"),
    "an image is dropped": (edit(lambda rows: rows[3:]), "not exactly the planned rows for 1 image: '0.png'"),
    "rows change places": (edit(lambda rows: [rows[1], rows[0], *rows[2:]]), "not exactly the planned rows"),
    "images change places": (edit(lambda rows: [*rows[3:], *rows[:3]]), "have been changed"),
    "a row of no image": (edit(lambda rows: [*rows, rows[0] | {"image_id": "x.png"}]), "1 row too many, not planned"),
    "an image has another name": (cells(image_id="x.png"), "not exactly the planned rows for 1 image: '0.png'"),
    "an image is another file": (cells(image_uri="/scans/1.png"), "not exactly the planned rows"),
    "an older version of a file": (cells(image_version="v9"), "not exactly the planned rows"),
    "a wrong prompt": (cells(prompt="tumour"), "not exactly the planned rows"),
    "prompts are swapped": (swap(0, 1, "prompt"), "not exactly the planned rows"),
    "a mask is swapped, its statistics are not": (swap(0, 3, "mask_rle"), "area_px is 0, but the mask has 1 pixels"),
    "masks of two images are swapped": (swap(0, 3, *STATISTICS), "have been changed"),
    "masks of two prompts are swapped": (swap(0, 1, *STATISTICS), "have been changed"),
    "masks of two parts are swapped": (swap_masks_of_parts, "part-00000001.parquet: its rows have been changed"),
    "a mask becomes empty": (cells(1, **EMPTY), "have been changed"),
    "another area": (cells(1, area_px=11), "area_px is 11, but the mask has 10 pixels"),
    "another share of the image": (cells(1, area_fraction=0.5), "have been changed"),
    "another box": (cells(1, bbox=[0, 0, 1, 1]), "bbox is [0, 0, 1, 1]"),
    "another confidence": (cells(1, confidence=0.99), "have been changed"),
    "no reason for a review": (cells(1, review="odd area"), "have been changed"),
    "another size": (cells(1, height=8, width=6), "bbox"),
    "another digest of the image": (cells(content_sha256="f" * 64), "have been changed"),
    "another model": (cells(model="other"), "have been changed"),
    "another label map": (cells(2, label_map=encode_png(np.zeros(SIZE, np.uint8))), "label map is not the mask"),
    "another value of the list": (cells(site="z"), "other values than the list had, for 1 image"),
    "a failure becomes a success": (edit(lambda rows: [r | {"status": "ok"} for r in rows], 2), "there is no mask"),
    "a success becomes a failure": (
        edit(lambda rows: [row | {"status": "failed", "error": "corrupt: x"} for row in rows[:3]] + rows[3:]),
        "have been changed",
    ),
    "a failure has another reason": (
        edit(lambda rows: rows[:3] + [row | {"error": "missing: it is"} for row in rows[3:]], 2),
        "summary.json has failed_by_reason {'corrupt': 1}; it should be {'missing': 1}",
    ),
    "a part is missing": (lambda output: part(output).unlink(), "part-00000000.parquet is missing"),
    "a part stands for another": (
        lambda output: shutil.copy(part(output, 1), part(output)),
        "2 images: '0.png', '1.png'",
    ),
    "a part too many": (lambda output: shutil.copy(part(output), part(output, 3)), "part-00000003.parquet is no part"),
    "a part of an older run": (of_an_older_run, "is missing, damaged or of another run"),
    "a part is written again by pandas": (through_pandas, "is missing, damaged or of another run"),
    "a part is cut": (truncate, "is missing, damaged or of another run"),
    "the summary has other counts": (summary(ok=6, failed=0), "summary.json has ok 6; it should be 5"),
    "the summary is missing": (lambda output: (output / "summary.json").unlink(), "the run is not finished"),
    "the plan lacks an image": (plan_file(lambda rows: rows[1:]), "5"),
    "the plan has another prompt": (plan_file(lambda rows: [r | {"prompts": ["x", "y"]} for r in rows]), "not exactly"),
    "the plan has an image twice": (plan_file(lambda rows: [rows[0], rows[0]]), "5 different image_ids"),
}


def test_the_unchanged_run_is_proven(finished, capsys):
    assert verify.main([str(finished)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_found(finished, tmp_path, capsys, name):
    change, told = CHANGES[name]
    output = shutil.copytree(finished, tmp_path / "output")
    change(output)
    assert verify.main([str(output)]) == 1
    captured = capsys.readouterr()
    assert told in captured.out + captured.err


def test_a_flipped_bit_is_found_or_changes_no_row(finished, tmp_path, capsys):
    """Some bytes of a Parquet file mean nothing to a reader; others end pyarrow if it looks at a column's footer."""
    output = shutil.copytree(finished, tmp_path / "output")
    data, expected = part(output).read_bytes(), list(read_rows(str(finished)))
    num_found = 0
    for position in range(3, len(data), len(data) // 40):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        part(output).write_bytes(damaged)
        found = verify.main([str(output)])
        assert found == 1 or list(read_rows(str(output))) == expected, position
        num_found += found
    assert num_found > 10, "the data of a small part are a third of it"
