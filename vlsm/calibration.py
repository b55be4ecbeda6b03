"""Probabilities that mean what they say: a temperature and a threshold, fitted on validation images.

`python -m vlsm.calibration CHECKPOINT CALIBRATED --dataset NAME=URI`
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from tqdm import tqdm

from vlsm import storage
from vlsm.checkpoints import SETTINGS_NAME, Calibration, build_checkpoint, read_checkpoint
from vlsm.config import dump_yaml
from vlsm.errors import CheckpointError, ConfigError, ManifestError, VlsmError
from vlsm.images.decode import decode_image, decode_mask_file
from vlsm.images.fetch import read_image_bytes
from vlsm.segmentation.metrics import BAD_DICE
from vlsm.segmentation.segmenter import Segmenter
from vlsm.training.datasets import Record, read_dataset
from vlsm.training.sampling import choose_prompt
from vlsm.training.settings import DataSettings

_EDGES = np.linspace(-20, 20, 1601)  # of logits: 0.025 wide
_MIDDLES = (_EDGES[1:] + _EDGES[:-1]) / 2
_BINS = 15  # of a reliability diagram
_USUAL_AREAS = (1, 99)  # percentiles of the validation masks

Labelled = tuple[np.ndarray, np.ndarray]  # logits (H, W) float and mask (H, W) of 0 and 1


def calibrate(examples: Iterable[Labelled]) -> Calibration:
    """Fit temperature and threshold.

    The temperature makes the mean log-likelihood of the pixels largest (Guo et al. 2017, equation 9), each image
    counting the same; the threshold makes the mean Dice of the images largest.

    Args:
        examples: logits at the images' own size, with the masks that are right.

    Raises:
        ConfigError: there are none.
    """
    counts = np.array([_count(*example) for example in examples])  # (N, 2, bins): of background and of foreground
    if not len(counts):
        raise ConfigError("there are no labelled images to calibrate with")
    shares = (counts / counts.sum(axis=(1, 2), keepdims=True)).mean(axis=0)
    found = minimize_scalar(lambda log: _loss(shares, np.exp(log)), bounds=np.log([0.05, 20]), method="bounded")
    temperature = float(np.exp(found.x))
    dice = _dice_by_threshold(counts)
    # of equally good ones that nearest to a half, and none where float16 logits could not tell
    usable = np.abs(_EDGES[1:-1] / temperature) < np.log(99)
    best = np.flatnonzero(usable)[np.argmax(np.round(dice.mean(axis=0)[usable], 4))]
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
    )


def reliability(shares: np.ndarray, temperature: float) -> list[tuple[float, float, float]]:
    """A reliability diagram: of pixels whose probability lies in each of 15 equal bins, if any.

    Args:
        shares: (2, bins) of all pixels, by label and logit.
        temperature: by which logits are divided.

    Returns:
        Mean probability, share of foreground, and share of all pixels, bin by bin.
    """
    probability, total = _sigmoid(_MIDDLES / temperature), shares.sum(axis=0)
    bins = np.minimum((probability * _BINS).astype(int), _BINS - 1)
    rows = []
    for number in range(_BINS):
        chosen = bins == number
        if weight := total[chosen].sum():
            mean = (probability[chosen] * total[chosen]).sum() / weight
            rows.append(tuple(round(float(value), 6) for value in (mean, shares[1, chosen].sum() / weight, weight)))
    return rows  # type: ignore[return-value]


def expected_error(rows: list[tuple[float, float, float]]) -> float:
    """The expected calibration error of a reliability diagram (Naeini et al. 2015)."""
    return round(sum(weight * abs(mean - share) for mean, share, weight in rows), 6)


def _count(logits: np.ndarray, mask: np.ndarray) -> np.ndarray:
    clipped = np.clip(logits, _EDGES[0], _EDGES[-1])
    return np.stack([np.histogram(clipped[mask == label], _EDGES)[0] for label in (0, 1)])


def _loss(shares: np.ndarray, temperature: float) -> float:
    scaled = _MIDDLES / temperature
    return float((shares[0] * np.logaddexp(0, scaled) + shares[1] * np.logaddexp(0, -scaled)).sum())


def _dice_by_threshold(counts: np.ndarray) -> np.ndarray:
    """(N, bins - 1): of each image, where logits at or above each inner edge are foreground."""
    above = counts[:, :, ::-1].cumsum(axis=2)[:, :, -2::-1]
    hits, marked, targets = above[:, 1], above.sum(axis=1), counts[:, 1].sum(axis=1)[:, None]
    total = marked + targets
    return np.where(total > 0, 2 * hits / np.maximum(total, 1), 1.0)


def _min_confidence(counts: np.ndarray, edge: int, temperature: float, dice: np.ndarray) -> float | None:
    """The confidence below which masks are mostly bad: where looking at them finds bad ones best, by F1."""
    inside = counts[:, :, edge + 1 :].sum(axis=1)
    areas = inside.sum(axis=1)
    sums = (inside * _sigmoid(_MIDDLES[edge + 1 :] / temperature)).sum(axis=1)
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


def _predict(segmenter: Segmenter, records: list[Record], data: DataSettings, is_own: bool) -> Iterator[Labelled]:
    """Logits at the images' own sizes, and masks; images that cannot be read are told and left out."""
    square = segmenter.model.image_spec.square
    for record in tqdm(records, unit="image", disable=not sys.stderr.isatty()):
        try:
            limits = data.max_image_bytes, data.max_pixels
            image = decode_image(read_image_bytes(record.image_uri, None, limits[0]), record.image_uri, limits[1])
            content = read_image_bytes(record.mask_uri, None, limits[0])
            mask = decode_mask_file(content, record.mask_uri, data.mask_threshold, limits[1])
            prompt = segmenter.settings.prompt if is_own else choose_prompt(record, data, None)
            if image.shape[:2] != mask.shape:
                raise ManifestError(f"{record.mask_uri} has another size than its image")
        except VlsmError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        logits = segmenter.predict_logits(square.resize_image(image)[None], [[prompt]])[0][0]
        yield square.enlarge_logits(logits, (mask.shape[0], mask.shape[1])), mask


def calibrate_checkpoint(
    source: str, directory: str, datasets: dict[str, str], data: DataSettings | None
) -> Calibration:
    """Write a checkpoint with a temperature and a threshold beside its weights, which stay as they are.

    Args:
        source: the checkpoint, local or on an object store.
        directory: a local folder for the calibrated one.
        datasets: locations of labelled datasets by name; their validation splits are used.
        data: which prompt is used, and how masks are read; the checkpoint's own prompt where None.

    Raises:
        VlsmError: there is no checkpoint or dataset, or nothing to calibrate with.
    """
    if "://" in directory or Path(directory).exists():
        raise ConfigError(f"{directory} must be a local folder that does not exist yet")
    records = [record for name, uri in datasets.items() for record in read_dataset(name, uri) if record.split == "val"]
    files = read_checkpoint(source)
    checkpoint = build_checkpoint(files, source)
    plain = checkpoint.settings.model_copy(update={"calibration": None})
    segmenter = Segmenter(type(checkpoint)(checkpoint.model, plain, checkpoint.name))
    found = calibrate(_predict(segmenter, records, data or DataSettings(), data is None))
    settings = plain.model_copy(update={"threshold": found.threshold, "calibration": found})
    folder = Path(directory)
    for name, content in files.items():
        if name != SETTINGS_NAME:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    (folder / SETTINGS_NAME).write_text(dump_yaml(settings.model_dump(mode="json")), encoding="utf-8")
    return found


def main(argv: list[str] | None = None) -> int:
    """Fit temperature and threshold of a checkpoint on validation images, and write it anew with them."""
    parser = argparse.ArgumentParser(prog="python -m vlsm.calibration", description=main.__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint directory; local or s3://")
    parser.add_argument("directory", metavar="CALIBRATED", help="a local folder for the calibrated checkpoint")
    parser.add_argument(
        "--dataset", action="append", required=True, metavar="NAME=URI", help="labelled images, as for jobs.train"
    )
    parser.add_argument("--prompt", help="p1, text:WORDS, ... (default: the checkpoint's own)")
    args = parser.parse_args(argv)
    try:
        pairs = [item.partition("=") for item in args.dataset]
        if wrong := [item for item, (_, equals, uri) in zip(args.dataset, pairs, strict=True) if not (equals and uri)]:
            raise ConfigError(f"--dataset {wrong[0]!r} is not of the form NAME=URI")
        datasets = {name: storage.absolute(uri) for name, _, uri in pairs}
        data = DataSettings(prompt=args.prompt) if args.prompt else None
        found = calibrate_checkpoint(args.checkpoint, args.directory, datasets, data)
    except (VlsmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (ConfigError, CheckpointError)) else 1
    print(json.dumps(found.model_dump(mode="json", exclude={"reliability"})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
