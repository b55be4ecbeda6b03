import json

import pytest

from jobs.benchmark import main
from jobs.benchmarks import peers, pipeline
from tests.tiny import TINY_CLIPSEG


def test_models_are_measured_against_the_plain_way_and_agree_with_it(tmp_path, capsys):
    path = tmp_path / "models.json"
    arguments = ["--model", "biomedclipseg", "--model", "unet_d", "--repeats", "1", "--json", str(path)]
    assert main(["models", *arguments]) == 0
    report = json.loads(path.read_text())
    assert [speed["name"] for speed in report["models"]] == ["biomedclipseg", "unet_d"]
    assert report["cpu"]
    for speed in report["models"]:
        assert speed["largest_difference"] < 1e-4  # padding computed or not, batch norms folded or not
    assert "biomedclipseg" in capsys.readouterr().out


@pytest.mark.ray
def test_the_jobs_steady_state_is_compared_with_the_bare_model_loop(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setitem(pipeline.CASES, "pixel", pipeline.Case({}, 8, 16, 4000, 16, (48, 49)))
    path = tmp_path / "pipeline.json"
    words = ["--model", "pixel", "--source", "disk", "--repeats", "1", "--seconds", "0.2", "--json", str(path)]
    assert main(["pipeline", *words]) == 0
    figures = json.loads(path.read_text())
    (row,) = figures["runs"]
    assert row["efficiency"] == row["job_per_s"] / row["bare_per_s"]
    assert "| `pixel` | disk |" in "\n".join(pipeline.tell(figures))


@pytest.mark.ray
def test_the_job_is_compared_with_a_usual_way_and_its_masks_are_the_same(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "CLIPSEG", TINY_CLIPSEG)
    monkeypatch.setattr(peers, "NUM_FILES", 8)
    path = tmp_path / "peers.json"
    words = ["--prompts", "2", "--way", "card", "--repeats", "1", "--seconds", "0.2", "--json", str(path)]
    assert main(["peers", *words]) == 0
    figures = json.loads(path.read_text())
    assert [row["way"] for row in figures["runs"]] == ["card"]
    assert all(row["dice"] > 0.99 for row in figures["runs"])
    assert "| card | 2 |" in "\n".join(peers.tell(figures))
