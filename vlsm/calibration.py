"""Calibrate a checkpoint: fit a temperature and a threshold on validation images.

`python -m vlsm.calibration CHECKPOINT CALIBRATED --dataset NAME=URI`
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pydantic import Field, field_validator, model_validator
from tqdm import tqdm

from vlsm import storage
from vlsm.checkpoints import SETTINGS_NAME, Calibration, build_checkpoint, read_checkpoint
from vlsm.commands import new_parser
from vlsm.config import PlaceSettings, Settings, dump_yaml, load_settings
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.inspection import require_foreground
from vlsm.datasets.read import read_dataset
from vlsm.datasets.records import RECORD, Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.datasets.splits import GIVE, require_splits
from vlsm.errors import CheckpointError, ConfigError, ImageError, ManifestError, VlsmError
from vlsm.segmentation.masks import logit
from vlsm.segmentation.metrics import BAD_DICE
from vlsm.segmentation.presence import fit_presence
from vlsm.shown import say, say_error
from vlsm.training.origin import count_known, describe_differences_to_training
from vlsm.training.sampling import find_prompt
from vlsm.words import count

if TYPE_CHECKING:
    from vlsm.segmentation.segmenter import Segmenter

_EDGES = np.linspace(-20, 20, 1601)  # edges of logit bins, each 0.025 wide
_CENTRES = (_EDGES[1:] + _EDGES[:-1]) / 2
_BINS = 15  # in a reliability diagram
_USUAL_AREAS = (1, 99)  # percentiles of the area fractions of the validation masks


class CalibrationSettings(Settings):
    """Labelled images to calibrate on, and their prompts."""

    datasets: dict[str, str] = Field({}, description="locations of labelled datasets by name, as in --dataset")
    prompt: str = Field(
        RECORD,
        description="record (each record's own prompt, its p1; if it has none, the checkpoint's), own (stored in the "
        "checkpoint), p0, p1, ... or text:WORDS",
    )
    specificity: float | None = Field(
        None,
        gt=0,
        le=1,
        description="also store the lowest presence_threshold at which this share of the validation images without the "
        "finding stays below it; jobs.evaluate uses it for sensitivity and specificity",
    )
    data: DatasetSettings = DatasetSettings()
    run: PlaceSettings = PlaceSettings()

    @field_validator("datasets")
    @classmethod
    def _make_absolute(cls, value: dict[str, str]) -> dict[str, str]:
        return {name: storage.absolute(uri) for name, uri in value.items()}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.datasets:
            raise ValueError("there is no dataset to calibrate on; give --dataset NAME=URI at least once")
        return self


# logits (H, W) float, mask (H, W) of 0 and 1, and the presence, from 0 to 1, if the model computes it
Labelled = tuple[np.ndarray, np.ndarray] | tuple[np.ndarray, np.ndarray, float | None]


def calibrate(examples: Iterable[Labelled], specificity: float | None = None) -> Calibration:
    """Return the temperature and the threshold that fit labelled images best, with their statistics.

    The temperature maximises the mean log-likelihood of the pixels (Guo et al. 2017, equation 9); every image has the
    same weight. The threshold maximises the mean Dice of the images. Of equally good thresholds it is the one in the
    middle; see `_middle_of_best`.

    Args:
        examples: logits at the original size of each image, its target mask, and its presence if it has one.
        specificity: wanted share of right images among those without the finding; None for no presence threshold.

    Raises:
        ConfigError: there are no examples, or no threshold has the specificity.
    """
    counted, peaks, presences, positives = [], [], [], []
    for logits, mask, *presence in examples:
        counted.append(_count(logits, mask))
        peaks.append(float(logits.max()))
        presences += [logit(value) for value in presence if value is not None]
        positives.append(bool(mask.any()))
    counts = np.array(counted)  # (N, 2, bins): background, foreground
    if not len(counts):
        raise ConfigError("there are no labelled images; calibration needs one or more in the validation splits")
    shares = (counts / counts.sum(axis=(1, 2), keepdims=True)).mean(axis=0)
    from scipy.optimize import minimize_scalar

    minimum = minimize_scalar(lambda log: _loss(shares, np.exp(log)), bounds=np.log([0.05, 20]), method="bounded")
    temperature = float(np.exp(minimum.x))
    dice = _dice_by_threshold(counts)
    # only thresholds from 0.01 to 0.99: float16 logits are too coarse beyond
    usable = np.flatnonzero(np.abs(_EDGES[1:-1] / temperature) < np.log(99))
    best = int(usable[_middle_of_best(np.round(dice.mean(axis=0)[usable], 4))])
    threshold = _sigmoid(_EDGES[1:-1][best] / temperature)
    areas = counts[:, 1].sum(axis=1) / counts.sum(axis=(1, 2))
    before, after = (reliability(shares, value) for value in (1.0, temperature))
    return Calibration(
        temperature=round(temperature, 4),
        num_images=len(counts),
        error_before=expected_error(before),
        error_after=expected_error(after),
        dice_at_half=float(dice[:, len(_EDGES) // 2 - 1].mean()),
        dice=float(dice[:, best].mean()),
        threshold=round(float(threshold), 4),
        min_confidence=_min_confidence(counts, best, temperature, dice[:, best]),
        area_fraction=tuple(np.percentile(areas, _USUAL_AREAS).round(5).tolist()),
        reliability=after,
        **({} if specificity is None else _fit_presence(peaks, presences, positives, temperature, specificity)),
        num_negatives=positives.count(False),
    )


def _fit_presence(
    peaks: list[float], presences: list[float], positives: list[bool], temperature: float, specificity: float
) -> dict[str, Any]:
    """Return the result of `fit_presence` for the logits of the presence, or else for the highest logits."""
    if presences:
        return fit_presence(list(zip(presences, positives, strict=True)), 1, specificity)
    return fit_presence(list(zip(peaks, positives, strict=True)), round(temperature, 4), specificity)


def reliability(shares: np.ndarray, temperature: float) -> list[tuple[float, float, float]]:
    """Return a reliability diagram: pixels grouped by probability into 15 equal bins, without empty bins.

    Args:
        shares: (2, bins) shares of all pixels, by label and logit.
        temperature: logits are divided by it.

    Returns:
        For each bin the mean probability, the share of foreground, and the share of all pixels.
    """
    probability, total = _sigmoid(_CENTRES / temperature), shares.sum(axis=0)
    bins = np.minimum((probability * _BINS).astype(int), _BINS - 1)
    rows = []
    for number in range(_BINS):
        chosen = bins == number
        if weight := total[chosen].sum():
            mean = (probability[chosen] * total[chosen]).sum() / weight
            rows.append(tuple(round(float(value), 6) for value in (mean, shares[1, chosen].sum() / weight, weight)))
    return rows  # type: ignore[return-value]


def expected_error(rows: list[tuple[float, float, float]]) -> float:
    """Return the expected calibration error of a reliability diagram (Naeini et al. 2015)."""
    return round(sum(weight * abs(mean - share) for mean, share, weight in rows), 6)


def _count(logits: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return pixel counts (2, bins) of background and foreground, by logit."""
    if not np.isfinite(logits).all():
        raise ConfigError("the model gives logits that are no numbers: it cannot be calibrated")
    clipped = np.clip(logits, _EDGES[0], _EDGES[-1])
    return np.stack([np.histogram(clipped[mask == label], _EDGES)[0] for label in (0, 1)])


def _loss(shares: np.ndarray, temperature: float) -> float:
    """Return the mean negative log-likelihood of the pixels at a temperature."""
    scaled = _CENTRES / temperature
    return float((shares[0] * np.logaddexp(0, scaled) + shares[1] * np.logaddexp(0, -scaled)).sum())


def _dice_by_threshold(counts: np.ndarray) -> np.ndarray:
    """Return the Dice (N, bins - 1) of each image, if logits at or above each inner edge are foreground."""
    above = counts[:, :, ::-1].cumsum(axis=2)[:, :, -2::-1]
    hits, marked, targets = above[:, 1], above.sum(axis=1), counts[:, 1].sum(axis=1)[:, None]
    total = marked + targets
    return np.where(total > 0, 2 * hits / np.maximum(total, 1), 1.0)


def _middle_of_best(values: np.ndarray) -> int:
    """Return the index in the middle of the longest plateau of best values, the place with most room on both sides.

    Of plateaus of equal length, the one nearest to the middle of `values` is taken.
    """
    best = np.flatnonzero(values == values.max())
    plateaus = np.split(best, np.flatnonzero(np.diff(best) > 1) + 1)
    centre = (len(values) - 1) / 2
    longest = max(plateaus, key=lambda plateau: (len(plateau), -abs(plateau.mean() - centre)))
    return int(longest[len(longest) // 2])


def _min_confidence(counts: np.ndarray, edge: int, temperature: float, dice: np.ndarray) -> float | None:
    """Return the confidence limit that best separates bad masks (Dice below BAD_DICE) from the others, by F1.

    None if all masks are bad, or none.
    """
    inside = counts[:, :, edge + 1 :].sum(axis=1)
    areas = inside.sum(axis=1)
    sums = (inside * _sigmoid(_CENTRES[edge + 1 :] / temperature)).sum(axis=1)
    confidence, is_bad = sums[areas > 0] / areas[areas > 0], (dice < BAD_DICE)[areas > 0]
    if not is_bad.any() or is_bad.all():
        return None
    candidates = np.unique(confidence)
    hits = [(is_bad & (confidence < limit)).sum() for limit in candidates]
    scores = [
        2 * hit / (is_bad.sum() + (confidence < limit).sum()) for hit, limit in zip(hits, candidates, strict=True)
    ]
    return round(float(candidates[int(np.argmax(scores))]), 4)


def _sigmoid(values: Any) -> Any:
    return 1 / (1 + np.exp(-values))


def _predict(segmenter: "Segmenter", records: list[Record], reader: ExampleReader, choice: str) -> Iterator[Labelled]:
    """Yield logits at the original size of each image, and its mask. Unreadable images are reported and skipped."""
    square, stored = segmenter.model.image_spec.square, segmenter.settings.prompt
    for record in tqdm(records, unit="image", disable=not sys.stderr.isatty()):
        try:
            example = reader.read(record)
            prompt = find_prompt(record, choice, stored, "prompt")
        except (ImageError, ManifestError) as error:
            say(f"skipped: {error}", sys.stderr)
            continue
        mask = example.target.mask
        ((logits, presence),) = segmenter.predict(square.resize_image(example.image)[None], [[prompt]])
        enlarged = square.enlarge_logits(logits[0], (mask.shape[0], mask.shape[1]))
        yield enlarged, mask, None if presence is None else float(presence[0])


def calibrate_checkpoint(source: str, directory: str, settings: CalibrationSettings) -> Calibration:
    """Write a calibrated copy of a checkpoint, and return its temperature, threshold and statistics.

    The weights do not change.

    Args:
        source: the checkpoint, local or on an object store.
        directory: a local folder for the calibrated checkpoint; it must not exist yet.
        settings: the datasets, whose validation splits are used, and how to read and prompt them.

    Raises:
        VlsmError: a checkpoint or dataset is missing, there are no labelled images, or nearly all masks are empty.
        ProbeError: this machine computes otherwise than the one where the checkpoint was written.
    """
    if "://" in directory or Path(directory).exists():
        raise ConfigError(f"CALIBRATED is {directory}; it must be a local folder that does not exist yet")
    data, choice = settings.data.allowing(settings.run.allow), settings.prompt
    all_records = [record for name, uri in settings.datasets.items() for record in read_dataset(name, uri, data)]
    data.refuse_unknown([*settings.datasets, *(record.dataset for record in all_records)])
    require_splits(all_records, GIVE)
    records = [record for record in all_records if record.split == "val"]
    files = read_checkpoint(source)
    if sentence := describe_differences_to_training(source, data, (choice,)):
        say(sentence, sys.stderr)
    if num_known := count_known([source], records):
        say(
            f"the checkpoint learned from {num_known:,} of these {len(records):,} val images, itself or by its "
            "members: it is better there than elsewhere, and its calibration will be too sure",
            sys.stderr,
        )
    reader = ExampleReader(data)
    require_foreground(records, reader, data)
    checkpoint = build_checkpoint(files, source)
    plain = checkpoint.settings.model_copy(update={"calibration": None})
    if choice == RECORD and (count := sum(record.prompt is None for record in records)):
        say(
            f"{count} of {len(records)} records have no p1: their prompt is {plain.prompt!r}, from the checkpoint",
            sys.stderr,
        )
    from vlsm.segmentation.segmenter import Segmenter  # here: --help does not wait for torch

    segmenter = Segmenter(replace(checkpoint, settings=plain))
    segmenter.check_probe()  # a temperature of wrong logits would make them look right
    calibration = calibrate(_predict(segmenter, records, reader, choice), settings.specificity)
    calibrated = plain.model_copy(update={"threshold": calibration.threshold, "calibration": calibration})
    folder = Path(directory)
    for name, content in files.items():
        if name != SETTINGS_NAME:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    (folder / SETTINGS_NAME).write_text(dump_yaml(calibrated.model_dump(mode="json")), encoding="utf-8")
    return calibration


def describe_calibration(calibration: Calibration, directory: str) -> list[str]:
    """Return lines that describe a calibration to a person."""
    before, after = (f"{error:.4f}" for error in (calibration.error_before, calibration.error_after))
    at_half, at_own = (f"{dice:.3f}" for dice in (calibration.dice_at_half, calibration.dice))
    low, high = (f"{100 * share:.3g} %" for share in calibration.area_fraction)
    least = calibration.min_confidence
    marked = "no limit was found" if least is None else f"below {least:.2f}"
    return [
        f"temperature {calibration.temperature:.3g}: the model's raw values are divided by it; the mean gap between "
        f"probability and true share was {before} and is {after}",
        f"threshold {calibration.threshold:.3g}: lowest probability of a foreground pixel; mean Dice {at_own}, "
        f"with 0.5 {at_half}",
        f"review: masks with a confidence {marked}, or an area outside of {low} to {high} of the image",
        f"measured on {count(calibration.num_images, 'validation image')}; the calibrated checkpoint: {directory}",
    ]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(
        "vlsm.calibration",
        str(main.__doc__),
        (
            "trained/checkpoint calibrated --dataset kvasir=data/kvasir",
            "checkpoint calibrated --dataset own=own.csv --prompt text:polyp",
        ),
        CalibrationSettings,
        ("prompt", "specificity", "data.mask_threshold", "data.classes", "data.prompts"),
        "exit codes: 0 done, 1 it failed, 2 configuration or usage wrong",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint directory; local or s3://")
    parser.add_argument("directory", metavar="CALIBRATED", help="a new local folder for the calibrated checkpoint")
    parser.add_argument(
        "--dataset", action="append", default=[], metavar="NAME=URI", help="labelled images, as for jobs.train"
    )
    parser.add_argument("--prompt", help="the same as --set prompt=..., such as own, p1 or text:WORDS")
    parser.add_argument("--config", metavar="FILE", help="YAML with settings")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="one setting; may be repeated")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Fit the temperature and threshold of a checkpoint on validation images, and write a calibrated copy."""
    args = make_parser().parse_args(argv)
    try:
        pairs = [item.partition("=") for item in args.dataset]
        if wrong := [item for item, (_, equals, uri) in zip(args.dataset, pairs, strict=True) if not (equals and uri)]:
            raise ConfigError(f"--dataset {wrong[0]!r} is not of the form NAME=URI")
        arguments: dict[str, Any] = {"datasets": {name: uri for name, _, uri in pairs}} if pairs else {}
        arguments |= {"prompt": args.prompt} if args.prompt else {}
        settings = load_settings(CalibrationSettings, args.config, args.set, arguments)
        calibration = calibrate_checkpoint(args.checkpoint, args.directory, settings)
    except (VlsmError, OSError) as error:
        say_error(error)
        return 2 if isinstance(error, (ConfigError, CheckpointError, ManifestError)) else 1
    for line in describe_calibration(calibration, args.directory):
        say(line, sys.stderr)
    if not sys.stdout.isatty():  # as the jobs: a program gets JSON
        say(json.dumps(calibration.model_dump(mode="json", exclude={"reliability"})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
