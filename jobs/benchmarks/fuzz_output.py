"""A small OUTPUT of a segment run, written by the product's own functions, with images of three formats."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmarks.fuzz_mutations import Files
from vlsm.config import MemberSettings, SegmentSettings
from vlsm.runs.compare import compare_run
from vlsm.runs.lifecycle import Run, finish_run
from vlsm.runs.plan import PlanWriter, cut_shards, shard_table
from vlsm.runs.record import make_record, write_record
from vlsm.runs.results import write_part
from vlsm.segmentation.masks import describe_mask, encode_png, encode_probability

_PROMPTS = ["polyp", "a <b>fold</b>"]
_RUN_ID = "fuzz"


def draw_output(folder: Path, images: Files, sizes: dict[tuple[str, str | None], tuple[int, int]]) -> None:
    """Write images, and below `o` the finished OUTPUT of a run over them.

    Args:
        folder: empty folder.
        images: their files.
        sizes: (height, width) of each image, by the path of its file and its selector.
    """
    for name, data in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    output = str(folder / "o")
    settings = SegmentSettings(
        input="i",
        output="o",
        members=(MemberSettings(checkpoint="c"),),
        prompts=tuple(_PROMPTS),
        label_maps=True,
        probability_maps="all",
    )
    planned = [_plan(name, selector) for name, selector in sizes]
    writer = PlanWriter(output, _RUN_ID, settings.kinds)
    for shard in cut_shards(planned, 8):
        writer.add(shard_table(shard))
    plan = writer.finish()
    record = make_record(settings, {"run_id": _RUN_ID, "checkpoint_digests": ["ab" * 32]}, asdict(plan))
    fixed = {"git_revision": "cd" * 20, "planned_at": "2026-01-02T03:04:05+00:00"}  # equal seeds give equal files
    write_record(output, record | fixed)
    rows = [row for (name, selector), size in sizes.items() for row in _rows(name, selector, size)]
    per_shard = 6 * (8 // 2) // 2  # 8 planned rows are 4 images with 2 prompts, and each image has 3 rows
    for number in range(plan.num_shards):
        write_part(output, number, rows[number * per_shard : (number + 1) * per_shard], _RUN_ID, 0)
    run = Run(settings.model_copy(update={"output": output}), (), plan, _RUN_ID)
    finish_run(run, compare_run(output, plan, _RUN_ID), 0, 1.0)


def _plan(name: str, selector: str | None) -> dict[str, Any]:
    absent = dict.fromkeys(("offset", "length", "problem", "image_version", "size_bytes", "etag", "mtime"))
    return absent | _name(name, selector) | {"prompts": _PROMPTS}


def _name(name: str, selector: str | None) -> dict[str, Any]:
    image_id = name if selector is None else f"{name}#{selector}"
    return {"image_id": image_id, "image_uri": name, "selector": selector}


def _rows(name: str, selector: str | None, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Return the rows of an image: a mask for each prompt, and a label map."""
    labels = np.zeros(size, np.uint8, order="F")
    labels[1:3, 1:4], labels[3:, :2] = 1, 2
    common = _name(name, selector) | {"model": "pixel@0", "status": "ok", "height": size[0], "width": size[1]}
    common |= {"grey_rule": "stored", "content_sha256": "0" * 64}
    rows = []
    for label, prompt in enumerate(_PROMPTS, start=1):
        mask = np.asfortranarray(labels == label)
        probability = np.where(mask, 0.8, 0.1)
        row = {"prompt": prompt, "kind": "mask", "probability_map": encode_probability(probability)}
        rows.append(common | asdict(describe_mask(mask, probability)) | row)
    union = np.asfortranarray(labels > 0)
    row = {"prompt": '["polyp", "a <b>fold</b>"]', "kind": "labels", "label_map": encode_png(labels)}
    return [*rows, common | asdict(describe_mask(union, np.ones(size))) | row]
