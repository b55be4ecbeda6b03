"""A run that keeps a vector of each image."""

import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import vlsm
from jobs import segment, verify
from tests.tiny import save_tiny_clipseg
from vlsm.runs.results import read_rows


@pytest.mark.usefixtures("in_process")
def test_a_run_keeps_one_vector_of_each_image(archive, tiny_checkpoint, tmp_path, caplog):
    import torch

    torch.manual_seed(3)
    model = vlsm.build_model("clipseg", source=str(save_tiny_clipseg(tmp_path / "hub")), image_size=64)
    vlsm.save_checkpoint(model, tmp_path / "clipseg", prompt="polyp")
    output, words = tmp_path / "masks", ["--set", "embedding=true", "--set", "prompts=[polyp, lesion]"]
    (archive / "broken.png").write_bytes(b"no image")
    members = json.dumps([{"checkpoint": str(tiny_checkpoint)}, {"checkpoint": str(tmp_path / "clipseg")}])
    words += ["--set", f"members={members}", "--set", "shard_rows=6", "--set", "run.max_failed_fraction=1"]
    with caplog.at_level(logging.INFO):
        assert segment.main([str(archive), str(output), *words]) == 0
    assert "embeddings are those of member 2, clipseg" in caplog.text
    segmenter = vlsm.Segmenter(vlsm.load_checkpoint(tmp_path / "clipseg"), device="cpu")
    rows = list(read_rows(str(output)))
    assert len(rows) == 14
    for row in rows:
        if row["status"] == "failed" or row["prompt"] == "lesion":
            assert row["embedding"] is None
        else:
            expected = segmenter.segment(row["image_uri"], "polyp", embedding=True).embedding
            np.testing.assert_allclose(np.array(row["embedding"], np.float16), expected, atol=1e-3)
    parts = sorted((output / "masks").glob("part-*"))
    assert len(parts) > 1
    assert all(pq.read_schema(part).field("embedding").type == pa.list_(pa.float16(), 32) for part in parts)
    assert verify.main([str(output)]) == 0


def test_models_without_towers_are_refused_before_ray_starts(archive, tiny_checkpoint, tmp_path, capfd):
    words = [str(archive), str(tmp_path / "masks"), "--checkpoint", str(tiny_checkpoint), "--set", "embedding=true"]
    assert segment.main(words) == 2
    assert "unet_d has no pretrained image tower" in capfd.readouterr().err
    assert not (tmp_path / "masks").exists()
