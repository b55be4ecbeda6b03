"""Classes of masks: which stored value or colour of a mask file is which prompt (the setting data.classes)."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from vlsm.datasets.records import Record
from vlsm.images.stored import COLOURS

Named = dict[int | str, str]  # prompts by stored value, or by colour as "#ff0000"
Labels = dict[str, tuple[int, ...]]  # values by prompt


def check_classes(value: Any) -> Any:
    """Return the setting data.classes with numbers as keys, also where YAML or JSON gives texts; a field validator.

    Raises:
        ValueError: a key is neither a value of a mask, nor a colour, nor the name of a dataset with its classes.
    """
    if not isinstance(value, dict):
        return value
    if not any(isinstance(item, dict) for item in value.values()):
        return _check_named(value)
    if mixed := [key for key, item in value.items() if not isinstance(item, dict)]:
        raise ValueError(f"{mixed[0]!r} has no classes; give them for each dataset, or for all datasets together")
    return {str(name): _check_named(named) for name, named in value.items()}


def _check_named(value: dict[Any, Any]) -> Named:
    named = dict(map(_check_class, value.items()))
    if len({type(key) for key in named}) > 1:
        raise ValueError(f"{', '.join(map(str, named))} are values and colours; give either values or colours")
    return named


def _check_class(item: tuple[Any, Any]) -> tuple[int | str, str]:
    key, prompt = item
    text = str(key).strip().lower()
    if not re.fullmatch(r"-?\d+|#[0-9a-f]{6}", text):
        example = "{1: polyp} or {'#ff0000': polyp}"
        raise ValueError(f"{key!r} is no value of a mask and no colour; give classes as {example}")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"class {text} has the prompt {prompt!r}; give words, as in {{1: polyp}}")
    return text if text.startswith("#") else int(text), prompt


def labels_of(classes: Mapping[int | str, str | Named], *datasets: str) -> Labels:
    """Return the labels of each prompt of a dataset, as in `Record.labels`. Classes of one prompt are one class.

    Args:
        classes: the setting data.classes.
        datasets: names of the dataset; the first one that has classes of its own is used.
    """
    own = next((one for one in map(classes.get, datasets) if isinstance(one, dict)), None)
    labels: Labels = {}
    for key, prompt in (classes if own is None else own).items():
        if isinstance(prompt, str):  # else these are the classes of another dataset
            label = COLOURS + int(key[1:], 16) if isinstance(key, str) else int(key)
            labels[prompt] = (*labels.get(prompt, ()), label)
    return labels


def split_by_class(record: Record, labels: Labels) -> Iterator[Record]:
    """Yield a record for each class. The prompt p1 of a class replaces all prompts of the record.

    A class that an image does not show has an empty mask there: that is an example, too, since most images of an
    archive do not show it. absent_classes=skip leaves such records out.
    """
    for prompt, values in labels.items():
        yield replace(record, where=f"{record.where}, class {prompt}", labels=values, prompts={"p1": (prompt,)})
