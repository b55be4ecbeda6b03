import dataclasses

import numpy as np
import pytest
import yaml

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
    found = [text for text in proof.differences if "summary.json" not in text]
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))
