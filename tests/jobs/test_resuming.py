"""What a rerun does: nothing on a finished OUTPUT, what is missing on another, and all anew where that is asked for."""

import signal
import time

import pandas as pd
import pytest

from jobs import verify
from tests.conftest import LONG_S, slow, without_ray
from tests.jobs.conftest import run, start
from vlsm.report.status import read_status

pytestmark = pytest.mark.ray


def test_a_finished_run_is_left_alone_and_says_so(undisturbed, hard_archive, tiny_checkpoint):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    words = [hard_archive, undisturbed, "--checkpoint", tiny_checkpoint, "--set", "shard_rows=16"]
    done = without_ray(
        *words, "--set", "prompts=[polyp, lesion]", "--set", "allow_equal_masks=true", "--set", "run.batch_size=3"
    )
    assert done.returncode == 0
    assert "is finished: there is nothing to do" in done.stderr
    assert done.stdout == (undisturbed / "summary.json").read_text()
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}


def test_other_settings_on_the_same_output_are_refused_by_name(undisturbed, hard_archive, bright_checkpoint):
    done = without_ray(hard_archive, undisturbed, "--checkpoint", bright_checkpoint, "--set", "threshold=0.3")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    for key in (
        "the checkpoint (there '",
        "prompts",
        "shard_rows",
        "threshold (there 0.5, now 0.3)",
        "start_over=true",
    ):
        assert key in done.stderr


@pytest.mark.parametrize("signals", [[signal.SIGINT], *slow([signal.SIGINT, signal.SIGTERM])])
def test_an_interrupted_job_ends_cleanly_and_goes_on_later(
    ray_cluster, hard_archive, tiny_checkpoint, tmp_path, capfd, signals
):
    output = tmp_path / "out"
    words = [hard_archive, output, "--checkpoint", tiny_checkpoint]
    words += ["--set", "shard_rows=8", "--set", "run.batch_size=1"]
    for how in signals:
        before, deadline = len(list(output.glob("masks/part-*"))), time.monotonic() + LONG_S
        job = start(*words)
        while len(list(output.glob("masks/part-*"))) == before and time.monotonic() < deadline:
            time.sleep(0.05)
        (line,) = read_status(str(output)).jobs
        assert line.startswith(f"running: jobs.segment, process {job.pid} on ")
        job.send_signal(how)
        out, err = job.communicate(timeout=LONG_S)
        assert (job.returncode, out) == (130, "")
        assert "interrupted; the same command goes on from here" in err
        assert "Traceback" not in err
        (line,) = read_status(str(output)).jobs
        assert line.startswith(f"ended: jobs.segment, process {job.pid} on ") and line.endswith("; interrupted")
    code, summary, _ = run(capfd, *words)
    assert (code, summary["ok"], summary["failed"]) == (0, 288, 12)
    assert not (output / "alive").exists()


def test_a_part_with_other_rows_than_planned_is_found_and_mended(
    ray_cluster, archive, tiny_checkpoint, tmp_path, capfd
):
    words = [archive, tmp_path / "out", "--checkpoint", tiny_checkpoint, "--set", "shard_rows=2"]
    assert run(capfd, *words)[0] == 0
    expected = pd.read_parquet(tmp_path / "out" / "masks")
    assert verify.main([str(tmp_path / "out")]) == 0
    masks = tmp_path / "out" / "masks"
    (masks / "part-00000001.parquet").write_bytes((masks / "part-00000000.parquet").read_bytes())
    (masks / "part-00000002.parquet").write_bytes(b"PAR1")
    (masks / "copy.parquet").write_bytes((masks / "part-00000000.parquet").read_bytes())
    capfd.readouterr()
    assert verify.main([str(tmp_path / "out")]) == 1
    found = capfd.readouterr()
    assert "part-00000001.parquet: not exactly the planned rows for 2 images: 'test_" in found.out
    assert "part-00000001.parquet: 2 rows too many, not planned" in found.out
    assert "part-00000002.parquet is missing, damaged or of another run" in found.out
    assert "masks/copy.parquet is no part of this run" in found.out
    assert "error: " in found.err and "differences" in found.err
    (masks / "copy.parquet").unlink()
    (tmp_path / "out" / "summary.json").unlink()
    code, summary, _ = run(capfd, *words)
    assert (code, summary["done_before"]) == (0, 2)
    assert verify.main([str(tmp_path / "out")]) == 0
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / "masks"), expected)


def test_starting_over_forgets_the_run_and_nothing_else(ray_cluster, archive, tiny_checkpoint, tmp_path, capfd):
    words = [archive, tmp_path / "out", "--checkpoint", tiny_checkpoint]
    assert run(capfd, *words, "--set", "shard_rows=1")[0] == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "masks" / "mine.csv").write_text("mine")
    code, summary, _ = run(capfd, *words, "--set", "shard_rows=100", "--set", "start_over=true")
    assert (code, summary["parts"], summary["done_before"]) == (0, 1, 0)
    assert sorted(path.name for path in (tmp_path / "out" / "masks").iterdir()) == ["mine.csv", "part-00000000.parquet"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
