"""Freed buffers are kept for the next ones."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc is of Linux")

# page faults of 16 threads that fill buffers of a megabyte and free them, as decoding does
COUNT = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from vlsm.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def work(number):
    decoded = np.ones(1 << 20, np.uint8)
    copied = decoded.tobytes()
with ThreadPoolExecutor(16) as pool:
    list(pool.map(work, range(300)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    list(pool.map(work, range(1000)))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words, **environment):
    command = [sys.executable, "-c", COUNT, *words]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_freed_buffers_come_back_without_page_faults():
    assert 2 * faults("kept") < faults("plain")


def test_what_the_environment_sets_for_malloc_stays():
    every_page = 2 * 1000 * (1 << 20) / 4096
    assert faults("kept", MALLOC_MMAP_THRESHOLD_="65536") > every_page / 2
