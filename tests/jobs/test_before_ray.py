"""What the segment job finds and says before Ray starts."""

import pytest
from s3fs import S3FileSystem

from jobs import segment


def test_a_dry_run_says_what_would_be_done_and_does_nothing(without_ray, archive, tiny_checkpoint, tmp_path):
    done = without_ray(segment.main, archive, tmp_path / "out", "--checkpoint", tiny_checkpoint, "--dry-run")
    assert done.returncode == 0
    assert "threshold: 0.5" in done.stdout and "- polyp" in done.stdout
    assert "# 6 images, 6 output rows" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": "nowhere"}, "nowhere' does not exist"),
        ({"input": "texts"}, "holds no images, but 1 .txt"),
        ({"input": "void"}, "holds no images"),
        ({"input": "gs://bucket/x"}, "gs://bucket/x"),
        ({"input": "what://x"}, "what://x"),
        ({"output": "a file"}, "a file"),
        ({"output": "archive"}, "is INPUT; choose another OUTPUT"),
        ({"checkpoint": "void"}, "there is no checkpoint at"),
        ({"set": "treshold=0.4"}, "did you mean 'threshold'?"),
        ({"config": "absent.yaml"}, "absent.yaml"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_before_ray_starts(
    without_ray, archive, tiny_checkpoint, tmp_path, change, message
):
    (tmp_path / "void").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "a file").write_text("a")
    names = {"input": "archive", "output": "out", "checkpoint": tiny_checkpoint, "set": "threshold=0.4"} | change
    paths = {key: name if "://" in str(name) else tmp_path / name for key, name in names.items() if key != "set"}
    words = [paths["input"], paths["output"], "--checkpoint", paths["checkpoint"], "--set", names["set"]]
    done = without_ray(segment.main, *words, *(["--config", paths["config"]] if "config" in paths else []))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_a_bucket_that_does_not_exist_is_said_before_ray_starts(
    without_ray, s3_server, archive, tiny_checkpoint, tmp_path
):
    done = without_ray(segment.main, "s3://nobucket/x", tmp_path / "out", "--checkpoint", tiny_checkpoint)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "s3://nobucket/x" in done.stderr


def test_a_store_that_refuses_the_output_is_said_before_ray_starts(
    without_ray, s3_folder, archive, tiny_checkpoint, monkeypatch
):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrongsecret")
    S3FileSystem.clear_instance_cache()  # its clients keep the right one
    done = without_ray(segment.main, archive, f"{s3_folder}/out", "--checkpoint", tiny_checkpoint)
    S3FileSystem.clear_instance_cache()
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"{s3_folder}/out" in done.stderr
    assert "wrongsecret" not in done.stderr
