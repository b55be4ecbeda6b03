"""Exports of a run whose output and images are in an object store."""

import subprocess
import sys

import botocore.exceptions
import numpy as np
import pytest

from tests.export.test_dicom_seg import slices
from tests.export.test_index import content_of
from tests.export.test_volumes import checkers, index, png, row, run
from vlsm import storage
from vlsm.errors import StorageError
from vlsm.export.folder import ExportFolder
from vlsm.runs.results import write_part


def test_masks_of_images_in_a_store_are_exported(s3_folder, tmp_path):
    first, second = slices(0, 3)
    images = {"a.dcm": content_of(first), "b.png": content_of(second), "c.png": png(np.zeros((4, 5), np.uint8))}
    for name, content in images.items():
        storage.write_bytes(f"{s3_folder}/in/{name}", content)
    names = [*images, "gone.png", "gone.dcm"]
    write_part(f"{s3_folder}/out", 0, [row(f"{s3_folder}/in/{name}", checkers((4, 5))) for name in names], "run", 0)
    run(f"{s3_folder}/out/", "dicom-seg", tmp_path / "x", code=1)
    lines = [(line["image_id"], line["file"], line["error"].split(":")[0]) for line in index(tmp_path / "x")]
    assert lines == [
        ("a.dcm", "a.dcm.seg.dcm", ""),
        ("b.png", "b.png.seg.dcm", ""),
        ("gone.png", "", "missing"),
        ("gone.dcm", "", "missing"),
    ]


def test_a_command_says_nothing_of_credentials_and_requests(s3_folder, tmp_path):
    write_part(f"{s3_folder}/out", 0, [row("x.png", checkers((4, 5)))], "run", 0)
    command = [sys.executable, "-m", "vlsm.export", f"{s3_folder}/out", str(tmp_path / "x"), "--format", "masks"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (tmp_path / "x" / "index.csv").exists()
    assert "credentials" not in ended.stderr and "endpoint" not in ended.stderr


@pytest.mark.parametrize("error", [botocore.exceptions.NoCredentialsError(), StorageError("down")], ids=str)
def test_a_store_that_answers_nobody_ends_an_export(tmp_path, error):
    with pytest.raises(type(error)), ExportFolder(tmp_path / "x") as folder, folder.attempt([{"image_id": "a"}]):
        raise error
    assert not (tmp_path / "x").exists()
