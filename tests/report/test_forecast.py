"""What a dry run with a sample tells of time and cost."""

import numpy as np
import pytest
from PIL import Image

from jobs import segment
from vlsm.config import SegmentSettings, load_settings
from vlsm.errors import ConfigError
from vlsm.report import forecast
from vlsm.report.forecast import Forecast, describe_forecast, keep_sample, measure
from vlsm.runs.lifecycle import open_input, resolve_settings
from vlsm.segmentation.image_rows import describe_entry


def forecast_of(archive, *words, checkpoints):
    tree = {"input": str(archive), "output": "out", "members": [{"checkpoint": str(uri)} for uri in checkpoints]}
    settings, members = resolve_settings(load_settings(SegmentSettings, None, list(words), tree))
    return measure(settings, members, list(open_input(settings, [member.settings for member in members]).rows))


def test_a_sample_is_of_the_whole_archive_and_the_rows_go_through():
    rows, sample = [{"number": number} for number in range(10_000)], []
    assert list(keep_sample(rows, sample, 500)) == rows
    numbers = {row["number"] for row in sample}
    assert len(numbers) == 500
    assert [40 <= sum(tenth <= number // 1000 < tenth + 1 for number in numbers) <= 65 for tenth in range(10)] == [
        True
    ] * 10
    few = []
    assert len(list(keep_sample(rows[:3], few, 5))) == len(few) == 3


@pytest.mark.parametrize(
    "words",
    [[], ["tile.size=40"], ["prompts=[a, b]", "classes={a: [x, y]}", "label_maps=true", "allow_equal_masks=true"]],
)
def test_every_way_of_segmenting_is_measured(words, archive, tiny_checkpoint, bright_checkpoint):
    words = words if "prompts" in str(words) else [*words, "prompts=[polyp]"]
    found = forecast_of(archive, *words, checkpoints=[tiny_checkpoint, bright_checkpoint])
    assert (found.num_measured, found.num_failed) == (6, 0)
    assert min(found.read_s, found.model_s, found.write_s) > 0 and found.num_cpus >= 1


def test_what_is_measured_is_what_a_run_does(archive, bright_checkpoint, monkeypatch):
    import vlsm

    areas = []

    def describe(*args):
        records = describe_entry(*args)
        areas.append([record.area_px for record in records])
        return records

    monkeypatch.setattr(forecast, "describe_entry", describe)
    forecast_of(
        archive, "prompts=[polyp, fold]", "allow_equal_masks=true", "run.batch_size=4", checkpoints=[bright_checkpoint]
    )
    segmenter = vlsm.Segmenter(vlsm.load_checkpoint(bright_checkpoint))
    images = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(archive.iterdir())]
    masks = segmenter.segment(images, ["polyp", "fold"], allow_equal_masks=True)
    whole = [[int(mask.sum()) for mask in image_masks] for image_masks in masks]
    # they are read in any order, and logits travel as float16, as between the stages of the job
    np.testing.assert_allclose(sorted(areas), sorted(whole), atol=2)
    assert len({tuple(own) for own in areas}) > 1


def test_images_that_cannot_be_read_are_counted_and_all_of_them_are_an_error(archive, tiny_checkpoint):
    paths = sorted(archive.iterdir())
    paths[0].write_bytes(b"no image")
    assert forecast_of(archive, checkpoints=[tiny_checkpoint]).num_failed == 1
    for path in paths[1:]:
        path.write_bytes(b"no image")
    with pytest.raises(ConfigError, match="none of the 6 images"):
        forecast_of(archive, checkpoints=[tiny_checkpoint])


def test_cpus_work_beside_gpus_and_for_the_models_where_there_are_none():
    seconds = {"read_s": 0.04, "write_s": 0.02, "model_s": 0.01}
    assert Forecast(8, 0, **seconds, num_cpus=2, num_gpus=0).seconds_per_image == pytest.approx(0.04)
    assert Forecast(8, 0, **seconds, num_cpus=2, num_gpus=1).seconds_per_image == pytest.approx(0.03)
    assert Forecast(8, 0, **seconds, num_cpus=60, num_gpus=2).seconds_per_image == pytest.approx(0.005)


def test_hours_shrink_with_the_nodes_and_the_cost_does_not():
    found = Forecast(8, 1, read_s=0.01, model_s=0.036, write_s=0.01, num_cpus=20, num_gpus=1)
    lines = describe_forecast(found, num_images=1_000_000, node_price=1.5)
    assert "  1 node like this one: 10.00 hours at 27.8 images/s, costs 15.00" in lines
    assert "  8 nodes like this one: 1.25 hours at 222.2 images/s, costs 15.00" in lines
    assert not [line for line in describe_forecast(found, 1000, None) if "costs" in line]
    assert "  2 nodes like this one: 0.30 minutes at 55.6 images/s, costs 0.0150" in describe_forecast(found, 1000, 1.5)


def test_a_dry_run_with_a_sample_needs_no_ray(without_ray, archive, tiny_checkpoint, tmp_path):
    words = [archive, tmp_path / "out", "--checkpoint", tiny_checkpoint, "--dry-run"]
    done = without_ray(segment.main, *words, "--sample", 4, "--node-price", 2)
    assert done.returncode == 0, done.stderr
    assert "# 6 images, 6 output rows" in done.stdout and "# measured on 4 images, of which 0 " in done.stdout
    assert "#   8 nodes like this one: " in done.stdout and "# assumed: " in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [["--sample", "4"], ["--dry-run", "--sample", "0"], ["--dry-run", "--node-price", "1"]]
)
def test_a_sample_without_a_dry_run_is_wrong_usage(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        segment.main(["in", "out", "--checkpoint", "c", *words])
    assert "goes with" in capsys.readouterr().err
