"""How far a run is, told from a folder that was written by hand."""

import io
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import evaluate, segment, status, sweep, train
from vlsm import storage
from vlsm.config import SegmentSettings, dump_yaml, load_settings
from vlsm.errors import ConfigError
from vlsm.evaluation.settings import EvaluateSettings
from vlsm.evaluation.sweep import SweepSettings, plan_trial_groups
from vlsm.report import status as core
from vlsm.report.rerun import rerun_command
from vlsm.runs.lease import Lease
from vlsm.runs.plan import Plan, PlanWriter, cut_shards, new_plan_id, shard_table, write_plan
from vlsm.runs.record import make_record, read_record, write_record
from vlsm.runs.results import part_name, write_part
from vlsm.training.history import History, Row
from vlsm.training.settings import TrainSettings

NOW_S = 1_800_000_000.0


def plan_rows(count):
    row = {"selector": None, "offset": None, "length": None, "problem": None, "prompts": ["polyp"]}
    row |= {"image_version": None, "size_bytes": None, "etag": None, "mtime": None}
    return [row | {"image_id": f"{number:05d}", "image_uri": f"scans/{number:05d}"} for number in range(count)]


def settings_of(output, *words):
    arguments = {"input": "scans", "output": str(output), "members": [{"checkpoint": "checkpoint"}]}
    return load_settings(SegmentSettings, None, ["prompts=[polyp]", *words], arguments)


def write_run(output, num_images, num_parts, per_shard=4, seconds=1.0):
    """A run of which some parts are written, one a second until now; each has a failed image."""
    plan = write_plan(str(output), plan_rows(num_images), per_shard)
    write_record(str(output), make_record(settings_of(output), {"run_id": "run"}, asdict(plan)))
    for shard in range(num_parts):
        images = plan_rows(num_images)[shard * per_shard : (shard + 1) * per_shard]
        put_part(output, shard, images, NOW_S - (num_parts - shard - 1) * seconds)
    for path in (output / "manifest").iterdir():
        os.utime(path, (NOW_S - 3600, NOW_S - 3600))
    return plan


def put_part(output, shard, images, time_s):
    common = {"prompt": "polyp", "kind": "mask", "model": "m"}
    states = [{"status": "failed", "error": "corrupt: it is"}, *[{"status": "ok"}] * (len(images) - 1)]
    rows = [
        {"image_id": image["image_id"], "image_uri": image["image_uri"], **common, **state}
        for image, state in zip(images, states, strict=True)
    ]
    write_part(str(output), shard, rows, "run", 0)
    os.utime(output / "masks" / part_name(shard), (time_s, time_s))


def test_a_run_under_way_tells_what_is_done_how_fast_and_how_long_it_takes(tmp_path):
    write_run(tmp_path, num_images=40, num_parts=5)
    found = core.read_status(str(tmp_path), now_s=NOW_S)
    assert (found.is_finished, found.is_listing, found.is_exact) == (False, False, True)
    assert (found.planned_images, found.planned_parts, found.parts, found.rows) == (40, 10, 5, 20)
    assert (found.ok, found.failed, found.vanished, found.failed_by_reason) == (15, 5, 0, {"corrupt": 5})
    assert (found.images_per_s, found.seconds_left, found.silent_s) == (4.0, 5.0, 0.0)
    assert found.is_running is None and found.next_steps[0].startswith("no job gives signs of life; if no job of an ")
    text = "\n".join(core.describe_status(found))
    assert "done: 20 images (50.0 %), 5 parts, 20 rows" in text and "rate: 4.0 images/s, 0:00:05 left" in text


def test_a_run_that_died_tells_how_to_go_on(tmp_path):
    write_run(tmp_path, num_images=40, num_parts=5)
    found = core.read_status(str(tmp_path), now_s=NOW_S + 7200)
    assert (found.images_per_s, found.seconds_left, found.silent_s) == (None, None, 7200)
    (step,) = found.next_steps
    assert step.endswith(f" this command resumes it: {rerun_command(str(tmp_path), read_record(str(tmp_path)))}")


def test_a_run_that_has_only_its_plan_has_nothing_done(tmp_path):
    write_run(tmp_path, num_images=40, num_parts=0)
    found = core.read_status(str(tmp_path), now_s=NOW_S)
    assert (found.parts, found.rows, found.images_per_s, found.silent_s) == (0, 0, None, 3600)


def test_a_part_of_another_run_is_not_done(tmp_path):
    write_run(tmp_path, num_images=40, num_parts=5)
    write_part(str(tmp_path), 0, [], "another", 0)
    assert core.read_status(str(tmp_path), now_s=NOW_S).ok == 12


def test_of_many_parts_a_sample_is_read_unless_all_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "_MOST_READ", 3)
    write_run(tmp_path, num_images=40, num_parts=8)
    found, exact = (core.read_status(str(tmp_path), exact, now_s=NOW_S) for exact in (False, True))
    assert (found.is_exact, exact.is_exact) == (False, True)
    assert (found.ok, found.failed, found.rows) == (exact.ok, exact.failed, exact.rows) == (24, 8, 32)
    assert "done: about 32 images" in "\n".join(core.describe_status(found))


def test_a_plan_that_is_still_being_written_tells_so(tmp_path):
    writer = PlanWriter(str(tmp_path), new_plan_id())
    for shard in cut_shards(plan_rows(600), 4):
        writer.add(shard_table(shard))  # 150 shards, of which two files of 64 are written
    plan = Plan(writer.plan_id, is_complete=False)
    write_record(str(tmp_path), make_record(settings_of(tmp_path), {"run_id": "run"}, asdict(plan)))
    put_part(tmp_path, 0, plan_rows(4), NOW_S)
    found = core.read_status(str(tmp_path), now_s=NOW_S)
    assert (found.is_listing, found.planned_images, found.planned_parts, found.ok) == (True, 512, 128, 3)
    assert "so far: INPUT is still being listed" in "\n".join(core.describe_status(found))


def test_a_finished_run_is_told_by_its_summary_and_what_failed_can_be_done_again(tmp_path):
    write_run(tmp_path, num_images=8, num_parts=2)
    summary = {"ok": 6, "failed": 2, "vanished": 0, "rows": 8, "failed_by_reason": {"corrupt": 2}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    found = core.read_status(str(tmp_path), now_s=NOW_S)
    assert (found.is_finished, found.ok, found.failed, found.seconds_left) == (True, 6, 2, 0)
    assert found.next_steps[0].endswith("--set=retry_failed=true")
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"failed": 0}))
    assert "python -m jobs.verify" in core.read_status(str(tmp_path), now_s=NOW_S).next_steps[0]


def settings_of_command(command, module, monkeypatch):
    """What a command line sets, by the job's own parser."""
    seen = []
    monkeypatch.setattr(module, module.__name__.rpartition(".")[2], seen.append)  # without a result to describe
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", module.__name__] and module.main(words[3:]) == 0
    return seen[0]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["threshold=0.4", "tile.size=64", "run.actors=1..4", "window=[40, 400]", "review.min_agreement=null"],
        ["prompts=[a 'flat' polyp, é]", "classes={a 'flat' polyp: [one, two]}"],
        ["members=[{checkpoint: /one, weight: 2, flip: true}, {checkpoint: /two, prompts: {polyp: lesion}}]"],
    ],
)
def test_the_command_that_goes_on_has_the_settings_of_the_run(words, tmp_path, monkeypatch):
    tree = {"input": "/scans", "output": str(tmp_path)}
    tree |= {} if "members" in str(words) else {"members": [{"checkpoint": "/checkpoint"}]}
    settings = load_settings(SegmentSettings, None, ["prompts=[polyp]", *words], tree)
    write_record(str(tmp_path), make_record(settings, {"run_id": "run"}, {}))
    command = rerun_command(str(tmp_path), read_record(str(tmp_path)), "retry_failed=true")
    again = settings_of_command(command, segment, monkeypatch)
    assert again == settings.model_copy(update={"retry_failed": True})


def test_the_command_that_goes_on_with_a_training_has_its_settings(tmp_path, monkeypatch):
    words = ["model=unet_d", "options.width=4", "optim.lr=0.00001", "external.other=/other", "run.workers=1..2"]
    tree = {"output": str(tmp_path), "datasets": {"kvasir": "/kvasir"}}
    settings = load_settings(TrainSettings, None, words, tree)
    write_record(str(tmp_path), make_record(settings, {}, {"epochs": 3}))
    assert settings_of_command(rerun_command(str(tmp_path), read_record(str(tmp_path))), train, monkeypatch) == settings


def write_training(output, num_epochs):
    settings = load_settings(
        TrainSettings, None, ["model=unet_d", "optim.epochs=5"], {"output": str(output), "datasets": {"a": "/a"}}
    )
    write_record(str(output), make_record(settings, {}, {"epochs": 5}))
    rows = [
        Row(epoch, epoch, split, "mean", 1 / epoch, dice, 4, 0.1, 60.0, NOW_S - 60 * (num_epochs - epoch))
        for epoch, dice in zip(range(1, num_epochs + 1), (0.5, 0.8, 0.7), strict=False)
        for split in ("train", "val")
    ]
    sink = io.BytesIO()
    pq.write_table(History(rows).table(), sink)
    storage.write_bytes(str(output / "metrics.parquet"), sink.getvalue())


def test_a_training_tells_its_epochs_its_best_and_how_long_it_takes(tmp_path):
    write_training(tmp_path, num_epochs=3)
    found = core.read_status(str(tmp_path), now_s=NOW_S)
    assert (found.epochs, found.planned_epochs, found.best_epoch, found.best) == (3, 5, 2, 0.8)
    assert (found.seconds_per_epoch, found.seconds_left, found.is_finished) == (60, 120, False)
    assert "best: dice 0.8000 of validation, epoch 2" in core.describe_status(found)
    assert "python -m jobs.train" in found.next_steps[0]
    (tmp_path / "summary.json").write_text("{}")
    found = core.read_status(str(tmp_path), now_s=NOW_S)
    assert found.is_finished and "nothing is left to do" in found.next_steps[0]


def test_a_training_without_an_epoch_has_no_best(tmp_path):
    write_training(tmp_path, num_epochs=0)
    found = core.read_status(str(tmp_path), now_s=NOW_S)
    assert (found.epochs, found.best_epoch, found.seconds_left) == (0, None, None)


def test_a_training_in_its_first_epoch_says_that_it_runs_and_how_far_it_is(tmp_path):
    write_training(tmp_path, num_epochs=0)
    with Lease(str(tmp_path), "jobs.train", interval_s=0.02) as lease:
        lease.take()
        found = core.read_status(str(tmp_path))
        assert (found.is_running, found.epochs) == (True, 0)
        assert found.running.endswith("; before its first step")
        assert found.next_steps[0].startswith("a job works on it; ")
        lease.note({"epoch": 1, "epochs": 5, "step": 3, "steps": 40})
        while "step 3" not in (found := core.read_status(str(tmp_path))).running:
            time.sleep(0.02)
        text = "\n".join(core.describe_status(found))
        assert f"running: jobs.train, process {os.getpid()} on " in text and "; epoch 1 of 5, step 3 of 40\n" in text
        assert "last sign of life: 0:00:0" in text
        later = core.read_status(str(tmp_path), now_s=time.time() + 100)
        assert not later.is_running and later.next_steps[0].startswith("no job works on it; ")
    ended = core.read_status(str(tmp_path))  # at once, although the last epoch was a moment ago
    assert ended.running is None and ended.next_steps[0].startswith("no job works on it; ")


def test_a_training_whose_process_died_says_so_at_once(tmp_path):
    write_training(tmp_path, num_epochs=3)
    code = "import os, sys; from vlsm.runs.lease import Lease; Lease(sys.argv[1], 'jobs.train').take(); os._exit(9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2], check=False)
    found = core.read_status(str(tmp_path))
    assert found.is_running is False and found.next_steps[0].startswith("no job works on it; ")
    assert "not running any more: jobs.train, process " in "\n".join(core.describe_status(found))


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text(dump_yaml({"config": {}, "plan": {}}))
    for output in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="there is no run in"):
            core.read_status(str(output))


def test_the_command_needs_no_ray_and_prints_lines_or_json(tmp_path, without_ray):
    write_run(tmp_path, num_images=40, num_parts=5)
    texts = [without_ray(status.main, tmp_path, *more) for more in ([], ["--json"])]
    assert texts[0].stdout.startswith("state: not finished (segment run)\nplanned: 40 images in 10 parts\n")
    assert json.loads(texts[1].stdout)["ok"] == 15
    assert status.main([str(tmp_path / "nowhere")]) == 2


def test_times_of_a_store_are_those_of_its_files(s3_folder):
    storage.write_bytes(f"{s3_folder}/masks/a", b"a")
    (time_s,) = storage.list_times(f"{s3_folder}/masks").values()
    assert abs(time_s - time.time()) < 60
    assert storage.list_times(f"{s3_folder}/nothing") == {}


def write_job(output, settings, plan):
    (output / "config.yaml").parent.mkdir(parents=True, exist_ok=True)
    write_record(str(output), make_record(settings, {}, plan))


def test_an_evaluation_tells_what_it_is_how_far_and_how_to_go_on(tmp_path, monkeypatch):
    output = tmp_path / "scores"
    systems = {name: [{"checkpoint": f"/{name}"}] for name in ("ours", "theirs")}
    settings = EvaluateSettings(output=str(output), datasets={"a": "/a"}, systems=systems, baseline="ours", split="val")
    write_job(output, settings, {"runs": {name: f"runs/{name}" for name in systems}, "num_records": 3, "num_rows": 6})
    (output / "runs" / "ours").mkdir(parents=True)
    (output / "runs" / "ours" / "summary.json").write_text("{}")
    write_run(output / "runs" / "theirs", num_images=4, num_parts=0)
    found = core.read_status(str(output))
    text = "\n".join(core.describe_status(found))
    assert "state: not finished (evaluation)\ndone: 1 of 2 systems segmented\nsystem theirs has begun: " in text
    command = found.next_steps[0].partition("resumes it: ")[2]
    assert settings_of_command(command, evaluate, monkeypatch) == settings
    (output / "summary.json").write_text("{}")
    assert f"the table is {output}/table.md" in core.read_status(str(output)).next_steps[0]


def test_a_sweep_tells_what_it_is_how_far_and_how_to_go_on(tmp_path, monkeypatch):
    output = tmp_path / "sweep"
    models = {"small": {"model": "pixel"}, "large": {"model": "unet_d"}}
    settings = SweepSettings(output=str(output), datasets={"a": "/a"}, models=models, seeds=[0, 1])
    write_job(output, settings, {"trials": 4})
    (group,) = plan_trial_groups(settings)
    first = Path(group.trials[0].settings.output)
    first.mkdir(parents=True)
    (first / "summary.json").write_text("{}")
    found = core.read_status(str(output))
    assert core.describe_status(found)[:2] == ["state: not finished (sweep)", "done: 1 of 4 trainings finished"]
    command = found.next_steps[0].partition("resumes it: ")[2]
    assert settings_of_command(command, sweep, monkeypatch) == settings
