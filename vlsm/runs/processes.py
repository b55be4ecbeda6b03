"""Which process a job is, so that another process can tell who works on an OUTPUT, and whether it still runs."""

import datetime
import os
import socket
from pathlib import Path
from typing import Any

_LONGEST_WORD = 300  # a host name has 253 characters at most


def identify(job: str) -> dict[str, Any]:
    """Return who this process is, as plain values for a file.

    Args:
        job: the command, such as "jobs.train".
    """
    return {
        "job": job,
        "host": socket.gethostname(),
        "machine": this_machine(),
        "pid": os.getpid(),
        "process_started": _process_start(os.getpid()),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def is_alive(identity: dict[str, Any]) -> bool | None:
    """Return whether a process runs; None if it is on another machine. A process id may be used again.

    Args:
        identity: what `identify` returned in that process; anybody may have written it.
    """
    machine = this_machine()
    if machine is None or identity.get("machine") != machine:
        return None
    pid = identity.get("pid")
    return bool(isinstance(pid, int) and 0 < pid < 1 << 32 and identity.get("process_started") == _process_start(pid))


def describe(identity: dict[str, Any]) -> str:
    """Return job, process, host and start as a phrase."""
    job, pid, host, since = (as_word(identity.get(key, "")) for key in ("job", "pid", "host", "since"))
    if "" in (job, pid, host, since):
        return "a job that cannot be identified"
    return f"{job}, process {pid} on {host}, since {since}"


def as_word(value: object) -> str:
    """Return a value of a file for messages, or "" for one that no job writes: anybody may have written the file."""
    text = str(value) if isinstance(value, str | int) else ""
    return text if text.isprintable() and len(text) <= _LONGEST_WORD else ""


def this_machine() -> str | None:
    """Return what is equal for two processes that see each other's process ids, or None where this is unknown.

    A host name is not enough: two containers may have the same one.
    """
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot_id} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process_start(pid: int) -> str | None:
    """Return the start of a process in ticks since the machine's start, or None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in b"ZX" else fields[19].decode()  # Z, X: ended, but its parent has not noticed
