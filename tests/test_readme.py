import ast
import re
import shlex
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

import vlsm
from jobs.__main__ import load
from vlsm import commands
from vlsm.checkpoints import Calibration
from vlsm.evaluation.parts import SCORES_SCHEMA
from vlsm.models import MODELS
from vlsm.report.status import TrainingStatus
from vlsm.runs.results import write_part
from vlsm.runs.schema import RESULT_SCHEMA
from vlsm.training.history import Row

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
JOBS = (ROOT / "jobs" / "README.md").read_text(encoding="utf-8")
LIBRARY = (ROOT / "vlsm" / "README.md").read_text(encoding="utf-8")
MEASURED = (ROOT / "jobs" / "measured" / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ["README.md", "jobs/README.md", "vlsm/README.md", "jobs/measured/README.md"]
HABITS = [".github/CONTRIBUTING.md", ".github/CHANGELOG.md"]
CALIBRATION = Calibration(
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


def lines_of_shell(text):
    return [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]


def inline_commands(text):
    """Commands inside of sentences: `vlsm train --help`; a line of the text may end inside of them."""
    texts = re.findall(r"(?<!`)`((?:python -m|vlsm) [^`]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.S))
    return [" ".join(command.split()) for command in texts]


def section(text, heading):
    level = heading.split()[0]
    return text.partition(f"\n{heading}\n")[2].partition(f"\n{level} ")[0]


COMMANDS = lines_of_shell(README)
ALL_COMMANDS = [
    command
    for text in (README, JOBS, LIBRARY, MEASURED)
    for command in [*lines_of_shell(text), *inline_commands(text)]
    if (command.startswith("python -m") and "NAME" not in command.split()[2])
    or (command.startswith("vlsm ") and command.split()[1] in commands.COMMANDS)
]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 185


def test_the_table_of_columns_is_the_schema():
    rows = re.findall(r"^\| (`.+?) \| ", section(LIBRARY, "## What a segment run writes"), re.M)
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == RESULT_SCHEMA.names


def test_the_columns_that_the_readme_shows_are_in_the_schema():
    heads = section(README, "### Segment an archive").partition("\n| ")[2].partition(" |\n")[0].split(" | ")
    assert len(heads) > 3
    assert set(heads) <= set(RESULT_SCHEMA.names)


def test_the_columns_of_scores_are_the_schemas():
    sentence = LIBRARY.partition("The columns of `scores.parquet`:")[2].partition("\n\n")[0]
    assert re.findall(r"`(\w+)`", re.sub(r" \([^)]*\)", "", sentence)) == SCORES_SCHEMA.names


def test_the_columns_of_metrics_are_the_codes():
    sentence = LIBRARY.partition("The columns of `metrics.parquet`:")[2].partition("\n\n")[0]
    stated = re.findall(r"`(\w+)`", re.sub(r" \([^)]*\)", "", sentence))
    assert stated == [column.name for column in fields(Row)]


@pytest.mark.parametrize("text", [README, LIBRARY], ids=["README.md", "vlsm/README.md"])
def test_the_tables_of_models_are_the_codes(text):
    rows = re.findall(r"^\| (`.+?) \| ", section(text, "## Models"), re.M)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(MODELS)


def test_the_public_names_are_those_of_the_package():
    names = section(LIBRARY, "## What is public").partition("`vlsm.__all__`:")[2].partition("\n- ")[0]
    assert re.findall(r"`(\w+)`", re.sub(r" \([^)]*\)", "", names)) == vlsm.__all__
    assert all(getattr(vlsm, name) is not None for name in vlsm.__all__)


def test_python_snippets_use_public_names_alone():
    names = re.findall(r"\bvlsm\.(\w+)", "".join(re.findall(r"```python\n(.*?)```", README + LIBRARY, re.S)))
    assert names
    assert set(names) <= set(vlsm.__all__)


def modules_of_map(text):
    """The files of a map, by their paths: a folder is a line that ends in a slash, or has one behind its name."""
    folders, files = {}, set()
    for line in section(text, "## What is where").partition("```\n")[2].partition("```")[0].splitlines():
        depth, name = len(line) - len(line.lstrip()), line.split()[0]
        assert len(line.split()) > 1 or name.endswith("/"), f"{name} is not described"
        folders = {known: folder for known, folder in folders.items() if known < depth}
        path = "".join(folders.values()) + name
        if name.endswith("/"):
            folders[depth] = name
        else:
            assert path not in files, f"{path} is there twice"
            files.add(path)
    return files


@pytest.mark.parametrize(("folder", "text"), [("jobs", JOBS), ("vlsm", LIBRARY)], ids=["jobs", "vlsm"])
def test_the_maps_name_every_module(folder, text):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"}
    assert modules_of_map(text) == modules


@pytest.mark.parametrize("command", list(dict.fromkeys(ALL_COMMANDS)))
def test_every_command_is_understood_by_its_parser(command, monkeypatch, tmp_path):
    from jobs import benchmark, evaluate, segment, status, sweep, train, verify
    from vlsm import calibration, checkpoints
    from vlsm.datasets import __main__ as datasets
    from vlsm.export import __main__ as export
    from vlsm.labels import __main__ as labels
    from vlsm.labels.importing import Summary
    from vlsm.models import __main__ as models

    words = shlex.split(command, comments=True)
    modules = {module: name for name, (module, _) in commands.COMMANDS.items()}
    command_name, *words = words[1:] if words[0] == "vlsm" else [modules[words[2]], *words[3:]]
    seen = []
    monkeypatch.setattr(segment, "segment", lambda settings: seen.append(settings))
    monkeypatch.setattr(segment, "dry_run", lambda *args: seen.append(args))
    monkeypatch.setattr(status, "read_status", lambda *args: seen.append(args) or STATUS)
    monkeypatch.setattr(verify, "verify", lambda output: seen.append(output))
    monkeypatch.setattr(train, "train", lambda settings: seen.append(settings))
    monkeypatch.setattr(train, "dry_run", lambda settings: seen.append(settings))
    monkeypatch.setattr(sweep, "sweep", lambda settings: seen.append(settings))
    monkeypatch.setattr(evaluate, "evaluate", lambda settings: seen.append(settings))
    monkeypatch.setattr("vlsm.storage.check_writable", lambda uri: None)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(checkpoints, "save_checkpoint", lambda *args: seen.append(args))
    monkeypatch.setattr(calibration, "calibrate_checkpoint", lambda *args: seen.append(args) or CALIBRATION)
    monkeypatch.setattr(checkpoints, "build_model", lambda name, **options: seen.append(options))
    monkeypatch.setattr(
        export, "FORMATS", {name: lambda *args, **more: seen.append(args) or 1 for name in export.FORMATS}
    )
    monkeypatch.setattr(labels, "import_labels", lambda *args: seen.append(args) or Summary())
    monkeypatch.setattr("vlsm.publish.__main__.publish", lambda *args: seen.append(args) or ("place", False, 1))
    monkeypatch.setattr("jobs.demo_loop.tell_loop", lambda *args: seen.append(args))
    monkeypatch.setattr(datasets, "show_datasets", lambda *args: seen.append(args))
    monkeypatch.setattr("vlsm.select.__main__.select_images", lambda *args: seen.append(args) or "next.csv")
    monkeypatch.setattr("vlsm.report.write.write_report", lambda *args: seen.append(args) or "report.html")
    for name in benchmark.BENCHMARKS:
        monkeypatch.setattr(f"jobs.benchmarks.{name}.measure", lambda args: seen.append(args) or 0)
    monkeypatch.setattr(benchmark, "measured_page", lambda: seen.append(words) or "")
    monkeypatch.setattr(benchmark, "PAGE", tmp_path / "README.md")
    monkeypatch.setattr("vlsm.models.costs.measure_costs", lambda: seen.append(words) or [])
    monkeypatch.setattr(models, "describe_settings", lambda options: seen.append(options) or [])
    main = load(command_name).main
    if {"--help", "--help-settings"} & {*words}:
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
    elif words or f"`{command}`" not in JOBS + LIBRARY:  # a command alone in a sentence is a name
        assert main(words) == 0
        assert seen


def test_the_reasons_are_those_of_the_code():
    from vlsm.errors import ImageError

    assert f"reasons: {', '.join(ImageError.REASONS)}" in LIBRARY


def test_ci_runs_the_test_command():
    install, test = (part.strip() for part in COMMANDS[1].split("uv pip install")[1].split("&&"))
    ci = (ROOT / ".ci" / "run").read_text()
    assert f"uv pip install -q {install}" in ci
    assert test in ci


@pytest.mark.parametrize(("name", "commands"), [("ci", [".ci/run"]), ("nightly", [".ci/run", ".ci/nightly"])])
def test_workflows_run_the_files_of_ci(name, commands):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == commands
    assert all((ROOT / command).stat().st_mode & 0o100 for command in commands)


def test_hooks_before_a_commit_run_the_linters_of_ci_and_download_nothing():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    linters = [line.removesuffix(" --check") for line in (ROOT / ".ci" / "run").read_text().splitlines()[-3:]]
    assert sorted(hook["entry"].removesuffix(" --force-exclude") for hook in hooks) == sorted(linters)


def test_its_queries_answer_what_they_promise(tmp_path, monkeypatch):
    import duckdb

    rows = [
        {
            "image_id": f"scans/{number:03d}.png",
            "image_uri": "x",
            "prompt": "lesion",
            "kind": "mask",
            "model": "m",
            "status": "ok",
        }
        | {"area_fraction": number / 200, "confidence": 0.5 + (number * 37 % 100) / 200}
        | {"area_px": number, "site": "ab"[number % 2]}
        | {"embedding": [np.cos(np.radians(number)), np.sin(np.radians(number)), *[0.0] * 766]}
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
    rows_and_failure = [*rows, failed | {"error": "corrupt: bad.png is no image", "site": "a"}]
    write_part(str(tmp_path / "OUTPUT"), 0, rows_and_failure, "run", 0, pa.struct([("site", pa.string())]), 768)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```sql\n(.*?)```", "\n".join((README, JOBS, LIBRARY, MEASURED)), re.S)
    (block,) = [block for block in blocks if "delta." not in block]  # that one is for Spark
    queries = [query for query in block.split(";") if query.strip()]
    uncertain, alike, reasons, sites = (duckdb.sql(query).fetchall() for query in queries)
    wanted = sorted((row for row in rows if row["area_fraction"] > 0.05), key=lambda row: row["confidence"])[:50]
    assert [row[0] for row in uncertain] == [row["image_id"] for row in wanted]
    assert reasons == [("corrupt", 1)]
    # every image points one degree further than the one before it
    assert {row[0] for row in alike} == {f"scans/{number:03d}.png" for number in range(2, 13) if number != 7}
    assert [row[1] for row in alike] == pytest.approx(
        [np.cos(np.radians(n)) for n in (1, 1, 2, 2, 3, 3, 4, 4, 5, 5)], abs=2e-3
    )
    # without the empty mask of number 0: the mean of 2, 4 ... 98, and of 1, 3 ... 99
    assert sites == [("a", 50.0, 49), ("b", 50.0, 50)]
    query = README.partition("`SELECT site")[2].partition("`")[0].replace("masks/masks", "OUTPUT/masks")
    assert sorted(duckdb.sql(f"SELECT site{query}").fetchall()) == [("a", 49.0), ("b", 50.0)]


def test_the_measured_figures_are_those_of_the_files():
    from jobs.benchmark import measured_page

    assert MEASURED == measured_page()


def anchors(text):
    """The anchors that code hosts give to headings: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS + HABITS)
def test_every_link_leads_somewhere(name):
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S))
    for link in links:
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{name}: {link} leads to no file"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{name}: {link} leads to no heading"
    assert links or name.endswith("CHANGELOG.md")


@pytest.mark.parametrize("title", ["## What is promised, and which test holds it", "## Who may supply what"])
def test_every_promise_has_tests_that_exist(title):
    rows = [line.strip("| ").split(" | ") for line in section(JOBS, title).splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for _, promise, *_, cell in rows:
        names = re.findall(r"`([^`]+)`", cell)
        assert names, f"{promise}: no test holds it"
        for name in names:
            path, _, test = name.partition("::")
            tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
            found = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
            assert test.startswith("test_") and test in found, f"{promise}: there is no test {name}"


def test_every_document_can_be_reached_from_the_readme():
    assert all(f"({name})" in README for name in (*DOCUMENTS[1:], *HABITS))


def test_the_top_of_the_repository_holds_what_people_look_for():
    import subprocess

    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode or not listing.stdout:
        pytest.skip("not a clone")
    top = {line.partition("/")[0] for line in listing.stdout.splitlines()}
    visible = {name for name in top if not name.startswith(".")}
    assert visible == {"LICENSE", "README.md", "cluster.yaml", "jobs", "pyproject.toml", "tests", "vlsm"}
