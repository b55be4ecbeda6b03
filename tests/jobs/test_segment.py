import json
import re
import threading
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from tests.conftest import nightly, read_mask_rows, save_square
from tests.jobs.conftest import run, start
from tests.jobs.test_masks import save_readable_oddities
from vlsm.runs.record import read_record

ROOT = Path(__file__).parents[2]


def plan_id(output):
    return read_record(str(output))["plan"]["id"]


def test_every_image_and_prompt_has_one_row_and_failures_say_why(undisturbed, hard_archive):
    rows = read_mask_rows(undisturbed)
    files = {str(path.relative_to(hard_archive)) for path in hard_archive.rglob("*") if path.is_file()}
    assert len(files) == 300
    assert set(rows) == {(name, prompt) for name in files for prompt in ("polyp", "lesion")}
    failed = {name: row["error"] for (name, _), row in rows.items() if row["status"] == "failed"}
    assert len(failed) == 12
    assert failed["study 0/empty.png"].startswith("empty: ") and failed["study 0/empty.png"].endswith("0 bytes")
    assert "20000 x 20000" in failed["study 0/bomb.png"]
    assert all(Path(name).name in error for name, error in failed.items())
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert (summary["planned"], summary["ok"], summary["failed"], summary["rows"]) == (300, 288, 12, 600)
    assert summary["failed_by_reason"] == {"corrupt": 9, "empty": 2, "too_large": 1}
    for row in rows.values():
        if row["status"] == "ok":
            with Image.open(hard_archive / row["image_id"]) as image:
                assert row["mask"].shape == (image.height, image.width) == (row["height"], row["width"])
            assert row["mask"].sum() == row["area_px"]
        else:
            assert row["mask"] is None and row["area_px"] is None


def test_the_output_folder_is_what_the_readme_says(undisturbed):
    assert {path.name for path in undisturbed.iterdir()} == {"config.yaml", "manifest", "masks", "summary.json"}
    assert [path.name for path in sorted((undisturbed / "masks").iterdir())] == [
        f"part-{n:08d}.parquet" for n in range(38)
    ]
    frame = pd.read_parquet(undisturbed / "masks")
    assert len(frame) == 600
    assert sorted(pd.read_parquet(undisturbed / "manifest")["image_id"]) == sorted(set(frame["image_id"]))


@pytest.mark.parametrize("kind", ["csv", *nightly("jsonl", "parquet")])
def test_a_manifest_decides_images_ids_and_prompts(ray_cluster, archive, tiny_checkpoint, tmp_path, capfd, kind):
    names = sorted(path.name for path in archive.iterdir())
    frame = pd.DataFrame(
        {"image_uri": [f"archive/{name}" for name in names], "image_id": [f"case {n}" for n in range(6)]}
    )
    frame["prompt"] = ["polyp", "lesion", "polyp", None, "flat", "a, b"]
    frame.loc[6] = {"image_uri": "archive/vanished.png", "image_id": "gone", "prompt": "polyp"}
    manifest = tmp_path / f"list.{kind}"
    {
        "csv": lambda: frame.to_csv(manifest, index=False),
        "jsonl": lambda: frame.to_json(manifest, orient="records", lines=True),
        "parquet": lambda: frame.to_parquet(manifest),
    }[kind]()
    code, summary, err = run(
        capfd,
        manifest,
        tmp_path / "out",
        "--checkpoint",
        tiny_checkpoint,
        "--set",
        "prompts=tumour",
        "--set",
        "allow_equal_masks=true",
        "--log-format",
        "json",
    )
    # beside lines of Ray's C++ code, which the cluster of the tests writes
    events = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert any("computes as it should: the logits of its probe differ by" in event["message"] for event in events)
    told = {event["event"]: event for event in events}  # the last one of each
    assert told["planned"].items() >= {"images": 7, "rows": 7}.items()
    assert "starting Ray" in {event["phase"] for event in events if event["event"] == "phase"}
    progress = {"done": 7, "total": 7, "unit": "image", "failed": 1, "failed_by_reason": {"missing": 1}, "left_s": 0}
    assert told["progress"].items() >= progress.items() and told["progress"]["per_s"] > 0
    assert told["progress"]["message"].startswith("7 of 7 images (100.0 %), ")
    assert told["progress"]["message"].endswith(" images/s, 1 failed, 0:00:00 left")
    assert all(event["done"] for event in events if event["event"] == "progress")  # until then it is a phase
    assert told["finished"].items() >= summary.items() and events[-1]["event"] == "finished"
    assert (code, summary["failed_by_reason"]) == (0, {"missing": 1})
    rows = read_mask_rows(tmp_path / "out")
    prompts = ["polyp", "lesion", "polyp", "tumour", "flat", "a, b"]
    assert set(rows) == {*((f"case {number}", prompt) for number, prompt in enumerate(prompts)), ("gone", "polyp")}
    assert rows["gone", "polyp"]["error"] == f"missing: there is no file {tmp_path}/archive/vanished.png"


def test_a_run_from_s3_to_s3_and_again_after_a_part_is_lost(  # noqa: PLR0913 - fixtures
    ray_cluster, s3_folder, archive, tiny_checkpoint, tmp_path, capfd, request
):
    import s3fs

    fs = s3fs.S3FileSystem(use_listings_cache=False)
    odd = tmp_path / "odd"
    corners = save_readable_oddities(odd)
    fs.put(f"{archive}/", f"{s3_folder}/in/drawn/", recursive=True)
    for name in corners:
        fs.pipe_file(f"{s3_folder}/in/odd/{name}", (odd / name).read_bytes())
    fs.pipe_file(f"{s3_folder}/in/odd/empty.png", b"")
    fs.put(f"{tiny_checkpoint}/", f"{s3_folder}/ck/", recursive=True)
    words = [f"{s3_folder}/in", f"{s3_folder}/out", "--checkpoint", f"{s3_folder}/ck", "--set", "shard_rows=4"]
    code, summary, err = run(capfd, *words)
    assert (code, summary["ok"], summary["failed_by_reason"]) == (0, 6 + len(corners), {"empty": 1}), err
    first = read_mask_rows(f"{s3_folder}/out")
    assert {image_id for image_id, _ in first} == {
        *(f"drawn/{path.name}" for path in archive.iterdir()),
        *(f"odd/{name}" for name in corners),
        "odd/empty.png",
    }
    names = [name.rsplit("/", 1)[-1] for name in fs.find(f"{s3_folder}/out")]
    assert names == [
        "config.yaml",
        f"plan-{plan_id(s3_folder + '/out')}-000000.parquet",
        *(f"part-{n:08d}.parquet" for n in range(6)),
        "summary.json",
    ]
    manifest = pd.read_parquet(f"{s3_folder}/out/manifest/{names[1]}")
    assert manifest["etag"].str.fullmatch(r"[0-9a-f]{32}").all()
    assert b"secret" not in b"".join(fs.cat_file(name) for name in fs.find(f"{s3_folder}/out"))
    fs.rm([f"{s3_folder}/out/masks/part-00000002.parquet", f"{s3_folder}/out/summary.json"])
    request.getfixturevalue("in_process")
    code, summary, _ = run(capfd, *words)
    assert (code, summary["done_before"], summary["rows"]) == (0, len(first) - 4, len(first))
    again = read_mask_rows(f"{s3_folder}/out")
    assert {key: row["mask_rle"] for key, row in first.items()} == {key: row["mask_rle"] for key, row in again.items()}


def test_too_many_failures_end_the_run_and_a_higher_limit_finishes_it(
    in_process, archive, tiny_checkpoint, tmp_path, capfd
):
    for number in range(8):
        (archive / f"broken {number}.png").write_bytes(b"")
    words = [archive, tmp_path / "out", "--checkpoint", tiny_checkpoint]
    code, _, err = run(capfd, *words)
    assert code == 1
    assert "8 of 14 images failed, more than run.max_failed_fraction 0.5: empty: " in err
    assert not (tmp_path / "out" / "summary.json").exists()
    code, summary, _ = run(capfd, *words, "--set", "run.max_failed_fraction=0.9")
    assert (code, summary["ok"], summary["failed"], summary["done_before"]) == (0, 6, 8, 14)


@pytest.mark.ray
@pytest.mark.nightly
def test_parts_are_written_while_the_images_of_others_are_segmented(tmp_path):
    """With few CPUs Ray Data may count so few for a run that fetching has all that the model leaves."""
    import vlsm

    (tmp_path / "in").mkdir()
    for number in range(300):
        save_square(tmp_path / "in" / f"{number}.png", size=(60, 90 + number))
    vlsm.save_checkpoint(vlsm.build_model("unet_d", image_size=512, width=6), tmp_path / "ck", prompt="polyp")
    words = [tmp_path / "in", tmp_path / "out", "--checkpoint", tmp_path / "ck", "--set", "shard_rows=4"]
    environment = {
        "RAY_ADDRESS": "local",
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(100 << 20),
        "RAY_DATA_MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS": "1",  # seconds; how many CPUs are counted changes with these
    }
    job = start(*words, **environment)
    limit, waiting = threading.Timer(300, job.kill), []
    limit.start()
    try:
        for line in job.stderr:
            if found := re.search(r"(\d+) of 300 images", line):
                waiting.append(int(found[1]) // 4 - len(list((tmp_path / "out" / "masks").glob("part-*"))))
        assert job.wait() == 0
    finally:
        limit.cancel()
        job.kill()
    assert len(waiting) > 2
    assert max(waiting) < 12  # parts: segmented and not written
