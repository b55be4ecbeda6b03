"""Means, intervals and tests of scores. If patients are named, a patient with many images counts once as a sample.

Images of one patient are alike, so they say less than as many images of different patients: an interval that takes each
image for a sample is too narrow, and a p too small. With patients, the bootstrap draws patients, with all their images,
and the test compares the mean difference of each patient. The means stay means over images. An image without a patient
is a patient of its own.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]


def values_of(rows: Rows, name: str) -> np.ndarray:
    """Return the values of a column without nulls; rows of earlier versions lack some columns."""
    return np.array([row[name] for row in rows if row.get(name) is not None], float)


def mean(values: np.ndarray) -> float | None:
    """Return the mean, or None without values."""
    return float(values.mean()) if len(values) else None


def median(values: np.ndarray) -> float | None:
    """Return the median, or None without values."""
    return float(np.median(values)) if len(values) else None


def patient_of(row: Mapping[str, Any], patient: str | None) -> Hashable:
    """Return what tells the samples apart: the patient in this column, else the image of the record."""
    value = None if patient is None else row.get(patient)
    return ("record", row["record"]) if value is None else ("patient", value)


def count_patients(rows: Rows, patient: str | None) -> int:
    """Return the number of samples."""
    return len({patient_of(row, patient) for row in rows})


def interval(
    values: np.ndarray, patients: Sequence[Hashable], resamples: int, seed: int
) -> tuple[float | None, float | None]:
    """Return the 95 % percentile interval of a mean over images, or None for both ends below two patients.

    Args:
        values: one for each image.
        patients: of each image. If all differ, the samples are the images.
        resamples: number of bootstrap samples.
        seed: random seed.
    """
    numbers = {patient: number for number, patient in enumerate(dict.fromkeys(patients))}
    if len(numbers) < 2:
        return None, None
    from scipy import stats  # imported here and below, so that wrong settings fail within a second

    places = np.array([numbers[patient] for patient in patients])
    sums, counts = np.bincount(places, values), np.bincount(places)

    def mean_of(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
        return sums.sum(axis=axis) / counts.sum(axis=axis)

    options: dict[str, Any] = {"n_resamples": resamples, "batch": 100, "method": "percentile"}
    options["rng"] = np.random.default_rng(seed)
    if len(numbers) == len(values):
        found = stats.bootstrap((values,), np.mean, **options)
    else:
        found = stats.bootstrap((sums, counts), mean_of, paired=True, vectorized=True, **options)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def compare_pairs(
    rows: Rows, baseline_rows: Rows, patient: str | None
) -> tuple[float | None, int | None, float | None]:
    """Return the mean difference of Dice to the baseline, the number of images in both, and p by patients."""
    baseline_dice = {row["record"]: row["dice"] for row in baseline_rows if row["status"] == "ok"}
    by_patient: dict[Hashable, list[float]] = defaultdict(list)
    for row in rows:
        if row["record"] in baseline_dice:
            by_patient[patient_of(row, patient)].append(row["dice"] - baseline_dice[row["record"]])
    differences = np.array([value for values in by_patient.values() for value in values], float)
    if not len(differences):
        return None, None if not baseline_rows else 0, None
    from scipy import stats

    means = np.array([np.mean(values) for values in by_patient.values()])
    # Wilcoxon's test cannot rank differences that are all 0; there is no evidence of a difference then.
    p = float(stats.wilcoxon(means).pvalue) if means.any() else 1.0
    return float(differences.mean()), len(differences), p
