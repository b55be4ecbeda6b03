"""What a rerun does: nothing on a finished OUTPUT, what is missing on another, and all anew where that is asked for."""

import signal
import time

import pytest

from jobs import segment
from tests.conftest import LONG_S, nightly
from tests.jobs.conftest import run, start
from vlsm.report.status import read_status

pytestmark = pytest.mark.ray


def test_a_finished_run_is_left_alone_and_says_so(without_ray, undisturbed, hard_archive, tiny_checkpoint):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    words = [hard_archive, undisturbed, "--checkpoint", tiny_checkpoint, "--set", "shard_rows=16"]
    done = without_ray(
        segment.main,
        *words,
        "--set",
        "prompts=[polyp, lesion]",
        "--set",
        "allow_equal_masks=true",
        "--set",
        "run.batch_size=3",
    )
    assert done.returncode == 0
    assert "is finished: there is nothing to do" in done.stderr
    assert done.stdout == (undisturbed / "summary.json").read_text()
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}


def test_other_settings_on_the_same_output_are_refused_by_name(
    without_ray, undisturbed, hard_archive, bright_checkpoint
):
    done = without_ray(
        segment.main, hard_archive, undisturbed, "--checkpoint", bright_checkpoint, "--set", "threshold=0.3"
    )
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


@pytest.mark.parametrize("signals", [[signal.SIGINT], *nightly([signal.SIGINT, signal.SIGTERM])])
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
