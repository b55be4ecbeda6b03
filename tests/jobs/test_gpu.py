import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jobs.benchmark import main
from jobs.benchmarks import gpu
from tests.conftest import LONG_S


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One model, on the CPU, where ray cannot be imported."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    words = ["gpu", "--device", "cpu", "--small", "--model", "pixel", "--json", str(path)]
    code = f"""
import sys
sys.modules["ray"] = None
from jobs.benchmark import main
from jobs.benchmarks import gpu
sys.exit(main({words!r}))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


@pytest.mark.nightly
def test_a_model_is_measured_without_ray_and_agrees_with_itself_in_float32(run):
    shown, report = run
    assert report["device"] == "CPU" and report["torch"] == torch.__version__
    (speed,) = report["runs"]
    assert speed["name"] == "pixel" and speed["error"] is None and speed["graph_breaks"] == 0
    assert speed["largest_difference"] < 0.02
    assert speed["mask_dice"] > 0.9  # cut at the median, where most probabilities are
    assert "pixel" in shown


@pytest.mark.nightly
def test_the_figures_follow_from_each_other(run):
    _, report = run
    (speed,) = report["runs"]
    assert min(speed["fp32_per_s"], speed["bf16_per_s"], speed["compiled_per_s"], speed["compile_s"]) > 0
    best = max(speed["bf16_per_s"], speed["compiled_per_s"])
    assert speed["decode_cores"] == pytest.approx(best / speed["decoded_per_s"])
    flop_per_s = speed["compiled_per_s"] * speed["gflop"] * 1e9
    assert speed["peak_share"] == pytest.approx(flop_per_s / report["peak_tflop_s"] / 1e12)


def test_the_job_around_a_model_is_measured_by_stage_without_ray(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    path = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--small", "--model", "pixel", "--json", str(path)]
    assert main(["gpu", *words]) == 0
    report = json.loads(path.read_text())
    assert not report["failed"] and not report["left_out"]
    assert [(row["name"], row["num_prompts"]) for row in report["job"]] == [("pixel", 1), ("pixel", 10)]
    for row in report["job"]:
        assert not row["errors"] and row["pipeline_per_s"] is None
        assert min(row["bare_per_s"], row["segmenter_per_s"], row["actor_per_s"]) > 0
        assert set(row["core_ms"]) == {"fetch", "actor", "write"} and min(row["core_ms"].values()) > 0
        assert row["device_cores"] == pytest.approx(row["actor_per_s"] * sum(row["core_ms"].values()) / 1000)
    assert "pixel" in capsys.readouterr().out
    page = "\n".join(gpu.tell(report))
    assert "| `pixel` | 10 |" in page and "| `pixel` | 32 |" in page


def test_figures_of_earlier_versions_are_still_told():
    earlier = json.loads((Path(gpu.__file__).parents[1] / "measured/gpu-h200.json").read_text())
    assert "job" not in earlier
    assert any("| `clipseg` | 352 | 504 |" in line for line in gpu.tell(earlier))


def test_a_model_that_cannot_be_compiled_is_a_row_with_the_reason(monkeypatch, tmp_path, capsys):
    def refuse(run, **options):
        def call(images):
            raise RuntimeError("no kernel for this")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    path = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--small", "--model", "pixel", "--prompts", "1", "--json", str(path)]
    assert main(["gpu", *words]) == 0
    report = json.loads(path.read_text())
    (speed,), (job,) = report["runs"], report["job"]
    assert speed["compiled_per_s"] is None and speed["bf16_per_s"] > 0
    assert job["errors"] == {"compile": "RuntimeError: no kernel for this"} and job["bare_per_s"] > 0
    assert "not compiled: RuntimeError: no kernel for this" in capsys.readouterr().out


def test_models_beyond_the_time_limit_are_named(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--small", "--model", "pixel", "--seconds-limit", "-1", "--json", str(path)]
    assert main(["gpu", *words]) == 1
    assert json.loads(path.read_text())["left_out"] == ["job of pixel, 1", "job of pixel, 10", "pixel"]
    assert "left out" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_it_says_so(capsys):
    assert main(["gpu"]) == 2
    assert capsys.readouterr().err == (
        "error: torch sees no CUDA device here; --device cpu tries the benchmark without one\n"
    )
