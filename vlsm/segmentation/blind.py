"""Prompts for models that ignore their text.

The rule: such a model marks the thing that it was trained for, which is the prompt stored in its checkpoint. It takes
one prompt, and only this one: its mask under another name would be wrong. So the name of the prompt, or one of its
texts, must be the stored prompt. Case and blanks do not count. A checkpoint without a stored prompt takes any one
prompt. A class gives the mask another name: `classes={finding: [polyp]}`. `allow_equal_masks` allows all prompts. An
ensemble in which some members read the text, or have the prompt, is allowed with a warning.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vlsm.checkpoints import CheckpointSettings
from vlsm.config import SegmentSettings
from vlsm.errors import ConfigError
from vlsm.shown import show

logger = logging.getLogger("vlsm")

_LISTS = (".parquet", ".csv", ".tsv", ".jsonl")


class Reader(NamedTuple):
    """A member of an ensemble.

    Attributes:
        model: name of its model.
        is_blind: whether the model ignores text.
        stored: its stored prompt.
        replaced: texts that it gets for others.
    """

    model: str
    is_blind: bool
    stored: str
    replaced: Mapping[str, str] = {}


def reader_of(checkpoint: CheckpointSettings, replaced: Mapping[str, str] | None = None) -> Reader:
    """Return the member with a checkpoint."""
    return Reader(checkpoint.model, checkpoint.is_blind, checkpoint.prompt, replaced or {})


class Verdict(NamedTuple):
    """A sentence about prompts without an end, and whether it is an error or only a warning."""

    message: str
    is_error: bool


def judge_prompts(texts: Sequence[Sequence[str]], members: Sequence[Reader]) -> Verdict | None:
    """Return what the rule says about the prompts of an image, or None if it has nothing to say.

    Args:
        texts: for each prompt its name, and the texts that the models see.
        members: one model, or the members of an ensemble.
    """
    blind = [member for member in members if member.is_blind]
    if not blind or not texts:
        return None
    names = list(dict.fromkeys(member.model for member in blind))
    ignore = f"{', '.join(names)} {'ignores' if len(names) == 1 else 'ignore'} the text"
    if len(texts) > 1:
        if len(blind) == len(members):
            return Verdict(f"{ignore}: all {len(texts)} prompts would have the same mask", is_error=True)
        same = f"in this ensemble such a member has the same mask for each of the {len(texts)} prompts"
        return Verdict(f"{ignore}: {same}", is_error=False)
    others = [member for member in blind if not _has_prompt(member, texts[0])]
    if not others:
        return None
    stored = " and ".join(dict.fromkeys(repr(show(member.stored)) for member in others))
    sentence = f"{ignore}, and was trained for {stored}: the prompt {show(texts[0][0])!r} would not change the mask"
    return Verdict(sentence, is_error=len(others) == len(members))


def _has_prompt(member: Reader, texts: Iterable[str]) -> bool:
    seen = {_plain(member.replaced.get(text, text)) for text in texts}
    return not member.stored.strip() or _plain(member.stored) in seen


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def check_names(settings: SegmentSettings) -> None:
    """Warn of names that stand for no prompt of the run: a class, or a member's own text, is then never used.

    It is a warning, because a Parquet file with images may state further prompts; so may a list, of which nothing is
    said.
    """
    if not settings.input or settings.input.lower().endswith(_LISTS):
        return
    prompts = settings.prompts or tuple(settings.classes)
    texts = {text for each in settings.texts_of(prompts) for text in each}
    given = [("classes", set(settings.classes), set(prompts))]
    given += [(f"prompts of member {member.checkpoint}", set(member.prompts), texts) for member in settings.members]
    for key, names, known in given:
        if unknown := sorted(names - known):
            words = key, ", ".join(unknown), ", ".join(sorted(known))
            logger.warning("%s: %s is no prompt of this run, so it is not used; known: %s", *words)


def check_prompts(settings: SegmentSettings, checkpoints: Sequence[CheckpointSettings]) -> None:
    """Apply the rule to the prompts of a run: warn, or raise a ConfigError."""
    check_names(settings)
    named = _names_and_texts(settings, settings.prompts or ())
    verdict = None if settings.allow_equal_masks else judge_prompts(named, _readers(settings, checkpoints))
    if verdict is None:
        return
    if not verdict.is_error:
        logger.warning("%s", verdict.message)
        return
    raise ConfigError(f"{verdict.message}; {_way_out(settings.prompts or (), checkpoints)}")


def watch_prompts(
    rows: Iterable[dict[str, Any]], settings: SegmentSettings, checkpoints: Sequence[CheckpointSettings], may_stop: bool
) -> Iterator[dict[str, Any]]:
    """Yield rows of the plan, and apply the rule to prompts that a manifest states for its images.

    Args:
        rows: with the columns of PLAN_SCHEMA.
        settings: resolved settings of the run.
        checkpoints: the members' checkpoints.
        may_stop: whether an error may end the run, because no work has started; else the first one is a warning.

    Raises:
        ConfigError: the first row against the rule, if may_stop.
    """
    readers = _readers(settings, checkpoints)
    is_watching = not settings.allow_equal_masks and any(reader.is_blind for reader in readers)
    for row in rows:
        if is_watching and tuple(row["prompts"]) != settings.prompts:
            verdict = judge_prompts(_names_and_texts(settings, row["prompts"]), readers)
            if verdict is not None and verdict.is_error and may_stop:
                way_out = _way_out(row["prompts"], checkpoints)
                raise ConfigError(f"image {row['image_id']!r}: {verdict.message}; {way_out}")
            if verdict is not None:
                logger.warning("image %s: %s", row["image_id"], verdict.message)
                is_watching = False
        yield row


def _names_and_texts(settings: SegmentSettings, prompts: Sequence[str]) -> list[tuple[str, ...]]:
    return [(name, *texts) for name, texts in zip(prompts, settings.texts_of(prompts), strict=True)]


def _readers(settings: SegmentSettings, checkpoints: Sequence[CheckpointSettings]) -> list[Reader]:
    pairs = zip(settings.members, checkpoints, strict=True)
    return [reader_of(checkpoint, member.prompts) for member, checkpoint in pairs]


def _way_out(prompts: Sequence[str], checkpoints: Sequence[CheckpointSettings]) -> str:
    stored = next((checkpoint.prompt for checkpoint in checkpoints if checkpoint.prompt.strip()), prompts[0])
    rename = f"--set 'classes={{{prompts[0]}: [{stored}]}}'"
    one = f"give one prompt, such as --set 'prompts=[{stored}]'"
    advice = one if len(prompts) > 1 else f"leave the prompt out, or give this mask another name with {rename}"
    return f"{advice}, or --set allow_equal_masks=true"
