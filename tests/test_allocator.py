"""Freed buffers are kept for the next ones."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc is of Linux")

# Page faults of three buffers at a time. By itself, glibc keeps twice the largest buffer. In many threads it keeps
# less, but how much depends on their order.
COUNT = """
import resource, sys
import numpy as np
from vlsm.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def work():
    decoded, copied, resized = (np.ones(8 << 20, np.uint8) for _ in range(3))
for _ in range(10):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words, **environment):
    command = [sys.executable, "-c", COUNT, *words]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_freed_buffers_come_back_without_page_faults():
    assert 10 * (faults("kept") + 1) < faults("plain")


def test_what_the_environment_sets_for_malloc_stays():
    assert 10 * (faults("kept") + 1) < faults("kept", MALLOC_MMAP_THRESHOLD_="65536")
