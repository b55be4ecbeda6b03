import json

import pytest

from jobs.benchmark import main
from jobs.benchmarks import decode, output, peers, pipeline, s3, start, train
from tests.tiny import TINY_CLIPSEG


@pytest.mark.parametrize(
    "names", [["pixel"], pytest.param(["biomedclipseg", "unet_d"], marks=pytest.mark.slow)], ids="-".join
)
def test_models_are_measured_against_the_plain_way_and_agree_with_it(tmp_path, capsys, names):
    path = tmp_path / "models.json"
    arguments = [*(word for name in names for word in ("--model", name)), "--repeats", "1", "--json", str(path)]
    assert main(["models", *arguments]) == 0
    report = json.loads(path.read_text())
    assert [speed["name"] for speed in report["runs"]] == names
    assert report["cpu"]
    for speed in report["runs"]:
        assert speed["largest_difference"] < 1e-4  # padding computed or not, batch norms folded or not
    assert names[0] in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.ray
def test_the_jobs_steady_state_is_compared_with_the_bare_model_loop(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setitem(pipeline.CASES, "pixel", pipeline.Case({}, 8, 16, 40_000, 16, (48, 49)))
    path = tmp_path / "pipeline.json"
    words = ["--model", "pixel", "--source", "disk", "--repeats", "1", "--seconds", "0.2", "--json", str(path)]
    assert main(["pipeline", *words]) == 0
    figures = json.loads(path.read_text())
    (row,) = figures["runs"]
    assert row["efficiency"] == row["job_per_s"] / row["bare_per_s"]
    assert "| `pixel` | disk |" in "\n".join(pipeline.tell(figures))


@pytest.mark.slow
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


def test_decoding_is_compared_with_other_libraries_and_keeps_to_pillows_pixels(tmp_path):
    path = tmp_path / "decode.json"
    assert main(["decode", "--images", "2", "--repeats", "1", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    ours = [row for row in figures["runs"] if row["way"] == "vlsm"]
    assert [(row["format"], row["size"]) for row in ours] == [(f, s) for f in ("JPEG", "PNG") for s in (224, 352)]
    assert all(row["largest_difference"] <= 1 for row in ours)
    assert "| vlsm |" in "\n".join(decode.tell(figures))


def test_masks_in_parquet_are_compared_with_png_files(tmp_path):
    path = tmp_path / "output.json"
    assert main(["output", "--masks", "4", "--repeats", "1", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert [row["as"] for row in figures["runs"]][:4] == ["run lengths in Parquet", "PNG", "PNG, 1 bit", "bitmap"]
    assert figures["runs"][7]["bytes"] == 352 * 352 / 8
    assert "| drawn (4) | 352 |" in "\n".join(output.tell(figures))


@pytest.mark.slow
@pytest.mark.ray
def test_the_train_jobs_loop_is_compared_with_a_bare_one(ray_cluster, tmp_path):
    path = tmp_path / "train.json"
    words = ["--model", "pixel", "--examples", "16", "--repeats", "1", "--setup", "one worker", "--json", str(path)]
    assert main(["train", *words]) == 0
    figures = json.loads(path.read_text())
    (row,) = figures["runs"]
    assert 0 < row["efficiency"] == pytest.approx(row["job_per_s"] / row["bare_per_s"])
    assert len(row["turns"]) == 2
    assert "| one worker |" in "\n".join(train.tell(figures))


@pytest.mark.slow
def test_both_clients_of_s3_read_over_http_and_over_tls(tmp_path):
    path = tmp_path / "s3.json"
    assert main(["s3", "--gets", "64", "--threads", "2", "--repeats", "1", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    schemes = ("http", "https")
    assert [(row["client"], row["scheme"]) for row in figures["runs"]] == [(c, s) for s in schemes for c in s3.CLIENTS]
    assert all(row["core_ms"] > 0 for row in figures["runs"])
    assert "| obstore | https |" in "\n".join(s3.tell(figures))


@pytest.mark.slow
def test_the_start_of_both_jobs_is_told_by_its_milestones(tmp_path):
    path = tmp_path / "start.json"
    assert main(["start", "--model", "pixel", "--repeats", "1", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert [(row["job"], row["model"]) for row in figures["runs"]] == [("segment", "pixel"), ("train", "pixel")]
    for row in figures["runs"]:
        assert list(row["seconds"].values()) == sorted(row["seconds"].values())
        assert {"checked", "Ray", "model"} < row["seconds"].keys()
    assert "| train | `pixel` | checked " in "\n".join(start.tell(figures))
