"""Prompts of an evaluation, and whether they are also available for an unlabelled archive."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from vlsm.datasets.records import Record
from vlsm.evaluation.settings import OWN, EvaluateSettings
from vlsm.training.sampling import find_texts

HONEST, UPPER_BOUND, ROBUSTNESS = "honest", "upper_bound", "robustness"
_HONEST_KINDS = (OWN, "p0", "p1")  # p2 and above describe properties of the label
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
        texts = {
            name: own_prompt if name == OWN else find_texts(record, name, "prompts")[0] for name in settings.prompts
        }
        if settings.prompt_robustness and with_robustness:
            reference = texts[settings.prompts[0]]
            others = (text for dataset, text in p1_texts if dataset != record.dataset and text not in ("", reference))
            other = next(others, _ABSENT_OBJECT)
            for name, template in settings.robustness_prompts.items():
                texts[name] = template.replace("{other}", other).replace("{prompt}", reference)
        all_texts.append(texts)
    return all_texts


def find_telling(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """Return the prompts that reveal whether a target is empty, as a dict from (dataset, prompt name) to the reason.

    A prompt with one text for all records of a dataset reveals nothing. A prompt with several texts reveals the answer
    in two cases: a text contains a negation, or all records with an empty target have texts that no other record has.

    Args:
        rows: scores, with the columns dataset, prompt_name, prompt and target_fraction.
    """
    groups: dict[tuple[str, str], dict[str, set[bool | None]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        if row["prompt_name"] != OWN:
            fraction = row["target_fraction"]
            groups[row["dataset"], row["prompt_name"]][row["prompt"]].add(None if fraction is None else fraction == 0)
    reasons = {}
    for key, texts in groups.items():
        if len(texts) < 2:
            continue
        negations = [text for text in texts if _NEGATION.search(text)]
        empties = [text for text, are_empty in texts.items() if are_empty == {True}]
        if negations:
            reasons[key] = f"the text {negations[0]!r} contains a negation"
        elif empties and all(True not in are_empty for text, are_empty in texts.items() if text not in empties):
            reasons[key] = f"only empty targets have the text {empties[0]!r}"
    return reasons
