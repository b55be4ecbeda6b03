"""Prompts of an evaluation, and whether they are also available for an unlabelled archive."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from vlsm.datasets.records import OWN, RECORD, Record
from vlsm.evaluation.settings import EvaluateSettings
from vlsm.training.sampling import find_prompt

logger = logging.getLogger("vlsm")

HONEST, UPPER_BOUND, ROBUSTNESS = "honest", "upper_bound", "robustness"
_HONEST_KINDS = (RECORD, OWN, "p0", "p1")  # p2 and above describe properties of the label
_ABSENT_OBJECT = "a car"
_NEGATION = re.compile(r"\b(no|not|none|without|normal|healthy|absent|absence|negative)\b", re.IGNORECASE)


def classify(name: str, settings: EvaluateSettings) -> str:
    """Return the class of a prompt, judged by its name alone; `find_telling` judges the texts."""
    if name not in settings.prompts:
        return ROBUSTNESS
    return HONEST if name in _HONEST_KINDS or name.startswith("text:") else UPPER_BOUND


def texts_of(
    records: Sequence[Record], own_prompt: str, settings: EvaluateSettings, with_robustness: bool
) -> list[dict[str, str]]:
    """Return for each record a dict from prompt name to text.

    Args:
        records: all records to score.
        own_prompt: the prompt of the system's checkpoint or segment run.
        settings: settings of the evaluation.
        with_robustness: also return the robustness_prompts, if the settings enable prompt_robustness.

    Raises:
        ManifestError: a record lacks one of the prompts.
    """
    p1_texts = {(record.dataset, text): None for record in records for text in record.prompts.get("p1", ())[:1]}
    all_texts = []
    for record in records:
        texts = {name: find_prompt(record, name, own_prompt, "prompts") for name in settings.prompts}
        if settings.prompt_robustness and with_robustness:
            reference = texts[settings.prompts[0]]
            others = (text for dataset, text in p1_texts if dataset != record.dataset and text not in ("", reference))
            other = next(others, _ABSENT_OBJECT)
            for name, template in settings.robustness_prompts.items():
                texts[name] = template.replace("{other}", other).replace("{prompt}", reference)
        all_texts.append(texts)
    return all_texts


def needs_stored(records: Sequence[Record], settings: EvaluateSettings) -> bool:
    """Return whether any record is scored with the prompt that is stored in a system's checkpoint."""
    return OWN in settings.prompts or (RECORD in settings.prompts and any(one.prompt is None for one in records))


def report_stored(name: str, records: Sequence[Record], own_prompt: str, settings: EvaluateSettings) -> None:
    """Log how many records have no prompt of their own, so that they get the one of the system's checkpoint."""
    count = sum(record.prompt is None for record in records)
    if count and RECORD in settings.prompts:
        logger.info("%s: %d of %d records have no p1: their prompt is %r, as stored in the checkpoint",
                    name, count, len(records), own_prompt)  # fmt: skip


def match_texts(
    name: str, records: Sequence[Record], texts: Sequence[dict[str, str]], run_prompts: set[str]
) -> list[dict[str, str]]:
    """Return the texts of `texts_of` as an existing segment run has them.

    The masks of the records' own prompts are scored. But if the run has a single prompt, and no record of a dataset has
    this prompt, then the run calls the objects by another name: its masks are scored for all records of the dataset.

    Args:
        name: name of the system, for log lines.
        records: all records to score.
        texts: texts by prompt name of each record.
        run_prompts: all prompts of the segment run.
    """
    found = {record.dataset for record, each in zip(records, texts, strict=True) if each.get(RECORD) in run_prompts}
    others = dict.fromkeys(record.dataset for record, each in zip(records, texts, strict=True) if RECORD in each)
    others = {dataset: None for dataset in others if dataset not in found and len(run_prompts) == 1}
    if not others:
        return list(texts)
    (only,) = run_prompts
    logger.info("%s: the segment run has the prompt %r only, which no record of %s has: its masks are scored for all",
                name, only, ", ".join(others))  # fmt: skip
    return [
        each | {RECORD: only} if record.dataset in others else each for record, each in zip(records, texts, strict=True)
    ]


def find_telling(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """Return the prompts that reveal whether a target is empty, as a dict from (dataset, prompt name) to the reason.

    A prompt with one text for all records of a dataset reveals nothing; the text may differ between systems. A prompt
    with several texts reveals the answer in two cases: a text contains a negation, or all records with an empty target
    have texts that no other record has.

    Args:
        rows: scores, with the columns system, dataset, prompt_name, prompt and target_fraction.
    """
    groups: dict[tuple[str, str, str], dict[str, set[bool | None]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        fraction = row["target_fraction"]
        texts = groups[row["dataset"], row["prompt_name"], row["system"]]
        texts[row["prompt"]].add(None if fraction is None else fraction == 0)
    reasons = {}
    for (dataset, name, _), texts in groups.items():
        key = (dataset, name)
        if len(texts) < 2:
            continue
        negations = [text for text in texts if _NEGATION.search(text)]
        empties = [text for text, are_empty in texts.items() if are_empty == {True}]
        if negations:
            reasons[key] = f"the text {negations[0]!r} contains a negation"
        elif empties and all(True not in are_empty for text, are_empty in texts.items() if text not in empties):
            reasons[key] = f"only empty targets have the text {empties[0]!r}"
    return reasons
