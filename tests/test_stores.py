"""What is no file, and what is no store, on command lines and in lists: a sentence or a failed row."""

import os
import socket

import pytest
from fsspec.registry import known_implementations
from PIL import Image

from vlsm import storage
from vlsm.archive.archive import open_archive
from vlsm.checkpoints import read_settings
from vlsm.config import SegmentSettings, load_settings
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.inspection import inspect_record
from vlsm.datasets.read import read_dataset
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ConfigError, ImageError, ManifestError
from vlsm.images.fetch import read_image_bytes


@pytest.fixture(params=["pipe", "socket", "device", "link", "folder"])
def special(request, tmp_path):
    """A function that makes what is no file at a path."""

    def make(path):
        if request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "socket":
            with socket.socket(socket.AF_UNIX) as one:
                here = os.getcwd()
                os.chdir(path.parent)  # the names of sockets are short
                one.bind(path.name)
                os.chdir(here)
        elif request.param == "device":
            path.symlink_to("/dev/zero")
        elif request.param == "link":
            os.mkfifo(tmp_path / "real")
            path.symlink_to(tmp_path / "real")
        else:
            path.mkdir()
        return path

    return make


KIND = r"it is a (pipe|socket|device|folder), not a file"


@pytest.mark.parametrize(
    "name", ["a.png", "a.tif", "a.dcm", "a.nii.gz", "a.mhd", "a.tar", "a.tar.gz", "a.zip", "a.parquet", "IM1"]
)
def test_what_is_no_file_is_a_failed_row_of_a_list(special, tmp_path, name):
    special(tmp_path / name)
    (tmp_path / "list.csv").write_text(f"image_uri\n{name}\n")
    (row,) = open_archive(str(tmp_path / "list.csv"), ("polyp",)).rows
    if row["problem"] is None:  # a listing does not open it
        with pytest.raises(ImageError, match=f"unreadable: .*{KIND}"):
            read_image_bytes(row["image_uri"], row["size_bytes"], 1000)
    else:
        assert "unreadable: " in row["problem"] and "not a file" in row["problem"]


@pytest.mark.parametrize("name", ["a.png", "a.dcm", "a.nii.gz", "a.mhd", "IM1"])
@pytest.mark.parametrize("is_mask", [False, True])
def test_what_is_no_file_is_a_broken_record_of_a_dataset(special, tmp_path, name, is_mask):
    special(tmp_path / name)
    Image.new("L", (8, 8)).save(tmp_path / "b.png")
    row = f"b.png,{name}" if is_mask else f"{name},b.png"
    (tmp_path / "list.csv").write_text(f"image_uri,mask_uri\n{row}\n")
    try:
        (record,) = read_dataset("d", str(tmp_path / "list.csv"))
    except ManifestError as error:  # labels are read with the dataset
        assert "not a file" in str(error) or "is a volume and" in str(error) or "no DICOM" in str(error)
    else:
        assert "not a file" in str(inspect_record(record, ExampleReader(DatasetSettings())).error)


def test_what_is_no_file_is_a_sentence_on_the_command_line(special, tmp_path):
    path = special(tmp_path / "list.csv")
    message = r"is a (pipe|socket|device)|holds no|has none of the known layouts"
    with pytest.raises(ConfigError, match=message):
        read_dataset("d", str(path))
    if not path.is_dir():  # a folder is an INPUT
        with pytest.raises(ConfigError, match=message):
            open_archive(str(path), ("p",))


def test_a_config_and_a_checkpoint_must_be_files(special, tmp_path):
    config, checkpoint = special(tmp_path / "c.yaml"), tmp_path / "checkpoint"
    with pytest.raises(ConfigError, match=r"a (pipe|socket|device|folder)"):
        load_settings(SegmentSettings, str(config), [], {})
    checkpoint.mkdir()
    (checkpoint / "checkpoint.yaml").symlink_to(config)
    with pytest.raises(ConfigError, match=r"^checkpoint .* cannot be used: .* is a (pipe|socket|device|folder), not a"):
        with storage.name_errors("checkpoint", str(checkpoint)):
            read_settings(str(checkpoint))


_REACHED = {"http", "https", "hf", "s3", "s3a", "webhdfs"}  # they work, and wait for a host that does not answer
_HOSTS = {"ftp": "127.0.0.1:1", "jupyter": "127.0.0.1:1"}  # refused at once


@pytest.mark.filterwarnings("ignore")  # of libraries that are tried
@pytest.mark.parametrize("scheme", sorted({*known_implementations, "", "what", "S3", "simplecache::s3"} - _REACHED))
def test_a_scheme_works_or_is_a_sentence(scheme, tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.chdir(tmp_path)
    uri = f"{scheme}://{_HOSTS.get(scheme, 'x')}/list.csv"
    with pytest.raises(ConfigError) as caught:
        with storage.name_errors("INPUT", uri):
            list(open_archive(uri, ("polyp",)).rows)
    assert repr(uri) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    ["zip://a.png::/etc/x.zip", "simplecache::s3://b/a.png", "reference://x/a.png", "memory://x/a.png", "ftp://x/a.png",
     "github://a:b@c/a.png", "S3://b/a.png", "FILE:///etc/passwd", "://etc/passwd", "dir://x/a.png", "data://x/a.png"],
)  # fmt: skip
def test_a_list_names_only_the_usual_stores(tmp_path, uri):
    (tmp_path / "list.csv").write_text(f"image_uri,mask_uri\n{uri},{uri}\n")
    message = (
        r"row 1: image_uri .* is no location that is known here; a list may name paths and URIs with s3, gs, az, http"
    )
    with pytest.raises(ManifestError, match=message):
        list(open_archive(str(tmp_path / "list.csv"), ("polyp",)).rows)
    with pytest.raises(ManifestError, match=message):
        read_dataset("d", str(tmp_path / "list.csv"))


def test_run_allow_adds_a_scheme_that_can_be_opened(tmp_path):
    (tmp_path / "list.csv").write_text("image_uri\nmemory://x/a.png\n")
    (row,) = open_archive(str(tmp_path / "list.csv"), ("polyp",), allow=("memory://x",)).rows
    assert row["image_uri"] == "memory://x/a.png"
    (tmp_path / "list.csv").write_text("image_uri\nsmb://x/a.png\n")
    with pytest.raises(ManifestError, match="row 1: .* cannot be opened here: SMB requires"):
        list(open_archive(str(tmp_path / "list.csv"), ("polyp",), allow=("smb://x",)).rows)
