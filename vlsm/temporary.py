"""Temporary folders that no other user can read, prepare or replace, and that nothing keeps after their process.

A folder has a random name, is created exclusively, and belongs to its user alone. Each process that uses it holds a
lock on it, which ends with the process, however that ends. So a folder without a lock is abandoned: the next run on the
machine removes it.
"""

import atexit
import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_KIND = re.compile(r"[a-z]+(-[0-9a-f]+)?")
_NAME = re.compile(
    r"vlsm-held-[a-z]+(-[0-9a-f]+)?-[A-Za-z0-9_]{8}", re.ASCII
)  # `tempfile` adds the last 8; without `held`, a folder has no lock


class PrivateFolder(contextlib.AbstractContextManager[Path]):
    """A new folder below the folder for temporary files (TMPDIR). It is removed at the end of the context.

    Abandoned folders of dead processes are removed before.

    Args:
        kind: a word for its name, such as "features", and optionally a dash and hexadecimal digits.

    Attributes:
        path: its path.
    """

    def __init__(self, kind: str) -> None:
        remove_abandoned()
        self._stack = contextlib.ExitStack()
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=f"{_prefix(kind)}-"))  # mode 0700
            # before it is locked, another process may take it for abandoned
            with contextlib.suppress(FileNotFoundError):
                self._stack.enter_context(use_folder(self.path))
                if self.path.exists():
                    break
        self._stack.callback(shutil.rmtree, self.path, ignore_errors=True)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the folder with its content."""
        self._stack.close()


@contextlib.contextmanager
def use_folder(path: Path) -> Iterator[Path]:
    """Hold the lock on a folder that another process of this user has created.

    Raises:
        OSError: there is no such folder, or it is a link, or other users own it or may use it.
    """
    descriptor = _open_own(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield path
    finally:
        os.close(descriptor)


def lasting_folder(name: str) -> Path:
    """Return a folder of this user that stays on the machine, for results that later processes use again.

    It is `vlsm/NAME` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache). If no such folder can be made there, or
    other users own or may use it, a new temporary one is returned; it is removed when this process ends.
    """
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlsm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        os.close(_open_own(path))
        if os.access(path, os.W_OK):
            return path
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        pass
    folder = PrivateFolder(name)
    atexit.register(folder.remove)
    return folder.path


def remove_abandoned(kind: str | None = None, patience_s: float = 0.0) -> None:
    """Remove the folders of this user that no process has locked. Folders and links of other users stay.

    Args:
        kind: remove only folders of this kind.
        patience_s: how long to wait for processes that are about to end, in seconds.
    """
    end_s = time.monotonic() + patience_s
    prefix = "vlsm-held" if kind is None else _prefix(kind)
    with contextlib.suppress(OSError):
        for entry in os.scandir(tempfile.gettempdir()):
            if _NAME.fullmatch(entry.name) and entry.name.startswith(f"{prefix}-"):
                while not _remove_unlocked(Path(entry.path)) and time.monotonic() < end_s:
                    time.sleep(0.05)


def _prefix(kind: str) -> str:
    if not _KIND.fullmatch(kind):
        raise ValueError(f"kind is {kind!r}; it must be a word, such as features, or features-0123")
    return f"vlsm-held-{kind}"


def _remove_unlocked(path: Path) -> bool:
    """Remove a folder unless a process has locked it. Returns whether nothing is left to do."""
    try:
        descriptor = _open_own(path)
    except OSError:
        return True  # it is gone, or of another user
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _open_own(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    info = os.fstat(descriptor)
    if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o077:
        os.close(descriptor)
        raise PermissionError(f"{path} is not a private folder of this user")
    return descriptor
