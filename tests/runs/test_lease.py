"""Who may write to an OUTPUT, with real processes, on a real disk and a real store."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import LONG_S
from vlsm import storage
from vlsm.errors import LeaseError
from vlsm.runs.lease import Lease, Token, read_holder
from vlsm.runs.processes import this_machine

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from vlsm.runs.lease import Lease
with Lease(sys.argv[1], "jobs.train", interval_s=0.05) as lease:
    lease.take()
    print("taken", flush=True)
    while True:
        lease.check()
        time.sleep(0.02)
"""


@pytest.fixture(params=["disk", "store"])
def output(request, tmp_path):
    return str(tmp_path / "out") if request.param == "disk" else request.getfixturevalue("s3_folder") + "/out"


def lease(output, **options):
    return Lease(output, "jobs.train", **({"interval_s": 0.05, "patience_s": 0.4} | options))


@pytest.fixture
def process(output):
    """Another process that holds the lease."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, output], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "taken\n"
    yield holder
    holder.kill()
    holder.communicate(timeout=LONG_S)


def files(output):
    return storage.list_names(f"{output}/lease")


def write_claim(output, number, **changes):
    """A claim of a job on another machine."""
    claim = {"owner": f"job {number}", "holder": "", "job": "jobs.train", "host": "far", "machine": "far", "pid": 7}
    claim |= {"process_started": "1", "since": "2026-01-01T00:00:00+00:00"}
    storage.write_bytes(f"{output}/lease/{number:08d}.json", json.dumps(claim | changes).encode())


def write_beat(output, number, **content):
    storage.write_bytes(f"{output}/lease/{number:08d}.beat", json.dumps(content).encode())


def test_a_lease_is_taken_kept_alive_and_given_back(output):
    with lease(output) as held:
        held.take()
        held.take()  # again: it has it
        assert files(output) == ["00000001.beat", "00000001.json"]
        before = storage.read_bytes(held.token.beat_uri)
        held.note({"epoch": 1})
        while storage.read_bytes(held.token.beat_uri) == before or read_holder(output, time.time()).progress is None:
            time.sleep(0.02)
        held.check()
        held.token.check()
    assert files(output) == []
    if "://" not in output:
        assert not Path(output, "lease").exists()


def test_a_lease_that_is_not_taken_writes_nothing(output):
    with lease(output) as held:
        held.wait_until_free()
    assert not storage.exists(output)


def test_a_second_job_is_refused_in_one_sentence_that_names_the_first(output, process):
    began_s = time.monotonic()
    with lease(output, patience_s=60) as second, pytest.raises(LeaseError) as caught:
        second.take()
    assert time.monotonic() - began_s < 30  # its process lives: nothing to wait for
    message = str(caught.value)
    assert f"in use by jobs.train, process {process.pid} on " in message and "free again after 60 s" in message
    assert message.count("\n") == 0
    assert files(output) == ["00000001.beat", "00000001.json"]


def test_the_lease_of_a_killed_process_is_taken_at_once(output, process):
    process.kill()
    process.wait()
    with lease(output, patience_s=LONG_S) as second:
        second.take()
        assert files(output) == ["00000002.beat", "00000002.json"]
    assert files(output) == []


def test_an_interrupt_or_an_error_gives_the_lease_back(output, process):
    process.send_signal(signal.SIGINT)
    process.wait(LONG_S)
    assert files(output) == []
    with pytest.raises(ZeroDivisionError), lease(output) as held:
        held.take()
        raise ZeroDivisionError
    assert files(output) == []


def test_a_job_elsewhere_is_alive_while_its_heartbeat_changes_whatever_its_clock_says(output):
    """Its clock is far behind, and runs backwards."""
    write_claim(output, 1)
    ended = threading.Event()

    def beat():
        number = 0
        while not ended.wait(0.02):
            number += 1
            write_beat(output, 1, beat=number, at=1e6 - number)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with lease(output, patience_s=30) as second, pytest.raises(LeaseError, match="process 7 on far"):
            second.take()
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("at", [0.0, 4e9])
def test_a_job_elsewhere_without_a_new_heartbeat_is_dead_whatever_its_clock_says(output, at):
    write_claim(output, 4)
    write_beat(output, 4, beat=1, at=at)
    began_s = time.monotonic()
    with lease(output) as second:
        second.take()
        assert time.monotonic() - began_s >= 0.4
        assert files(output) == ["00000005.beat", "00000005.json"]


def test_a_process_id_that_is_used_again_is_another_process(output):
    write_claim(output, 1, machine=this_machine(), pid=os.getpid(), process_started="1")
    with lease(output, patience_s=LONG_S) as second:
        second.take()


def test_a_second_try_of_one_job_takes_its_own_lease_at_once(output):
    write_claim(output, 1, holder="sweep 7, trial 3")
    with lease(output, patience_s=LONG_S, holder="sweep 7, trial 3") as second:
        second.take()
    write_claim(output, 1, holder="")
    with lease(output, patience_s=0.3) as other:  # an empty holder is nobody
        began_s = time.monotonic()
        other.take()
        assert time.monotonic() - began_s >= 0.3


def test_of_many_jobs_that_find_a_dead_one_or_none_one_gets_the_lease(output):
    for is_dead in (False, True):
        if is_dead:
            write_claim(output, 1)

        def take(number):
            held = lease(output, patience_s=0.1)
            try:
                held.take()
            except LeaseError:
                return None
            return held

        with ThreadPoolExecutor(6) as pool:
            winners = [held for held in pool.map(take, range(6)) if held]
        (winner,) = winners
        winner.token.check()
        winner.__exit__(None, None, None)


def test_a_job_that_slept_finds_out_and_leaves_the_files_of_the_other_alone(output, process):
    """The process is stopped, taken over as if it were far away, and wakes up."""
    token = Token(output, 1, json.loads(storage.read_bytes(f"{output}/lease/00000001.json"))["owner"])
    token.check()
    os.kill(process.pid, signal.SIGSTOP)
    write_claim(output, 2)
    write_beat(output, 2, beat=1)

    def read_other():
        names = [name for name in files(output) if name.startswith("00000002")]
        return {name: storage.read_bytes(f"{output}/lease/{name}") for name in names}

    before = read_other()
    with pytest.raises(LeaseError, match="another job has taken over"):
        token.check()
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(LONG_S) == 1
    assert len(before) == 2 and read_other() == before  # of its own it may still end the write that it had begun


def test_a_heartbeat_notices_that_the_lease_is_lost(output):
    with lease(output) as held:
        held.take()
        held.check()
        write_claim(output, 2)
        with pytest.raises(LeaseError, match="another job has taken over"):
            while True:
                held.check()
                time.sleep(0.02)
    assert "00000002.json" in files(output)


def test_a_number_that_is_used_again_is_not_the_old_claim(output):
    with lease(output) as first:
        first.take()
        old = first.token
    with lease(output) as second:
        second.take()
        assert second.token.number == old.number
        with pytest.raises(LeaseError):
            old.check()


def test_a_claim_between_the_look_and_the_new_claim_is_respected(output):
    """Job 1 died. Job 2 came and went, and its successor took number 1 again, before a slow job claims number 2."""
    from vlsm.runs.lease import _is_first

    write_claim(output, 1, owner="successor")
    write_claim(output, 2, owner="slow")
    assert not _is_first(Token(output, 2, "slow"), {1: b"the dead job"})
    assert files(output) == ["00000001.json"]


def test_what_killed_processes_left_in_output_is_removed_and_nothing_else(tmp_path):
    leftover = f".summary.json.{'0' * 32}.tmp"
    for name in (leftover, ".mine.tmp", "mine", f"x{leftover}"):
        (tmp_path / name).write_text("")
    with lease(str(tmp_path)) as held:
        held.take()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "mine", f"x{leftover}"]


def test_who_holds_it_is_told(output):
    assert read_holder(output, time.time()) is None
    with lease(output) as held:
        held.take()
        holder = read_holder(output, time.time() + 5)
        assert (holder.job, holder.pid, holder.is_dead) == ("jobs.train", os.getpid(), False)
        assert 4 < holder.silent_s < 60
    write_claim(output, 1)
    assert not read_holder(output, time.time()).is_dead  # nobody here can know


@pytest.mark.parametrize("content", [b"", b"{}", b'{"a": 1}', b"[1]"])
def test_a_claim_that_says_nothing_is_of_a_dead_job(output, content):
    storage.write_bytes(storage.join(output, "lease", "00000001.json"), content)
    with lease(output, patience_s=0.1) as mine:
        mine.take()
        assert mine.token.number == 2
