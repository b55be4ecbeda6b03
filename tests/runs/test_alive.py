"""Signs of life of the jobs on one OUTPUT, with real processes, on a real disk and a real store."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.conftest import LONG_S
from vlsm import storage
from vlsm.config import SegmentSettings
from vlsm.errors import ConfigError, VlsmError
from vlsm.report.status import StartingStatus, describe_status, read_status
from vlsm.runs.alive import SignOfLife, read_signs
from vlsm.runs.plan import write_plan
from vlsm.runs.record import make_record, read_record, write_record

ROOT = Path(__file__).parents[2]
WORK = """
import sys, time
from vlsm.runs.alive import SignOfLife
with SignOfLife(sys.argv[1], "jobs.segment", interval_s=0.05) as sign:
    sign.begin()
    sign.note("3 of 8 images done")
    print("begun", flush=True)
    time.sleep(1000)
"""


@pytest.fixture(params=["disk", "store"])
def output(request, tmp_path):
    return str(tmp_path / "out") if request.param == "disk" else request.getfixturevalue("s3_folder") + "/out"


@pytest.fixture
def process(output):
    """Another process that works on OUTPUT."""
    worker = subprocess.Popen([sys.executable, "-c", WORK, output], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert worker.stdout.readline() == "begun\n"
    yield worker
    worker.kill()
    worker.communicate(timeout=LONG_S)


def plan_run(output):
    row = dict.fromkeys(("selector", "offset", "length", "problem", "image_version", "size_bytes", "etag", "mtime"))
    rows = [
        row | {"image_id": str(number), "image_uri": f"scans/{number}", "prompts": ["polyp"]} for number in range(8)
    ]
    settings = SegmentSettings(input="scans", output=output, members=[{"checkpoint": "checkpoint"}])
    write_record(output, make_record(settings, {"run_id": "run"}, asdict(write_plan(output, rows, 4))))


def files(output):
    return storage.list_names(f"{output}/alive")


def signs(output):
    return read_signs(output, time.time())


def write_sign(output, name="ab" * 16, **stated):
    """A sign of a job on another machine."""
    sign = {"job": "jobs.segment", "host": "far", "machine": "far", "pid": 7, "since": "2026-01-01T00:00:00+00:00"}
    storage.write_bytes(f"{output}/alive/{name}.json", json.dumps(sign | stated).encode())


def said(output, **options):
    return "\n".join(describe_status(read_status(output, **options)))


def test_a_job_at_work_is_told_with_what_it_does_and_nothing_stays_of_a_finished_one(output):
    plan_run(output)
    with SignOfLife(output, "jobs.segment", interval_s=0.02) as sign:
        sign.begin()
        sign.note("loading the model")
        while "loading" not in said(output):
            time.sleep(0.02)
        text = said(output)
        assert f"running: jobs.segment, process {os.getpid()} on " in text and "; loading the model\n" in text
        assert "last sign of life: 0:00:0" in text
        assert "\na job works on it; if it ends before the run is finished, this command resumes it: " in text
    assert files(output) == []
    if "://" not in output:
        assert not Path(output, "alive").exists()


def test_a_killed_job_is_told_at_once_and_the_next_one_removes_its_traces(output, process, caplog):
    plan_run(output)
    while "3 of 8" not in said(output):
        time.sleep(0.02)
    assert read_status(output).is_running
    process.kill()
    process.wait()
    text = said(output)
    assert (
        f"ended: jobs.segment, process {process.pid} on " in text and "; without a word, as a killed job does" in text
    )
    assert "\nno job works on it; this command resumes it: " in text
    with caplog.at_level("INFO"), SignOfLife(output, "jobs.segment") as sign:
        sign.begin()
        assert len(files(output)) == 1
    assert "has ended without a word; this job goes on" in caplog.text
    assert files(output) == []


def test_two_jobs_at_a_time_hear_of_each_other_and_leave_each_other_alone(output, process, caplog):
    with caplog.at_level("INFO"), SignOfLife(output, "jobs.segment") as sign:
        sign.begin()
        assert [each.is_alive for each in signs(output)] == [True, True]
        assert f"process {process.pid} on " in caplog.text and "works on this OUTPUT too" in caplog.text
    assert [each.is_alive for each in signs(output)] == [True]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (VlsmError("3 of 4 images failed\x1b[31m"), "failed: 3 of 4 images failed\\x1b[31m"),
        (VlsmError("https://me:secret@host/a\u00a0b\nc"), "failed: https://host/a b\\nc"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (VlsmError("x" * 9999), "failed: " + "x" * 272),
    ],
)
def test_a_job_that_fails_leaves_its_last_words_until_the_next_one_begins(tmp_path, error, words):
    output = str(tmp_path)
    plan_run(output)
    with pytest.raises(type(error)), SignOfLife(output, "jobs.segment") as sign:
        sign.begin()
        raise error
    assert [(each.is_alive, each.ended) for each in signs(output)] == [(False, words)]
    assert f"; {words}\n" in said(output) and "\nno job works on it; " in said(output)
    with SignOfLife(output, "jobs.segment") as sign:
        sign.begin()
        assert len(files(output)) == 1
    assert files(output) == []


def test_a_job_that_is_refused_leaves_nothing_and_removes_nothing(tmp_path):
    write_sign(tmp_path, ended="interrupted")
    with pytest.raises(ConfigError), SignOfLife(str(tmp_path), "jobs.segment") as sign:
        sign.start()
        assert len(files(tmp_path)) == 2
        raise ConfigError("other settings")
    assert len(files(tmp_path)) == 1
    with SignOfLife(str(tmp_path / "new"), "jobs.segment"):
        pass
    assert not (tmp_path / "new").exists()


def test_a_job_elsewhere_is_dead_a_minute_after_its_last_sign(tmp_path):
    plan_run(str(tmp_path))
    write_sign(tmp_path)
    assert "running: jobs.segment, process 7 on far" in said(str(tmp_path))
    assert "ended: jobs.segment, process 7 on far" in said(str(tmp_path), now_s=time.time() + 61)


def test_of_a_run_without_a_job_no_time_is_left(tmp_path):
    output = str(tmp_path)
    plan_run(output)
    for shard in (0, 1):
        storage.write_bytes(f"{output}/masks/part-{shard:08d}.parquet", b"PAR1")
    write_sign(output)
    now_s = time.time() + 30
    assert read_status(output, now_s=now_s).images_per_s is not None
    write_sign(output, ended="interrupted")
    assert read_status(output, now_s=now_s).images_per_s is None


def test_a_listing_that_nobody_continues_is_told(tmp_path):
    output = str(tmp_path)
    plan_run(output)
    record = read_record(output)
    write_record(output, record | {"plan": record["plan"] | {"is_complete": False}})
    write_sign(output)
    assert "8 images in 2 parts so far: INPUT is still being listed" in said(output)
    write_sign(output, ended="interrupted")
    assert "8 images in 2 parts so far: INPUT is not listed to its end" in said(output)


def test_before_the_plan_a_job_is_starting_and_a_dead_one_has_to_begin_again(tmp_path):
    output = str(tmp_path)
    with SignOfLife(output, "jobs.segment") as sign:
        sign.note("planning")
        sign.start()
        found = read_status(output)
        assert isinstance(found, StartingStatus) and found.is_running
        assert "state: starting\nrunning: jobs.segment, " in said(output) and "look again when" in said(output)
    write_sign(output)
    assert "it has planned nothing: run its command again" in said(output, now_s=time.time() + 61)


def test_a_finished_run_that_is_updated_says_so(tmp_path):
    output = str(tmp_path)
    plan_run(output)
    summary = {"ok": 8, "failed": 0, "vanished": 0, "rows": 8, "failed_by_reason": {}}
    storage.write_bytes(f"{output}/summary.json", json.dumps(summary).encode())
    write_sign(output, ended="interrupted")
    assert "interrupted" not in said(output) and "nothing is left to do" in said(output)
    write_sign(output)
    assert "state: finished (segment run)\nrunning: " in said(output) and "look again when the job has ended" in said(
        output
    )


def test_what_killed_jobs_have_left_is_removed_unless_another_job_works(tmp_path):
    output, temporary = str(tmp_path), f"part-00000000.parquet.{'0' * 32}.tmp"
    plan_run(output)
    row = {"image_id": "a", "image_uri": "a", "prompts": ["polyp"]}
    write_plan(output, [row], 4)  # of an update that was killed
    for folder in ("", "masks", "manifest"):
        storage.write_bytes(f"{output}/{folder}/.{temporary}", b"half")
    mine = tmp_path / "masks" / ".mine.tmp"
    mine.write_text("mine")
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    write_sign(output)
    with SignOfLife(output, "jobs.segment") as sign:
        sign.begin()
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if "alive" not in path.parts} == before
    write_sign(output, ended="interrupted")
    with SignOfLife(output, "jobs.segment") as sign:
        sign.begin()
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert len(left) == 3 and left[:2] == [".mine.tmp", "config.yaml"] and left[2].startswith("plan-")
    assert read_status(output).planned_images == 8


def test_no_sign_of_life_makes_a_job_fail(tmp_path, caplog):
    (tmp_path / "alive").write_text("a file where the folder should be")
    with SignOfLife(str(tmp_path), "jobs.segment", interval_s=0.01) as sign:
        sign.begin()
        time.sleep(0.1)
    assert caplog.text.count("cannot be written") == 1
    assert (tmp_path / "alive").read_text().startswith("a file")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"pid": {}, "job": 3}', b'{"job": "\\u001b[2J"}', b"9" * 99999]
)
def test_what_is_no_sign_is_a_job_that_cannot_be_identified(tmp_path, content):
    plan_run(str(tmp_path))
    storage.write_bytes(f"{tmp_path}/alive/{'cd' * 16}.json", content)
    (tmp_path / "alive" / "notes.txt").write_text("of a person")
    (sign,) = signs(str(tmp_path))
    assert sign.job == "a job that cannot be identified" and "\x1b" not in said(str(tmp_path))
