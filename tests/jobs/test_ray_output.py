import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.ray_output import RayEvents
from tests.conftest import LONG_S

STAMP = "[2026-11-28 01:05:26,080"
NOISE = [
    f"{STAMP} E 2679 2679] core_worker.cc:2465: Actor with class name: 'MapWorker' has constructor arguments",
    f"{STAMP} W 2679 2680] metric_exporter.cc:105: no metrics agent",
    f"{STAMP} I 2679 2680] (raylet) worker_pool.cc:1: started",
]
CRASH = [
    f"{STAMP} C 2679 2679] core_worker.cc:1:  Check failed: is_open",
    f"{STAMP} E 2679 2679] logging.cc:501: *** SIGSEGV received at time=1 on cpu 0 ***",
    "*** StackTrace Information ***",
    "[W socket.cpp] a warning of torch",
    f"{STAMP} nobody] wrote this",
]
# writes to the C stream as Ray's code does, which takes it while Ray starts; then dies or ends
CODE = """
import ctypes, os, signal, sys
from jobs.ray_output import quiet_start
libc = ctypes.CDLL(None)
stderr = ctypes.c_void_p.in_dll(libc, "stderr")
def put(stream, line):
    libc.fputs(line.encode() + b"\\n", ctypes.c_void_p(stream))
with quiet_start():
    ray = stderr.value
_, number, *lines = sys.argv
for line in lines:
    put(ray, line)
with quiet_start():
    assert stderr.value == ray  # one filter, however often Ray starts
put(stderr.value, "C code of others")
print("Python", file=sys.stderr, flush=True)
os.kill(os.getpid(), int(number))
"""


@pytest.mark.parametrize("number", [0, signal.SIGKILL, signal.SIGSEGV], ids=["end", "kill", "crash"])
def test_log_lines_of_ray_are_dropped_and_the_message_of_a_crash_is_not(number):
    command = [sys.executable, "-c", CODE, str(int(number)), *NOISE, *CRASH, *NOISE]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == -number and done.stdout == ""
    lines = done.stderr.splitlines()
    assert [line for line in lines if line in CRASH] == CRASH
    assert not set(NOISE) & set(lines) and {"C code of others", "Python"} <= set(lines)


def test_the_filter_survives_ctrl_c_which_reaches_all_processes_of_a_terminal():
    code = CODE.replace("_, number", "signal.signal(signal.SIGINT, signal.SIG_IGN); os.kill(0, 2)\n_, number")
    command = [sys.executable, "-c", code, "0", *CRASH]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=LONG_S, start_new_session=True
    )
    assert done.returncode == 0 and set(CRASH) <= set(done.stderr.splitlines())


def test_an_event_that_ray_prints_is_one_sentence_in_the_log(caplog, capsys):
    from ray._private.worker import print_to_stdstream

    caplog.set_level("INFO", "vlsm")
    death = (
        "A worker died or was killed while executing a task by an unexpected system error. To troubleshoot, check\nit"
    )
    many = "WARNING: 8 PYTHON worker processes have been started on node: ab with address: 127.0.0.1. This could be"
    with contextlib.redirect_stdout(RayEvents()):
        for event in (death, many, "The node ab was lost"):
            print_to_stdstream({"lines": [event], "pid": "raylet", "is_err": False}, ignore_prefix=False)
        print("a line of others")
    assert capsys.readouterr() == ("", "a line of others\n")
    death = death.partition(". ")[0]
    assert caplog.messages == [f"Ray: {death}", "Ray: The node ab was lost"]
