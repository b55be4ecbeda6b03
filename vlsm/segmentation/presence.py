"""Whether a model says that an image shows the finding.

Some models compute the presence: the probability that the image shows the prompt at all. For the others, the highest
probability of a pixel stands for it, or the mask.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlsm.errors import ConfigError


def judge_presence(row: Mapping[str, Any], threshold: float | None) -> bool | None:
    """Return whether a model says that an image shows the finding, or None if nobody knows.

    Args:
        row: of a segment run, with the columns area_fraction and max_probability, and presence if it has one.
        threshold: presence, or else highest probability, from which it does; None: any foreground pixel counts.
    """
    value = row["area_fraction"] if threshold is None else find_presence(row)
    if value is None:
        return None
    return bool(value > 0 if threshold is None else value >= threshold)


def find_presence(row: Mapping[str, Any]) -> float | None:
    """Return the presence of a row, or its highest probability if the model computes none, or None."""
    presence: float | None = row.get("presence")
    return row.get("max_probability") if presence is None else presence


def join_presence(members: Sequence[np.ndarray | None], weights: Sequence[float]) -> list[float | None]:
    """Return the presence of one prompt in one image: of the ensemble, then of each member.

    An image shows the prompt if one of its windows does: the highest value of the windows counts. Values are averaged
    over the texts of the prompt, then over the members that have one.

    Args:
        members: for each member (K texts, T windows) float, or None if its model computes no presence.
        weights: of the members.
    """
    own = [None if values is None else float(values.max(axis=1).mean()) for values in members]
    known = [(value, weight) for value, weight in zip(own, weights, strict=True) if value is not None]
    total = sum(weight for _, weight in known)
    return [sum(value * weight for value, weight in known) / total if known else None, *own]


def fit_presence(images: Sequence[tuple[float, bool]], temperature: float, specificity: float) -> dict[str, Any]:
    """Return the lowest threshold with a specificity, and what it does: fields of a `Calibration`.

    The threshold lies in the middle between the highest value that it must exclude and the next higher value.

    Args:
        images: highest logit of each image, or the logit of its presence, and whether the image shows the finding.
        temperature: logits are divided by it; 1 for those of the presence.
        specificity: wanted share of right images among those without the finding.

    Returns:
        presence_threshold, specificity, and sensitivity, which is None if no image shows the finding.

    Raises:
        ConfigError: no image is without the finding, or the model is sure of the finding in too many of them.
    """
    negatives = sorted(peak for peak, is_positive in images if not is_positive)
    if not negatives:
        raise ConfigError(
            f"specificity is {specificity:g}, but all validation images show the finding; add images without it (mask "
            "none), or leave specificity out"
        )
    excluded = negatives[math.ceil(round(specificity * len(negatives), 9)) - 1]
    above = [peak for peak, _ in images if peak > excluded]
    threshold = _probability((excluded + (min(above) if above else excluded + 1)) / 2, temperature)
    if not _probability(excluded, temperature) < threshold < 1:
        raise ConfigError(
            f"specificity is {specificity:g}, but the model gives too many images without the finding a probability of "
            "1, so that no threshold has it; lower it, or train with negative examples"
        )
    found = [(_probability(peak, temperature) >= threshold, is_positive) for peak, is_positive in images]
    right = {
        kind: [is_found == kind for is_found, is_positive in found if is_positive == kind] for kind in (True, False)
    }
    shares = {kind: sum(each) / len(each) if each else None for kind, each in right.items()}
    return {"presence_threshold": threshold, "specificity": shares[False], "sensitivity": shares[True]}


def _probability(logit: float, temperature: float) -> float:
    return float(1 / (1 + np.exp(-np.clip(logit / temperature, -80, None))))
