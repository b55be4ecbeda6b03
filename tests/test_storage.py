import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import LONG_S
from vlsm import storage
from vlsm.config import SegmentSettings, load_settings
from vlsm.errors import ConfigError, ImageError, StorageError
from vlsm.images import reader
from vlsm.images.fetch import read_image_bytes


def reason_of(uri, size_bytes=None, max_bytes=1000):
    with pytest.raises(ImageError) as caught:
        read_image_bytes(str(uri), size_bytes, max_bytes)
    return caught.value.reason


def test_what_keeps_a_file_from_being_read_has_its_own_reason(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "large").write_bytes(bytes(1001))
    assert reason_of(tmp_path / "empty") == "empty"
    assert reason_of(tmp_path / "large") == "too_large"
    assert reason_of(tmp_path / "absent") == "missing"
    assert reason_of(tmp_path, size_bytes=10) == "unreadable"


def test_a_file_without_read_permission_is_forbidden(tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(b"x")
    path.chmod(0)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o111)
    code = f"""
import os
from vlsm import storage
from vlsm.images.fetch import read_image_bytes
storage.open_uri("x")
if os.getuid() == 0:
    os.setuid(65534)  # root may read everything
try:
    read_image_bytes({str(path)!r}, 1, 1000)
except Exception as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG_S, check=True)
    assert done.stdout == f"forbidden: no permission to read {path}\n"


@pytest.mark.usefixtures("each_client")
def test_reasons_in_an_object_store_are_the_same(s3_folder):
    storage.write_bytes(f"{s3_folder}/empty.png", b"")
    storage.write_bytes(f"{s3_folder}/a b%20[1]#.png", b"abc")
    assert reason_of(f"{s3_folder}/empty.png") == "empty"
    assert reason_of(f"{s3_folder}/absent.png") == "missing"
    assert reason_of(f"{s3_folder}/absent.png", size_bytes=3) == "missing"
    assert read_image_bytes(f"{s3_folder}/a b%20[1]#.png", None, 1000) == b"abc"


def test_a_store_that_stays_away_is_no_bad_image(monkeypatch):
    delays = []
    monkeypatch.setattr(storage.time, "sleep", delays.append)

    def fail():
        raise OSError("connection reset")

    with pytest.raises(StorageError, match="could not be reached in 4 tries: connection reset"):
        storage.with_retries(fail, "s3://bucket/x", storage.QUICK_S)
    assert [0.5 <= delay / longest <= 1 for delay, longest in zip(delays, [0.5, 2.0, 8.0], strict=True)] == [True] * 3


def test_a_store_that_comes_back_is_used(monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda delay_s: None)
    answers = iter([OSError("reset"), TimeoutError(), b"data"])

    def call():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert storage.with_retries(call, "s3://bucket/x") == b"data"


@pytest.fixture
def command(monkeypatch):
    """This process as a command; the waits between tries are listed."""
    delays = []
    monkeypatch.setattr(storage, "_answered", set())
    monkeypatch.setattr(storage, "_told_s", {})
    monkeypatch.setattr(storage, "_first_s", math.inf)
    monkeypatch.setattr(storage.time, "sleep", delays.append)
    storage.expect_answers()
    return delays


def refuse():
    raise OSError("connection refused")


def test_a_command_soon_gives_up_on_a_store_that_never_answered(command, caplog):
    caplog.set_level("INFO", "vlsm")
    with pytest.raises(StorageError, match="could not be reached in 2 tries"):
        storage.with_retries(refuse, "s3://bucket/x")
    assert sum(command) <= storage.FIRST_S
    assert caplog.messages == ["s3://bucket/x does not answer, and is tried again: connection refused"]


def test_a_command_waits_for_a_store_that_has_answered_before(command):
    def absent():
        raise FileNotFoundError("x")

    with pytest.raises(FileNotFoundError):  # an answer too
        storage.with_retries(absent, "s3://bucket/x")
    with pytest.raises(StorageError, match="in 14 tries"):
        storage.with_retries(refuse, "s3://bucket/other/y")
    command.clear()
    with pytest.raises(StorageError, match="in 2 tries"):
        storage.with_retries(refuse, "s3://another/y")


def test_an_answer_with_an_error_is_an_answer(command):
    cause = Exception("SlowDown")
    cause.response = {"Error": {"Code": "SlowDown"}}

    def slow_down():
        raise OSError("slow down") from cause

    with pytest.raises(StorageError, match="in 14 tries"):
        storage.with_retries(slow_down, "s3://bucket/x")


@pytest.mark.usefixtures("each_client")
def test_of_many_that_create_a_file_one_succeeds(tmp_path, s3_folder):
    for folder in (str(tmp_path), s3_folder):
        uri = f"{folder}/record"
        with ThreadPoolExecutor(8) as pool:
            created = list(pool.map(lambda n, uri=uri: storage.create_bytes(uri, b"%d" % n), range(8)))
        assert created.count(True) == 1
        assert storage.read_bytes(uri) == b"%d" % created.index(True)
        assert storage.list_names(folder) == ["record"]


@pytest.mark.usefixtures("each_client")
def test_the_version_of_a_file_changes_with_its_content(tmp_path, s3_folder):
    for folder in (str(tmp_path), s3_folder):
        storage.write_bytes(f"{folder}/a b%20[1]#.png", b"abc")
        storage.write_bytes(f"{folder}/inner/x.png", b"abc")
        before = storage.list_versions(folder)
        assert list(before) == ["a b%20[1]#.png"] and storage.list_versions(folder) == before
        storage.write_bytes(f"{folder}/a b%20[1]#.png", b"abcd")
        assert storage.list_versions(folder) != before
        assert storage.list_versions(f"{folder}/absent") == {}


def test_a_write_that_fails_leaves_the_old_content_and_no_debris(tmp_path, monkeypatch):
    path = tmp_path / "part"
    storage.write_bytes(str(path), b"old")

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        storage.write_bytes(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["part"]


def test_a_scheme_that_nobody_knows_is_said():
    with pytest.raises(ConfigError, match="use a local path or s3://"):
        storage.open_uri("what://x/y")


@pytest.mark.usefixtures("each_client")
def test_a_file_that_is_larger_than_its_manifest_says_is_read_only_within_the_limit(tmp_path, s3_folder):
    for uri in (str(tmp_path / "x.png"), f"{s3_folder}/x.png"):
        storage.write_bytes(uri, bytes(5000))
        assert len(read_image_bytes(uri, 10, 5000)) == 5000
        assert len(read_image_bytes(uri, 9000, 9000)) == 5000
        with pytest.raises(ImageError, match="too_large: .* has 5,000 bytes; max_image_bytes is 4,999"):
            read_image_bytes(uri, 10, 4999)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "x.png").symlink_to(tmp_path / "pipe")
    with pytest.raises(ImageError, match="unreadable: .*: it is a pipe, not a file"):
        read_image_bytes(str(tmp_path / "x.png"), 10, 1000)


@pytest.mark.usefixtures("each_client")
def test_credentials_that_are_no_longer_taken_are_no_bad_image(s3_folder, monkeypatch):
    import s3fs

    storage.write_bytes(f"{s3_folder}/x.png", b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(StorageError, match="no longer takes the credentials: SignatureDoesNotMatch"):
            read_image_bytes(f"{s3_folder}/x.png", 1, 1000, patience_s=0.1)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_file_that_is_read_slowly_holds_up_no_other(tmp_path, monkeypatch):
    names = [str(tmp_path / f"{number}.png") for number in range(40)]
    for name in names:
        Path(name).write_bytes(b"content")
    others_are_read = threading.Event()

    def read(uri, *words, **options):
        assert uri != names[0] or others_are_read.wait(20)
        return read_image_bytes(uri, *words, **options)

    monkeypatch.setattr(reader, "read_image_bytes", read)
    arguments = {"input": "in", "output": "out", "members": [{"checkpoint": "c"}]}
    settings = load_settings(SegmentSettings, None, ["run.fetch_threads=4"], arguments)
    numbers = []
    for number, opening in reader.open_images([{"image_uri": name, "selector": None} for name in names], settings):
        assert opening()[0].data == b"content"
        numbers.append(number)
        if len(numbers) == 39:
            others_are_read.set()
    assert sorted(numbers) == list(range(40)) and numbers[-1] == 0


LATE = """
import io, sys, threading, time
from vlsm import storage

class File(io.BytesIO):
    def __del__(self):
        if threading.current_thread() is not threading.main_thread():
            is_late.set()
            time.sleep(0.2)  # a busy machine: Python ends meanwhile

is_late, content = threading.Event(), storage.read_bytes(sys.argv[1])
storage.read_bytes = lambda uri: content
import pyarrow as pa
pa.BufferReader = File
for _ in range(60):
    table = storage.read_table(sys.argv[1], ["a"])
    if is_late.is_set():
        break
print(is_late.is_set(), table["a"].to_pylist()[:2], table.num_columns)
"""


def test_a_table_is_read_by_the_thread_that_asks_for_it(tmp_path):
    """A thread of pyarrow that still holds the file when Python ends aborts the process."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": list(range(200)), **{f"c{n}": [0.5] * 200 for n in range(12)}}), tmp_path / "t")
    command = [sys.executable, "-c", LATE, str(tmp_path / "t")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG_S)
    assert (done.returncode, done.stdout) == (0, "False [0, 1] 1\n"), done.stderr


def test_where_nothing_can_be_written_is_found_without_writing(tmp_path, s3_folder):
    storage.check_writable(str(tmp_path / "new" / "out"))
    storage.check_writable(f"{s3_folder}/out")
    assert not (tmp_path / "new").exists() and not storage.exists(s3_folder)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        storage.check_writable(str(tmp_path / "file" / "out"))
    with pytest.raises(FileNotFoundError):
        storage.check_writable("s3://no-such-bucket-here/out")


def test_missing_credentials_name_what_is_read(tmp_path):
    code = "from vlsm import storage\nwith storage.name_errors('INPUT', 's3://b/x'): storage.list_names('s3://b/x')"
    names = [name for name in os.environ if name.startswith("AWS_")]
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {
        "AWS_EC2_METADATA_DISABLED": "true",
        "HOME": str(tmp_path),
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=LONG_S)
    assert (
        "INPUT 's3://b/x' cannot be used: Unable to locate credentials; give them in AWS_ACCESS_KEY_ID" in done.stderr
    )
