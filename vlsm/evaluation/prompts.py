"""What the systems are told, and whether an unlabelled archive could tell it as well."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from vlsm.evaluation.settings import OWN, EvaluateSettings
from vlsm.training.datasets import Record
from vlsm.training.sampling import find_texts

HONEST, UPPER_BOUND, ROBUSTNESS = "honest", "upper_bound", "robustness"
_HONEST_KINDS = (OWN, "p0", "p1")  # p2 and above describe what is read off the mask
_NOWHERE = "a car"
_NEGATION = re.compile(r"\b(no|not|none|without|normal|healthy|absent|absence|negative)\b", re.IGNORECASE)


def classify(name: str, settings: EvaluateSettings) -> str:
    """The class of a prompt by its name; what only the texts tell is found by `find_telling`."""
    if name not in settings.prompts:
        return ROBUSTNESS
    return HONEST if name in _HONEST_KINDS or name.startswith("text:") else UPPER_BOUND


def texts_of(
    records: Sequence[Record], own: str, settings: EvaluateSettings, with_robustness: bool
) -> list[dict[str, str]]:
    """Of each record the text of each prompt, by name.

    Args:
        records: all that are scored.
        own: the system's own prompt.
        settings: of the evaluation.
        with_robustness: whether robustness_prompts are among them, where the settings ask for them.

    Raises:
        ManifestError: a record has no such prompt.
    """
    firsts = {(record.dataset, text): None for record in records for text in record.prompts.get("p1", ())[:1]}
    found = []
    for record in records:
        texts = {name: own if name == OWN else find_texts(record, name, "prompts")[0] for name in settings.prompts}
        if settings.prompt_robustness and with_robustness:
            reference = texts[settings.prompts[0]]
            others = (text for dataset, text in firsts if dataset != record.dataset and text not in ("", reference))
            other = next(others, _NOWHERE)
            for name, template in settings.robustness_prompts.items():
                texts[name] = template.replace("{other}", other).replace("{prompt}", reference)
        found.append(texts)
    return found


def find_telling(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """The prompts that give the answer away, by dataset and name, and how.

    A prompt that says the same of all records of a dataset can give nothing away. One that differs does where it says
    that there is nothing, or where what is said of empty targets is never said of others.

    Args:
        rows: scores, with the columns dataset, prompt_name, prompt and target_fraction.
    """
    groups: dict[tuple[str, str], dict[str, set[bool | None]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        if row["prompt_name"] != OWN:
            fraction = row["target_fraction"]
            groups[row["dataset"], row["prompt_name"]][row["prompt"]].add(None if fraction is None else fraction == 0)
    found = {}
    for key, texts in groups.items():
        if len(texts) < 2:
            continue
        negations = [text for text in texts if _NEGATION.search(text)]
        empties = [text for text, are_empty in texts.items() if are_empty == {True}]
        if negations:
            found[key] = f"{negations[0]!r} says that there is nothing"
        elif empties and all(True not in are_empty for text, are_empty in texts.items() if text not in empties):
            found[key] = f"{empties[0]!r} is said of empty targets only"
    return found
