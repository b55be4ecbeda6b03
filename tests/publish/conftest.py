"""A finished and proved segment run with masks, a failed image, and the columns of a list."""

import dataclasses
import datetime
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from vlsm.archive.archive import open_archive
from vlsm.archive.carried import Carry
from vlsm.runs.carried import RESERVED, carried_of_plan
from vlsm.runs.plan import read_plan, write_plan
from vlsm.runs.results import write_part
from vlsm.segmentation.masks import encode_mask, encode_probability

RUN_ID, NUMBER = "0123456789abcdef0123456789abcdef", 10
SITES = ("north", "south/west", "北", None, "a'b=c")
WHEN = datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.UTC)


def write_run(output, run_id=RUN_ID, num_images=NUMBER, embedding=False, **columns):
    """Write a run over a list in shards of four images, and return its output."""
    given = {
        "image_uri": [f"/images/{number:03d}.png" for number in range(num_images)],
        "site": [SITES[number % len(SITES)] for number in range(num_images)],
        "born": pa.array([datetime.date(1960, 5, 1 + number % 28) for number in range(num_images)]),
        "seen": pa.array([WHEN] * num_images, pa.timestamp("us", tz="UTC")),
        "age": pa.array([None if number == 3 else 60 + number for number in range(num_images)], pa.int32()),
        "has_biopsy": [number % 2 == 0 for number in range(num_images)],
    }
    output.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(given | columns), output.parent / "list.parquet")
    archive = open_archive(str(output.parent / "list.parquet"), ("polyp",), carry=Carry("all", RESERVED))
    plan = write_plan(str(output), archive.rows, 4, carried=archive.carried)
    counts = {"ok": 0, "failed": 0}
    for shard, images in enumerate(read_plan(str(output), plan)):
        rows = [_row(image, embedding) for image in images.to_pylist()]
        for row in rows:
            counts[row["status"]] += 1
        write_part(str(output), shard, rows, run_id, 0, carried_of_plan(images.schema), 2 if embedding else 0)
    record = {"config": {"embedding": embedding}, "plan": dataclasses.asdict(plan), "run_id": run_id}
    (output / "config.yaml").write_text(yaml.safe_dump(record), encoding="utf-8")
    summary = {"planned": num_images, "vanished": 0, "rows": num_images, "seconds": 1} | counts
    summary["failed_by_reason"] = {"corrupt": counts["failed"]} if counts["failed"] else {}
    (output / "summary.json").write_text(json.dumps(summary))
    return output


def _row(image, embedding):
    number = int(image["image_uri"][-7:-4])
    row = {"image_id": image["image_id"], "image_uri": image["image_uri"], "prompt": "polyp", "kind": "mask"}
    row |= {"model": "m@1"} | image["carried"]
    if number == 5:
        return row | {"status": "failed", "error": "corrupt: it is no image"}
    mask = np.zeros((20, 30), np.uint8)
    mask[2 : 2 + number, 3 : 3 + 2 * number] = 1  # that of image 0 is empty
    row |= {"status": "ok", "height": 20, "width": 30, "mask_rle": encode_mask(mask), "area_px": int(mask.sum())}
    row |= {
        "area_fraction": float(mask.mean()),
        "bbox": [3, 2, 2 * number, number] if number else None,
        "presence": 0.1 * number,
    }
    row |= {
        "confidence": 1 / 3 if number else None,
        "max_probability": 0.7,
        "embedding": [0.6, 0.8] * embedding or None,
    }
    return row | {"probability_map": encode_probability(np.full((20, 30), 0.7))}


@pytest.fixture(scope="session")
def output(tmp_path_factory):
    """A run that no test changes."""
    return write_run(tmp_path_factory.mktemp("published") / "masks of 'us'")
