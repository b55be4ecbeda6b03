import re
import shlex
from pathlib import Path

import pytest

from vlsm.checkpoints import Calibration
from vlsm.evaluation.parts import SCORES_SCHEMA
from vlsm.models import MODELS
from vlsm.report.status import TrainingStatus
from vlsm.runs.results import write_part
from vlsm.runs.schema import RESULT_SCHEMA

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOUND = Calibration(
    temperature=1,
    threshold=0.5,
    num_images=1,
    error_before=0,
    error_after=0,
    dice_at_half=1,
    dice=1,
    min_confidence=None,
    area_fraction=(0, 1),
    reliability=[],
)
STATUS = TrainingStatus(False, 0, 1, "dice", None, None, None, None, None, [])
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]


def test_the_table_of_columns_is_the_schema():
    section = README.partition("### What comes out")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \| ", section, re.M)
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == RESULT_SCHEMA.names


def test_the_columns_of_scores_are_the_schemas():
    sentence = README.partition("The columns of `scores.parquet`:")[2].partition("\n\n")[0]
    assert re.findall(r"`(\w+)`", re.sub(r" \([^)]*\)", "", sentence)) == SCORES_SCHEMA.names


def test_the_table_of_models_is_the_codes():
    section = README.partition("\n## Models")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \| ", section, re.M)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(MODELS)


def test_the_map_names_every_module():
    stated = set(re.findall(r"^ +(\w+\.py) ", README, re.M))
    modules = [*ROOT.glob("jobs/**/*.py"), *ROOT.glob("vlsm/**/*.py")]
    assert stated == {path.name for path in modules if path.name not in ("__init__.py", "__main__.py", "errors.py")}


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("python -m")])
def test_every_command_is_understood_by_its_parser(command, monkeypatch):
    from jobs import benchmark, evaluate, segment, status, sweep, train
    from vlsm import calibration, checkpoints
    from vlsm.export import __main__ as export
    from vlsm.models import __main__ as models
    from vlsm.report import __main__ as report

    module, *words = shlex.split(command, comments=True)[2:]
    seen = []
    monkeypatch.setattr(segment, "segment", lambda settings: seen.append(settings))
    monkeypatch.setattr(segment, "dry_run", lambda *args: seen.append(args))
    monkeypatch.setattr(status, "read_status", lambda *args: seen.append(args) or STATUS)
    monkeypatch.setattr(train, "train", lambda settings: seen.append(settings))
    monkeypatch.setattr(train, "dry_run", lambda settings: seen.append(settings))
    monkeypatch.setattr(sweep, "sweep", lambda settings: seen.append(settings))
    monkeypatch.setattr(evaluate, "evaluate", lambda settings: seen.append(settings))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(checkpoints, "save_checkpoint", lambda *args: seen.append(args))
    monkeypatch.setattr(calibration, "calibrate_checkpoint", lambda *args: seen.append(args) or FOUND)
    monkeypatch.setattr(checkpoints, "build_model", lambda name, **options: seen.append(options))
    monkeypatch.setattr(export, "FORMATS", {name: lambda *args: seen.append(args) or 0 for name in export.FORMATS})
    monkeypatch.setattr(report, "write_report", lambda *args: seen.append(args) or ROOT / "README.md")
    for name in benchmark.BENCHMARKS:
        monkeypatch.setattr(f"jobs.benchmarks.{name}.measure", lambda args: seen.append(args) or 0)
    monkeypatch.setattr("vlsm.models.costs.measure_costs", lambda: seen.append(words) or [])
    monkeypatch.setattr(models, "describe_settings", lambda options: seen.append(options) or [])
    mains = {
        "jobs.segment": segment.main,
        "jobs.train": train.main,
        "jobs.evaluate": evaluate.main,
        "jobs.sweep": sweep.main,
        "jobs.status": status.main,
        "jobs.benchmark": benchmark.main,
        "vlsm.export": export.main,
        "vlsm.calibration": calibration.main,
        "vlsm.report": report.main,
        "vlsm.checkpoints": checkpoints.main,
        "vlsm.models": models.main,
    }
    assert mains[module](words) == 0
    assert seen


def test_the_reasons_are_those_of_the_code():
    from vlsm.errors import ImageError

    assert f"reasons: {', '.join(ImageError.REASONS)}" in README


def test_ci_runs_the_test_command():
    install, test = (part.strip() for part in COMMANDS[1].split("uv pip install")[1].split("&&"))
    ci = (ROOT / ".ci" / "run").read_text()
    assert f"uv pip install -q {install}" in ci
    assert test in ci


def test_its_queries_answer_what_they_promise(tmp_path, monkeypatch):
    import duckdb

    rows = [
        {
            "image_id": f"{number:03d}.png",
            "image_uri": "x",
            "prompt": "lesion",
            "kind": "mask",
            "model": "m",
            "status": "ok",
        }
        | {"area_fraction": number / 200, "confidence": 0.5 + (number * 37 % 100) / 200}
        for number in range(100)
    ]
    failed = {
        "image_id": "bad.png",
        "image_uri": "x",
        "prompt": "lesion",
        "kind": "mask",
        "model": "m",
        "status": "failed",
    }
    write_part(str(tmp_path / "OUTPUT"), 0, [*rows, failed | {"error": "corrupt: bad.png is no image"}], "run", 0)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```sql\n(.*?)```", README, re.S)
    uncertain, reasons = (duckdb.sql(query).fetchall() for query in block.split(";") if query.strip())
    wanted = sorted((row for row in rows if row["area_fraction"] > 0.05), key=lambda row: row["confidence"])[:50]
    assert [row[0] for row in uncertain] == [row["image_id"] for row in wanted]
    assert reasons == [("corrupt", 1)]


def test_the_measured_figures_are_those_of_the_files():
    from jobs.benchmark import BEGIN, END, measured_section

    assert README.partition(BEGIN)[2].partition(END)[0] == measured_section()
