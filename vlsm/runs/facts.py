"""Facts in a record beside the settings that decide the results, such as digests, and their differences in words.

A digest tells that something has changed, but no person can act on it. So records also hold, beside each digest, what a
person knows a checkpoint or a dataset by. These facts are not compared: earlier versions did not write them.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from vlsm.checkpoints import Calibration, CheckpointSettings
from vlsm.shown import public_uri

DESCRIPTIVE = {"checkpoints", "num_records", "num_rejected"}


def checkpoint_fact(checkpoint: CheckpointSettings) -> dict[str, Any]:
    """Return what a record tells of a checkpoint: its model, and its calibration or None."""
    calibration = checkpoint.calibration
    stated = None if calibration is None else calibration.model_dump(mode="json", exclude={"reliability"})
    return {"model": checkpoint.model, "calibration": stated}


def recorded_calibrations(uris: Sequence[str], facts: object) -> dict[str, Calibration | None]:
    """Return the calibrations in a record by the location of the checkpoint, None for those without one.

    Args:
        uris: locations of the checkpoints, in the order of `facts`.
        facts: the recorded facts, one for each checkpoint; earlier versions did not record them.
    """
    found: dict[str, Calibration | None] = {}
    for uri, fact in zip(uris, facts if isinstance(facts, list) else [], strict=False):
        with contextlib.suppress(LookupError, TypeError, ValidationError):  # anybody may have written them
            stated = fact["calibration"]
            found[uri] = None if stated is None else Calibration.model_validate(stated)
    return found


def describe_fact(
    key: str, record: dict[str, Any], config: dict[str, Any], facts: dict[str, Any], generic: str
) -> Iterator[str]:
    """Yield phrases about a fact that differs between a recorded run and a new command.

    Args:
        key: name of the fact.
        record: the record of the run; anybody may have written it.
        config: settings of the new command, as plain values.
        facts: facts of the new command.
        generic: the phrase for a fact, or a record, that is not known here.
    """
    phrases: list[str] = []
    try:
        if key == "checkpoint_digests":
            phrases = list(_describe_checkpoints(record, config, facts))
        elif key == "mask_runs":
            there, now = record[key], facts[key]
            phrases = [
                f"masks {name}: the segment run in {config['masks'][name]!r} is another one than before"
                for name in now
                if there.get(name) != now[name]
            ]
        elif key == "records_digest":
            phrases = [_describe_records(record.get("num_records") or {}, facts.get("num_records") or {})]
    except (AttributeError, LookupError, TypeError, ValueError):  # a damaged record
        phrases = []
    yield from phrases or [generic]


def _describe_checkpoints(record: dict[str, Any], config: dict[str, Any], facts: dict[str, Any]) -> Iterator[str]:
    there, now = record["checkpoint_digests"], facts["checkpoint_digests"]
    if isinstance(now, dict):  # of an evaluation, by system
        for name in sorted(there.keys() & now.keys()):
            sides = [
                (digests[name], tree["systems"][name], (stated.get("checkpoints") or {}).get(name))
                for digests, tree, stated in ((there, record["config"], record), (now, config, facts))
            ]
            yield from (f"system {name}: {phrase}" for phrase in _describe_members(*sides))
        return
    yield from _describe_members(
        (there, record["config"]["members"], record.get("checkpoints")),
        (now, config["members"], facts.get("checkpoints")),
    )


def _describe_members(there: tuple[Any, Any, Any], now: tuple[Any, Any, Any]) -> Iterator[str]:
    """Yield a phrase for each member whose checkpoint differs. A side is digests, settings and facts of its members."""
    if len(there[0]) != len(now[0]):
        yield f"the number of checkpoints (there {len(there[0])}, now {len(now[0])})"
        return
    for number, (before, after) in enumerate(zip(there[0], now[0], strict=True)):
        if before == after:
            continue
        old, new = (public_uri(members[number]["checkpoint"]).rstrip("/") for _, members, _ in (there, now))
        was, is_ = (_name(known, number) for *_, known in (there, now))
        if old == new:
            yield f"the files of checkpoint {new!r} have changed since the run began (there {was}, now {is_})"
        else:
            yield f"the checkpoint (there {old!r}, {was}; now {new!r}, {is_})"


def _name(known: Sequence[Any] | None, number: int) -> str:
    """Return model and temperature of a checkpoint in words."""
    if not known:
        return "an unknown model"
    calibration = known[number]["calibration"]
    state = "not calibrated" if calibration is None else f"temperature {calibration['temperature']:.3g}"
    return f"{str(known[number]['model'])[:80]}, {state}"


def _describe_records(there: dict[str, Any], now: dict[str, Any]) -> str:
    counts = [
        f"{name!s:.80} has {now.get(name, 0):,} records, there {there.get(name, 0):,}"
        for name in sorted(there.keys() | now.keys())
        if there and there.get(name) != now.get(name)
    ]
    reason = "; ".join(counts) or "their images, labels or prompts"
    return f"the test records of the datasets have changed ({reason})"
