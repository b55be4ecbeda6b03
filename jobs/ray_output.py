r"""Keeps the log lines of Ray's C++ code off the terminal: `[2026-11-28 01:05:26,080 E 2679 2679] core_worker.cc:...`.

Ray writes all of them to the log file of this process, and its errors also to the C stream `stderr`; no setting of Ray
changes that. So Ray gets another C stream, a pipe to a small process. This process drops the log lines and passes on
all else. It outlives a crash, so it also passes on its message and stack. Python's stderr and file descriptor 2 stay as
they are.
"""

import contextlib
import ctypes
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator

# levels up to error; Ray writes the stack of a crash as errors from logging.cc, and fatal errors with another letter
_LOG_LINE = re.compile(rb"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ [TDIWE] \d+ \d+\] (?:\([^)]*\) )?(?!logging\.cc)")


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """Return a context for the start of Ray: the C++ code that starts in it logs to its file only."""
    libc = ctypes.CDLL(None)
    try:
        stream = ctypes.c_void_p.in_dll(libc, "stderr")
    except ValueError:  # another C library: the lines appear
        yield
        return
    before, stream.value = stream.value, _filtered_stream() or stream.value
    try:
        yield
    finally:
        stream.value = before


@functools.cache
def _filtered_stream() -> int | None:
    """Return a C stream to a new filter process. Both stay as long as this process: Ray may log until its end."""
    reading, writing = os.pipe()
    # a session of its own: Ctrl-C ends the job, which still has something to say
    command = [sys.executable, "-I", "-S", __file__]
    with open(reading, "rb") as source:
        process = subprocess.Popen(command, stdin=source, stdout=2, start_new_session=True)
    process.returncode = 0  # nobody waits for it: it ends with this process
    libc = ctypes.CDLL(None)
    libc.fdopen.restype, libc.fdopen.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_char_p]
    libc.setvbuf.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_size_t]
    stream: int | None = libc.fdopen(writing, b"w")
    if stream:
        libc.setvbuf(stream, None, 2, 0)  # _IONBF: a crash must not lose a line
    return stream


def pass_on(source: int, target: int) -> None:
    """Copy all but the log lines from one file descriptor to another, until the end."""
    with open(source, "rb") as lines, open(target, "wb", buffering=0) as kept:
        for line in lines:
            if not _LOG_LINE.match(line):
                kept.write(line)


if __name__ == "__main__":
    pass_on(0, 1)
