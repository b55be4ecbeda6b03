"""Temporary folders: private, and gone after their process, however it ends. What others prepare is never used."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import LONG_S
from vlsm.temporary import PrivateFolder, lasting_folder, remove_abandoned, use_folder

ROOT = Path(__file__).parents[1]
HOLD = """
import sys, time
from vlsm.temporary import PrivateFolder
with PrivateFolder("features-0123") as folder:
    (folder / "patient").write_bytes(b"features")
    print(folder, flush=True)
    {end}
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """A folder for temporary files that everybody may write to, as /tmp."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def hold(temporary, end="time.sleep(1000)"):
    """A process that has a private folder, and the path of the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(end=end)],
        cwd=ROOT, env=os.environ | {"TMPDIR": str(temporary)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    return process, Path(process.stdout.readline().strip())


def test_a_folder_is_private_has_a_random_name_and_is_removed(temporary):
    with PrivateFolder("features-0123") as one, PrivateFolder("features-0123") as two:
        assert one != two and one.parent == two.parent == temporary
        for folder in (one, two):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and folder.stat().st_uid == os.geteuid()
        (one / "patient").write_bytes(b"features")
    assert list(temporary.iterdir()) == []


def test_an_error_and_an_interrupt_remove_it(temporary):
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), PrivateFolder("features"):
            raise error
    process, folder = hold(temporary)
    process.send_signal(signal.SIGINT)
    process.wait(LONG_S)
    assert not folder.exists()


def test_a_killed_process_leaves_a_folder_that_the_next_one_removes_but_never_one_in_use(temporary):
    living, used = hold(temporary)
    dead, abandoned = hold(temporary)
    try:
        dead.kill()
        dead.wait(LONG_S)
        assert (abandoned / "patient").exists()
        with PrivateFolder("train"):
            assert not abandoned.exists() and (used / "patient").exists()
        with use_folder(used):  # a second worker of the node, which outlives the first one
            living.kill()
            living.wait(LONG_S)
            remove_abandoned()
            assert (used / "patient").exists()
        remove_abandoned("features-9999")
        assert used.exists()
        remove_abandoned("features-0123")
        assert not used.exists()
    finally:
        for process in (living, dead):
            process.kill()
            process.wait(LONG_S)
            process.stdout.close()


def test_the_driver_waits_for_workers_that_are_about_to_end(temporary):
    process, folder = hold(temporary, end="time.sleep(0.3); import os; os._exit(9)")
    remove_abandoned("features-0123", patience_s=LONG_S)
    assert not folder.exists()
    process.wait(LONG_S)
    process.stdout.close()


def test_links_files_and_open_folders_of_others_are_neither_used_nor_removed(temporary, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o700)
    (victim / "keep").write_text("keep")
    names = [f"vlsm-held-features-0123-{letters}" for letters in ("aaaaaaaa", "bbbbbbbb", "cccccccc")]
    (temporary / names[0]).symlink_to(victim)
    (temporary / names[1]).write_text("a file")
    (temporary / names[2]).mkdir()
    (temporary / names[2]).chmod(0o777)
    (temporary / "vlsm-features-0123456789abcdef").mkdir(mode=0o700)  # the name that earlier versions had
    (temporary / "vlsm-fuzz-aaaaaaaa").mkdir(mode=0o700)  # of another part of vlsm, which holds no lock
    before = sorted(path.name for path in temporary.iterdir())
    with PrivateFolder("features-0123") as folder:
        assert folder.name not in before
        for name in names:
            with pytest.raises(OSError), use_folder(temporary / name):
                pass
    assert sorted(path.name for path in temporary.iterdir()) == before
    assert (victim / "keep").read_text() == "keep"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_left_alone(temporary):
    folder = temporary / "vlsm-held-features-0123-aaaaaaaa"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    remove_abandoned()
    assert folder.exists()
    with pytest.raises(PermissionError, match="is not a private folder of this user"), use_folder(folder):
        pass


def test_a_lasting_folder_is_the_same_private_one_each_time(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = lasting_folder("compiled")
    assert folder == lasting_folder("compiled") == tmp_path / "vlsm" / "compiled"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_lasting_folder_that_others_may_use_or_a_link_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "vlsm" / "open").mkdir(parents=True)
    (tmp_path / "vlsm" / "open").chmod(0o777)
    (tmp_path / "vlsm" / "linked").symlink_to(tmp_path)
    (tmp_path / "vlsm" / "file").write_text("x")
    for name in ("open", "linked", "file"):
        folder = lasting_folder(name)
        assert folder.parent == tmp_path and folder.name.startswith(f"vlsm-held-{name}-")
        assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "vlsm" / "file" / "below"))
    assert lasting_folder("compiled").parent == tmp_path
