"""The log of a job for machines: JSON objects, one a line, with a stable name of the event and its fields.

A place that logs passes `extra=event(NAME, FIELD=VALUE, ...)`; the message stays for people. `--log-format json` shows
both. All other lines are events with the name "log".
"""

import datetime
import json
import logging
import math
import sys
from typing import Any

from vlsm.shown import hide_secrets_in, set_up_logging, show_lines

FORMATS = ("text", "json")

# name of an event: when it comes, and its fields beside `time`, `level`, `event` and `message`, as the README says it
EVENTS = {
    "phase": ("The job begins something else.", "`phase`"),
    "planned": (
        "The plan of a segment run is complete.",
        "`images`, `rows`; in a run that goes on `left`: images still to do",
    ),
    "progress": (
        "At most every 10 s.",
        "`done`, `total`, `unit`, `left_s`: null while unknown. `segment` also has `per_s`, `failed`, and "
        "`failed_by_reason` of this job. `train` has `epoch`, `epochs`, `step`, `steps`, `loss`, `per_s`, `left_s`; "
        "`validated` and `to_validate` while it validates",
    ),
    "epoch": ("An epoch of a training has ended.", "`epoch`, `epochs`, `is_best`, `metrics`: rows of the metrics"),
    "trial": ("A training of a sweep begins or ends.", "`name`, `state`: started, done or failed; `done`, `total`"),
    "finished": ("The job has ended well.", "the result, as in the JSON line on stdout"),
    "error": ("The job has ended with an error.", "`exit_code`, `error`: its class"),
    "interrupted": ("The job has ended by Ctrl-C or SIGTERM.", "`exit_code`"),
    "log": ("All else that is said.", "none"),
}


def event(name: str, /, **fields: Any) -> dict[str, Any]:
    """Return the argument `extra` of a logger's method for an event with this name of EVENTS.

    Args:
        name: of the event.
        fields: plain values. Texts are shown without secrets.
    """
    if name not in EVENTS:
        raise KeyError(f"{name!r} is no event")
    return {"event": name, "fields": fields}


class JsonFormatter(logging.Formatter):
    """Writes each record as one line of JSON in ASCII, with the time in UTC."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "event": getattr(record, "event", "log")}
        line |= {"message": record.getMessage()} | hide_secrets_in(getattr(record, "fields", {}))
        if record.exc_info and not record.exc_text:
            record.exc_text = show_lines(self.formatException(record.exc_info))
        if record.exc_text:
            line["traceback"] = record.exc_text
        return json.dumps(_finite(line), default=str)


def _finite(tree: Any) -> Any:
    """Return a tree of plain values with None for each number that JSON has no word for."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def set_up_log(log_format: str) -> None:
    """Log to stderr from now on, as lines with the time or as JSON."""
    set_up_logging("%(asctime)s %(message)s")
    if log_format != "json":
        return
    for handler in logging.root.handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr:
            handler.setFormatter(JsonFormatter())


def shows_bars() -> bool:
    """Return whether a live bar of progress may be shown: stderr is a terminal, and the log is for people."""
    is_json = any(isinstance(handler.formatter, JsonFormatter) for handler in logging.root.handlers)
    return sys.stderr.isatty() and not is_json
