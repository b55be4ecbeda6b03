import dataclasses
import json

import numpy as np
import pytest
import yaml

from jobs import verify
from vlsm.runs.plan import write_plan
from vlsm.runs.results import write_part
from vlsm.runs.verify import verify_run
from vlsm.segmentation.masks import encode_mask, encode_probability


@pytest.mark.parametrize(
    ("probability_map", "difference"),
    [
        (None, None),
        (encode_probability(np.full((3, 4), 0.7)), None),
        (
            encode_probability(np.full((4, 3), 0.7)),
            "the probability map has another size than the mask",
        ),
        (b"no picture", "the row cannot be read: SyntaxError: "),
    ],
)
def test_a_probability_map_has_the_size_of_its_mask(tmp_path, probability_map, difference):
    output = str(tmp_path)
    image = {"image_id": "a.png", "image_uri": "/a.png", "prompts": ["polyp"]}
    plan = write_plan(output, [image], 8)
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"config": {}, "plan": dataclasses.asdict(plan), "run_id": "r"})
    )
    mask = np.zeros((3, 4), np.uint8)
    row = {"image_id": "a.png", "image_uri": "/a.png", "prompt": "polyp", "kind": "mask", "model": "m", "status": "ok"}
    row |= {"height": 3, "width": 4, "mask_rle": encode_mask(mask), "area_px": 0, "probability_map": probability_map}
    write_part(output, 0, [row], "r", 0)
    *_, proof = verify_run(output)
    expected = [f"masks/part-00000000.parquet: 'a.png', 'polyp': {difference}"] if difference else []
    found = [text for text in proof.differences if "is not finished" not in text]
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("embedding", "difference"),
    [
        ([0.6, 0.8], None),
        (None, "status is ok, but the first row of the image has no embedding"),
        ([0.6, 0.6], "the embedding has the length 0.849; it must be 1"),
        ([0.6, np.nan], "the embedding has the length nan; it must be 1"),
    ],
)
def test_each_image_of_a_run_with_embeddings_has_one_of_length_1(tmp_path, embedding, difference):
    output = str(tmp_path)
    image = {"image_id": "a.png", "image_uri": "/a.png", "prompts": ["polyp", "lesion"]}
    record = {"config": {"embedding": True}, "plan": dataclasses.asdict(write_plan(output, [image], 8)), "run_id": "r"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(record))
    row = {"image_id": "a.png", "image_uri": "/a.png", "prompt": "polyp", "kind": "mask", "model": "m", "status": "ok"}
    row |= {"height": 3, "width": 4, "mask_rle": encode_mask(np.zeros((3, 4), np.uint8)), "area_px": 0}
    write_part(output, 0, [row | {"embedding": embedding}, row | {"prompt": "lesion"}], "r", 0, 2)
    *_, proof = verify_run(output)
    found = [text for text in proof.differences if "is not finished" not in text]
    assert found == ([f"masks/part-00000000.parquet: 'a.png', 'polyp': {difference}"] if difference else [])


def write_run(output, num_parts, **plan):
    images = [{"image_id": str(number), "image_uri": f"/{number}", "prompts": ["polyp"]} for number in range(6)]
    plan = dataclasses.asdict(write_plan(str(output), images, 2)) | plan
    (output / "config.yaml").write_text(yaml.safe_dump({"config": {}, "plan": plan, "run_id": "r"}))
    for shard in range(num_parts):
        rows = [
            {"image_id": image["image_id"], "image_uri": image["image_uri"], "prompt": "polyp", "kind": "mask"}
            | {"model": "m", "status": "failed", "error": "corrupt: it is"}
            for image in images[2 * shard : 2 * shard + 2]
        ]
        write_part(str(output), shard, rows, "r", 0)


def test_what_a_run_has_not_written_yet_is_one_sentence_before_what_is_wrong(tmp_path, capsys):
    write_run(tmp_path, num_parts=1)
    said = "the run is not finished: 2 of 6 images have all of their rows, and 1 of 3 parts are written"
    *_, proof = verify_run(str(tmp_path))
    assert proof.differences == [said]
    assert verify.main([str(tmp_path)]) == 1
    found = capsys.readouterr()
    assert found.out == said + "\n" and "is not finished; its rows so far are as planned" in found.err
    (tmp_path / "masks" / "part-00000001.parquet").write_bytes(b"PAR1")
    (tmp_path / "masks" / "other.parquet").write_bytes(b"")
    *_, proof = verify_run(str(tmp_path))
    wrong = [
        "masks/other.parquet is no part of this run",
        "masks/part-00000001.parquet is missing, damaged or of another run: no rows of 2 images",
    ]
    assert proof.differences == [said, *wrong]
    assert verify.main([str(tmp_path)]) == 1 and "3 differences between" in capsys.readouterr().err
    summary = {"ok": 0, "failed": 6, "vanished": 0, "rows": 6, "failed_by_reason": {"corrupt": 6}, "planned": 6}
    (tmp_path / "summary.json").write_text(json.dumps(summary))  # now the missing part is an error
    *_, proof = verify_run(str(tmp_path))
    assert proof.differences[2].startswith("masks/part-00000002.parquet is missing") and said not in proof.differences


def test_a_run_whose_archive_is_still_being_listed_is_not_finished(tmp_path):
    write_run(tmp_path, num_parts=0, is_complete=False, num_images=0, num_rows=0, num_shards=0)
    *_, proof = verify_run(str(tmp_path))
    assert proof.differences == [
        "the run is not finished: 0 of 6 images that are planned so far have all of their rows, and 0 of 3 parts are "
        "written"
    ]
