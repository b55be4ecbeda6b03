"""Listings of a store that sends what no store should send."""

import os
import subprocess

import pytest
import s3fs

from jobs.benchmarks.fuzz_server import AnswerServer
from vlsm.archive.listing import list_files
from vlsm.errors import StorageError

FILE = "<Contents><Key>a.png</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><Size>5</Size></Contents>"
LISTING = f"<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>1</KeyCount>{FILE}</ListBucketResult>"


@pytest.fixture
def listed(monkeypatch):
    """The names and sizes of the files in a bucket whose store answers each request with this text."""

    def ask(text):
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: {len(text)}\r\nConnection: close"
        with AnswerServer(f"{head}\r\n\r\n{text}".encode(), b"") as address:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
            s3fs.S3FileSystem.clear_instance_cache()  # the next one reads the environment
            return [(info["name"], info["size"]) for info in list_files("s3://bucket")]

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "x")
    yield ask
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("<LastModified>2026-01-01T00:00:00.000Z</LastModified>", ""),
        ("</Contents>", "<Owner><ID>x</ID></Owner><Unknown>1</Unknown></Contents>"),
        (FILE, f"<Contents><Key>folder/</Key><Size>0</Size></Contents>{FILE}"),
    ],
)
def test_a_listing_is_read(listed, old, new):
    assert listed(LISTING.replace(old, new, 1)) == [("bucket/a.png", 5)]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<Size>5", "<Size>many", "sends a damaged listing"),
        ("<Size>5</Size>", "", "sends a damaged listing .KeyError: 'Size'"),
        ("<Key>a.png</Key>", "", "sends a damaged listing .KeyError: 'Key'"),
        ("2026-01-01T00:00:00.000Z", "yesterday", "sends a damaged listing"),
        ("01T00:00:00.000Z", "01T00:00:4294967296Z", "sends a damaged listing"),
        ("<KeyCount>1", "<KeyCount>one", "sends a damaged listing"),
        ("<IsTruncated>false", "<IsTruncated>true", "sends a damaged listing .KeyError: 'NextContinuationToken'"),
        (
            "<IsTruncated>false</IsTruncated>",
            "<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>",
            "lists the same files again and again",
        ),
    ],
)
def test_a_damaged_or_endless_listing_is_one_sentence(listed, old, new, message):
    with pytest.raises(StorageError, match=f"the store of s3://bucket {message}.*check its endpoint"):
        listed(LISTING.replace(old, new))


class Pages:
    """A store with three pages."""

    protocol = "s3"

    def split_path(self, path):
        return path, "", None

    def call_s3(self, method, ContinuationToken="0", **request):  # noqa: N803 - S3's name
        number = int(ContinuationToken)
        return {"Contents": [{"Key": f"{number}.png", "Size": 1}], "IsTruncated": number < 2} | (
            {"NextContinuationToken": str(number + 1)} if number < 2 else {}
        )


def test_pages_follow_each_other(monkeypatch):
    monkeypatch.setattr("vlsm.storage.open_uri", lambda uri: (Pages(), "bucket"))
    assert [info["name"] for info in list_files("s3://bucket")] == [f"bucket/{number}.png" for number in range(3)]


def test_folders_may_be_nested_thousands_of_times(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1500):  # deeper than Python's recursion, and not longer than a path may be
        os.mkdir("a", dir_fd=descriptor)
        inner = os.open("a", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(os.open("x.png", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
    os.close(descriptor)
    try:
        (info,) = list_files(str(tmp_path))
        assert info["name"] == f"{tmp_path}/{'a/' * 1500}x.png"
    finally:
        subprocess.run(["rm", "-r", tmp_path / "a"], check=True)  # Python would recurse
