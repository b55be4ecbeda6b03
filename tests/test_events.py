import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlsm import events

ROOT = Path(__file__).parents[1]


def lines_of(*calls):
    """What a logger with the JSON format writes, parsed, one item per call of the function `log(logger)`."""
    shown = []
    handler = logging.Handler()
    handler.setFormatter(events.JsonFormatter())
    handler.emit = lambda record: shown.append(handler.format(record))
    logger = logging.Logger("vlsm")
    logger.addHandler(handler)
    for call in calls:
        call(logger)
    assert all(line.isascii() and "\n" not in line for line in shown)
    return [json.loads(line) for line in shown]


def test_a_record_is_one_line_with_its_event_and_fields():
    (plain, progress) = lines_of(
        lambda logger: logger.warning("two\nlines of %s", "é"),
        lambda logger: logger.info("half", extra=events.event("progress", done=1, total=2, left_s=None)),
    )
    assert (plain["level"], plain["event"], plain["message"]) == ("warning", "log", "two\nlines of é")
    assert plain["time"].endswith("+00:00") and set(plain) == {"time", "level", "event", "message"}
    del progress["time"]
    assert progress == {
        "level": "info", "event": "progress", "message": "half", "done": 1, "total": 2, "left_s": None
    }  # fmt: skip


def test_fields_hold_no_secrets_and_only_numbers_that_json_knows():
    uri = "https://user:password@host/a.png?X-Amz-Signature=abc"
    rows = [{"dice": float("nan"), "loss": float("inf"), "name": uri}]
    (line,) = lines_of(lambda logger: logger.info("x", extra=events.event("epoch", metrics=rows)))
    assert line["metrics"] == [{"dice": None, "loss": None, "name": "https://host/a.png"}]


def test_a_traceback_is_a_field():
    def fail(logger):
        try:
            raise ValueError("odd")
        except ValueError:
            logger.exception("failed")

    (line,) = lines_of(fail)
    assert line["message"] == "failed" and line["traceback"].endswith("ValueError: odd")


def test_names_of_events_are_known():
    with pytest.raises(KeyError, match="'progess' is no event"):
        events.event("progess")


@pytest.mark.parametrize("job", ["segment", "evaluate", "train", "sweep"])
def test_the_error_that_ends_a_job_is_an_event(job, tmp_path):
    """Every job has the option, and its stderr has nothing but JSON."""
    words = {"segment": ["/no/list", "--checkpoint", "/no/model"], "sweep": ["--config", "/no/config"]}
    command = [sys.executable, "-m", f"jobs.{job}", *words.get(job, ["--config", "/no/config"])]
    command.insert(4 if job == "segment" else 3, str(tmp_path / "out"))
    done = subprocess.run([*command, "--log-format", "json"], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert lines[-1].items() >= {"event": "error", "level": "error", "exit_code": 2}.items(), done.stderr
    assert "/no/" in lines[-1]["message"] and done.returncode == 2 and done.stdout == ""


def test_the_readme_lists_all_events():
    readme = (ROOT / "jobs/README.md").read_text(encoding="utf-8")
    for name, (when, fields) in events.EVENTS.items():
        assert f"| `{name}` | {when} | {fields} |" in readme
