import json
import os
import subprocess
import sys
import time
from argparse import Namespace

import psutil
import pytest

import vlsm
from jobs.benchmark import main
from jobs.benchmarks import decode, decoders, learner, output, peers, pipeline, s3, start, train
from jobs.benchmarks.busy import Levels
from tests.conftest import LONG_S
from tests.tiny import TINY_CLIPSEG, save_tiny_clipseg, tiny_options


@pytest.mark.parametrize(
    "names", [["pixel"], pytest.param(["biomedclipseg", "unet_d"], marks=pytest.mark.nightly)], ids="-".join
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


@pytest.mark.nightly
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


@pytest.mark.nightly
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


@pytest.mark.nightly
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


@pytest.mark.nightly
@pytest.mark.ray
def test_the_train_jobs_loop_is_compared_with_a_bare_one(ray_cluster, tmp_path):
    path = tmp_path / "train.json"
    words = ["--model", "pixel", "--examples", "16", "--repeats", "1", "--setup", "one worker", "--json", str(path)]
    words += ["--option", "image_size=32", "--busy", "0", "--busy", "1"]
    assert main(["train", *words]) == 0
    figures = json.loads(path.read_text())
    assert [(row["setup"], row["busy"], len(row["turns"])) for row in figures["runs"]] == [
        ("one worker", 0, 1), ("one worker", 1, 1)
    ]  # fmt: skip
    for row in figures["runs"]:
        assert 0 < row["efficiency"] == pytest.approx(row["job_per_s"] / row["bare_per_s"])
        assert row["niceness"] == os.nice(0)
    page = "\n".join(train.tell(figures))
    assert "with image_size=32" in page and f"| one worker, 1 busy loops, niceness {os.nice(0)} |" in page


def _tiny_clipseg(monkeypatch, module, folder):
    source = save_tiny_clipseg(folder / "clipseg").parent

    def build(name, parts, device, options=None):
        return vlsm.build_model(name, **tiny_options(source)[name]).eval()

    monkeypatch.setattr(module, "build_architecture", build)


@pytest.mark.nightly
def test_every_way_to_train_is_compared_with_a_bare_loop(tmp_path, capsys, monkeypatch):
    _tiny_clipseg(monkeypatch, learner, tmp_path)
    ways = [name for name, way in learner.WAYS.items() if not way.compile]  # a compiler takes half a minute
    path = tmp_path / "learner.json"
    words = [*(word for name in ways for word in ("--way", name)), "--batch-size", "2", "--steps", "1"]
    assert main(["learner", *words, "--repeats", "1", "--device", "cpu", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert [row["way"] for row in figures["runs"]] == ways and figures["failed"] == {}
    assert all(row["efficiency"] > 0 and row["last_loss"] > 0 and not row["warnings"] for row in figures["runs"])
    assert figures["out_of_memory"].startswith("the machine has too little memory (")
    assert "lower run.micro_batch_size (now 2;" in capsys.readouterr().out
    assert "| FSDP |" in "\n".join(learner.tell(figures))


def test_a_way_that_fails_is_told_and_the_others_run(tmp_path, monkeypatch):
    _tiny_clipseg(monkeypatch, learner, tmp_path)
    monkeypatch.setitem(learner.WAYS, "fp32", learner.Way(trainable="none"))
    path = tmp_path / "learner.json"
    words = ["--way", "fp32", "--way", "bf16", "--batch-size", "2", "--steps", "1", "--repeats", "1", "--device", "cpu"]
    assert main(["learner", *words, "--json", str(path)]) == 1
    figures = json.loads(path.read_text())
    assert list(figures["failed"]) == ["fp32"] and [row["way"] for row in figures["runs"]] == ["bf16"]


def test_decoders_are_compared_by_pixels_and_masks(tmp_path, monkeypatch):
    pytest.importorskip("torchcodec")
    _tiny_clipseg(monkeypatch, decoders, tmp_path)
    path = tmp_path / "decoders.json"
    assert main(["decoders", "--images", "3", "--repeats", "1", "--device", "cpu", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    (row,) = figures["runs"]
    assert (figures["images"], row["encoded"], figures["failed"]) == (3, 3, [0, 0])
    assert row["largest_difference"] <= 2 and row["smallest_dice"] > 0.8


@pytest.mark.parametrize("name", ["learner", "decoders", "gpu"])
def test_a_benchmark_of_gpus_says_that_there_is_none(name, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([name]) == 2
    assert "--device cpu tries the benchmark without one" in capsys.readouterr().err


def _write_turns(path, count, is_whole=True):
    turns = [{"steps_s": 1.0, "bare_s": 0.5, "niceness": 0} for _ in range(count)]
    if not is_whole:
        del turns[-1]["bare_s"]
    path.with_suffix(".new").write_text(json.dumps(turns))
    path.with_suffix(".new").replace(path)


def _loops():
    """The busy loops of this process, which may have other children."""
    children = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in children if "getppid" in " ".join(child.cmdline())]


def _wait_until(is_true):
    deadline_s = time.monotonic() + LONG_S
    while not is_true() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert is_true()


def test_busy_loops_start_after_the_first_turn_and_end_with_their_level(tmp_path):
    path = tmp_path / "turns.json"
    with Levels(path, [1, 0], 2, 60, lambda turn: "bare_s" in turn) as levels:
        assert not _loops()
        _write_turns(path, 1)
        _wait_until(_loops)
        _write_turns(path, 3, is_whole=False)
        assert _loops() and not levels.turns
        _write_turns(path, 3)
        _wait_until(lambda: levels.turns and not _loops())
        _write_turns(path, 5)
    assert [len(turns) for turns in levels.turns] == [2, 2]


def test_a_level_without_a_turn_in_time_gives_an_upper_bound(tmp_path):
    path = tmp_path / "turns.json"
    _write_turns(path, 1)
    with Levels(path, [1], 2, 0.2, lambda turn: "bare_s" in turn) as levels:
        _wait_until(lambda: levels.turns and not _loops())
    args = Namespace(examples=16, busy_limit=0.2)
    idle = train._row("one worker", 1, [{"steps_s": 1.0, "bare_s": 0.5}], args, [])
    row = train._row("one worker", 1, levels.turns[0], args, [idle])
    assert row["is_bound"] and row["job_per_s"] == 16 / 0.2 and row["efficiency"] == 80 / 32
    figures = {"model": "unet_d", "batch_size": 8, "examples": 16, "repeats": 1, "runs": [idle, row]}
    assert "| < 80.0 | - | < 2.50x | < 5.00x | - | - |" in "\n".join(train.tell(figures))
    assert "< 80.00" in train._line(row)


def test_busy_loops_end_with_a_killed_benchmark():
    code = "import time\nfrom jobs.benchmarks.busy import busy_cores\n"
    code += "with busy_cores(1) as ids:\n    print(*ids, flush=True)\n    time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as benchmark:
        loop = psutil.Process(int(benchmark.stdout.readline()))
        benchmark.kill()
    _wait_until(lambda: not loop.is_running() or loop.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.nightly
def test_both_clients_of_s3_read_over_http_and_over_tls(tmp_path):
    path = tmp_path / "s3.json"
    assert main(["s3", "--gets", "64", "--threads", "2", "--repeats", "1", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    schemes = ("http", "https")
    assert [(row["client"], row["scheme"]) for row in figures["runs"]] == [(c, s) for s in schemes for c in s3.CLIENTS]
    assert all(row["core_ms"] > 0 for row in figures["runs"])
    assert "| obstore | https |" in "\n".join(s3.tell(figures))


@pytest.mark.nightly
def test_the_start_of_both_jobs_is_told_by_its_milestones(tmp_path):
    path = tmp_path / "start.json"
    assert main(["start", "--model", "pixel", "--repeats", "1", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    jobs = ["segment", "train", "libraries alone"]
    assert [(row["job"], row["model"]) for row in figures["runs"]] == [(job, "pixel") for job in jobs]
    for row in figures["runs"]:
        assert list(row["seconds"].values()) == sorted(row["seconds"].values())
    *runs, floor = [row["seconds"].keys() for row in figures["runs"]]
    assert all({"checked", "Ray", "model"} < reached for reached in runs) and floor == {"Ray", "libraries"}
    assert "| train | `pixel` | checked " in "\n".join(start.tell(figures))
