r"""Keeps the output of Ray off the terminal; all of it stands in Ray's own log files.

A log line of its C++ code is `[2026-11-28 01:05:26,080 E 2679 2679] core_worker.cc:...`. Ray writes all of them to the
log file of this process, and its errors also to the C stream `stderr`; no setting of Ray changes that. So Ray gets
another C stream, a pipe to a small process. This process drops the log lines and passes on all else. It outlives a
crash, so it also passes on its message and stack. Python's stderr and file descriptor 2 stay as they are.
"""

import contextlib
import ctypes
import functools
import io
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator

# levels up to error; Ray writes the stack of a crash as errors from logging.cc, and fatal errors with another letter
_LOG_LINE = re.compile(rb"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ [TDIWE] \d+ \d+\] (?:\([^)]*\) )?(?!logging\.cc)")

_EVENT = re.compile(r"(?:\x1b\[\d*m)?\((?:raylet|autoscaler)[^)]*\)(?:\x1b\[\d*m)? (.*)", re.DOTALL)
_EXPECTED = "worker processes have been started"  # our tasks use fractions of CPUs, so there are more workers than CPUs


class RayEvents(io.TextIOBase):
    """A stand-in for stdout while Ray runs. All goes to stderr; of the events that Ray prints, one sentence each."""

    _follows_event = False

    def writable(self) -> bool:
        """Return that it can be written."""
        return True

    def write(self, text: str) -> int:
        """Log an event, such as the death of a process, or write other text to stderr."""
        if event := _EVENT.match(text):
            if _EXPECTED not in event[1]:
                logging.getLogger("vlsm").info("Ray: %s", re.split(r"\.\s|\n", event[1].strip())[0])
        elif not (self._follows_event and text == "\n"):
            sys.stderr.write(text)
        self._follows_event = event is not None
        return len(text)

    def flush(self) -> None:
        """Flush stderr."""
        sys.stderr.flush()


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
