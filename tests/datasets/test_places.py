"""Where labelled datasets in a store may lead: the rule of `vlsm.archive.places`. The store is fsspec's memory."""

import io
import json

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlsm import storage
from vlsm.calibration import CalibrationSettings, calibrate_checkpoint
from vlsm.config import MemberSettings
from vlsm.datasets.__main__ import main
from vlsm.datasets.inspection import Facts, examples_table
from vlsm.datasets.read import read_dataset
from vlsm.datasets.records import Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import CheckpointError, ConfigError, ManifestError
from vlsm.evaluation.places import allow_images, places_of
from vlsm.evaluation.settings import EvaluateSettings
from vlsm.evaluation.sweep import SweepSettings, plan_trial_groups
from vlsm.evaluation.systems import read_test_records
from vlsm.training.resume import refuse_other_data
from vlsm.training.run import read_all_records
from vlsm.training.settings import TrainSettings

SECRETS = [
    "/etc/passwd",
    "file:///etc/passwd",
    "s3://others/a.png",
    "memory://team-2/a.png",
    "http://169.254.169.254/a.png",
]
UPWARDS = ["memory://team/../team-2/a.png", "../team-2/a.png", "a/../../team-2/a.png"]


@pytest.fixture
def store():
    """Writes a file at memory://team/NAME and returns its location."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()

    def write(name, content):
        data = content if isinstance(content, bytes) else content.encode()
        storage.write_bytes(f"memory://team/{name}", data)
        return f"memory://team/{name}"

    yield write
    memory.store.clear()


def picture():
    sink = io.BytesIO()
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(sink, "PNG")
    return sink.getvalue()


def write_list(store, *rows):
    lines = [",".join(row) for row in (("image_uri", "mask_uri", "split"), *rows)]
    return store("list.csv", "\n".join(lines) + "\n")


@pytest.mark.parametrize("place", SECRETS)
@pytest.mark.parametrize("column", ["image_uri", "mask_uri"])
def test_a_list_in_a_store_leads_nowhere_else_unless_that_is_allowed(store, place, column):
    row = (place, "b.png", "val") if column == "image_uri" else ("b.png", place, "val")
    uri = write_list(store, ("a.png", "b.png", "train"), row)
    with pytest.raises(ManifestError, match=rf"row 2: {column} .* lies outside of memory://team/; --set 'run.allow="):
        read_dataset("d", uri)
    settings = DatasetSettings().allowing((place.rpartition("/")[0],))
    assert len(read_dataset("d", uri, settings)) == 2


@pytest.mark.parametrize("place", UPWARDS)
def test_a_list_in_a_store_leads_not_upwards(store, place):
    uri = write_list(store, ("a.png", place, "val"))
    with pytest.raises(ManifestError, match="row 1: mask_uri .* leads upwards"):
        read_dataset("d", uri, DatasetSettings().allowing(("memory://",)))


def test_a_list_on_this_machine_names_every_place(tmp_path):
    (tmp_path / "list.csv").write_text("image_uri,mask_uri\n../a.png,/etc/b.png\ns3://data/a.png,http://host/b.png\n")
    assert len(read_dataset("d", str(tmp_path / "list.csv"))) == 2


@pytest.mark.parametrize("field", ["image_uri", "mask_uri", "more_masks"])
def test_examples_of_a_training_obey_the_rule(store, field):
    place = "/etc/passwd"
    places = {"image_uri": "memory://team/a.png", "mask_uri": "memory://team/b.png", "more_masks": ()}
    places[field] = (place,) if field == "more_masks" else place
    record = Record("d", "train", "w", prompts={}, **places)
    sink = io.BytesIO()
    pq.write_table(examples_table([record], [Facts()]), sink)
    uri = store("examples.parquet", sink.getvalue())
    with pytest.raises(ManifestError, match="(image|mask)_uri '/etc/passwd' lies outside of memory://team/"):
        read_dataset("d", uri)
    assert read_dataset("d", uri, DatasetSettings().allowing(("/etc",))) == [record]


@pytest.mark.parametrize("name", ["/etc/passwd", "../../x.png", "s3://others/x.png", "C:\\x.png", "file:///etc/passwd"])
def test_annotation_files_lead_nowhere_else(store, name):
    row = {"img_name": name, "mask_name": "b.png", "prompts": {"p1": "polyp"}}
    if "\\" not in name:  # elsewhere it is a name like any other
        store("set/anns/train.json", json.dumps([row]))
        with pytest.raises(ManifestError, match="must lie below"):
            read_dataset("d", "memory://team/set")
    images = [{"id": 1, "file_name": name, "height": 8, "width": 8}]
    uri = store("coco.json", json.dumps({"images": images, "annotations": [], "categories": []}))
    with pytest.raises(ManifestError, match="must be a path below"):
        read_dataset("d", uri)


def test_the_folder_of_images_that_a_person_names_is_allowed(store, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    square = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]]}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 8, "width": 8}],
        "annotations": [square],
        "categories": [{"id": 1, "name": "polyp"}],
    }
    uri = store("coco.json", json.dumps(content))
    (record,) = read_dataset("d", uri, DatasetSettings(image_folders={"d": str(tmp_path)}))
    assert record.image_uri == f"{tmp_path}/a.png"


def test_all_commands_have_the_setting(store, capsys):
    row = ("/etc/a.png", "/etc/b.png", "train"), ("a.png", "/etc/b.png", "val"), ("a.png", "/etc/b.png", "test")
    uri, allow = write_list(store, *row), {"run": {"allow": ["/etc"]}}
    datasets = {"datasets": {"d": uri}}
    train, test = {"output": "x", "model": "unet_d", **datasets}, {"output": "x", "checkpoints": ["c"], **datasets}
    train["data"] = {"prompt": "text:polyp"}
    with pytest.raises(ManifestError, match="--set 'run.allow="):
        read_all_records(TrainSettings(**train))
    with pytest.raises(ManifestError, match="--set 'run.allow="):
        read_test_records(EvaluateSettings(**test))
    with pytest.raises(ManifestError, match="--set 'run.allow="):
        calibrate_checkpoint("c", "absent", CalibrationSettings(**datasets))
    assert main([uri]) == 2
    assert "--set 'run.allow=" in capsys.readouterr().err
    assert len(read_all_records(TrainSettings(**train, **allow))) == 3
    assert len(read_test_records(EvaluateSettings(**test, **allow))) == 1
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        calibrate_checkpoint("/absent/c", "absent", CalibrationSettings(**datasets, **allow))
    main([uri, "--set", "run.allow=[/etc]", "--limit", "1"])
    assert "run.allow" not in capsys.readouterr().err


def test_records_of_a_store_add_no_place_to_the_run_of_an_evaluation(tmp_path):
    settings = EvaluateSettings(output="s3://out/x", checkpoints=["c"], datasets={"d": "s3://data/list.csv"})
    segment = settings.segment_settings(
        "s3://out/inputs/a.parquet", "s3://out/runs", (MemberSettings(checkpoint="c"),), "p"
    )
    inside = Record("d", "test", "w", "s3://data/images/a.png", "s3://data/b.png", {})
    assert allow_images(segment, [inside], ["s3://data/list.csv"]).run.allow == ("s3://data",)
    local = Record("d", "test", "w", f"{tmp_path}/images/a.png", "", {})
    both = allow_images(segment, [inside, local], ["s3://data/list.csv", f"{tmp_path}/list.csv"])
    assert both.run.allow == ("s3://data", f"{tmp_path}/images")
    on_disk = segment.model_copy(update={"input": f"{tmp_path}/a.parquet"})
    assert allow_images(on_disk, [inside], ["s3://data/list.csv"]) == on_disk


def test_lists_of_a_sweep_in_a_store_may_name_the_places_of_its_datasets(tmp_path):
    (tmp_path / "list.csv").write_text("")
    datasets = {"a": "s3://data/a", "b": str(tmp_path / "list.csv")}
    tree = {"datasets": datasets, "models": {"m": {"model": "unet_d"}}, "run": {"allow": ["s3://more"]}}
    settings = SweepSettings(output="s3://out/x", folds=2, pooled=True, **tree)
    (group, *_) = plan_trial_groups(settings)
    expected = ("s3://more", "s3://data", str(tmp_path))
    assert group.trials[0].settings.run.allow == expected
    assert group.settings.run.allow == expected
    plain = SweepSettings(output="s3://out/x", **tree)
    assert {group.trials[0].settings.run.allow for group in plan_trial_groups(plain)} == {("s3://more",)}
    assert places_of(["https://host/a/list.csv", str(tmp_path)]) == ["https://host", str(tmp_path)]


def test_examples_in_a_store_name_no_file_that_no_dataset_names():
    record = Record("d", "train", "w", "s3://data/a.png", "s3://data/b.png", {})
    hostile = Record("d", "train", "w", "/etc/passwd", "s3://data/b.png", {})
    for output, is_refused in (("s3://out/x", True), ("/out", False)):
        settings = TrainSettings(output=output, model="unet_d", datasets={"d": "s3://data"})
        table: pa.Table = examples_table([hostile], [Facts()])  # without versions, as an early version wrote it
        refuse_other_data(settings, examples_table([record], [Facts()]), lambda: [record], None)
        if is_refused:
            with pytest.raises(ConfigError, match="1 file that no dataset names \\(/etc/passwd, ...\\)"):
                refuse_other_data(settings, table, lambda: [record], None)
        else:
            refuse_other_data(settings, table, lambda: [record], None)
