"""Folders of images and masks without annotation files; `vlsm.datasets.pairing` has the rules that pair them."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from vlsm import storage
from vlsm.archive.listing import list_files
from vlsm.datasets.classes import Labels, labels_of, split_by_class
from vlsm.datasets.pairing import Pair, Pairing, pair_by_stem, split_of_image
from vlsm.datasets.records import NO_MASK, Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.documents import read_json
from vlsm.errors import ManifestError
from vlsm.images.formats import FORMATS, describe_other, kind_of
from vlsm.words import count

logger = logging.getLogger("vlsm")

LAYOUTS = (
    "anns/{train,val,test}.json with images/ and masks/; images/ and masks/ with equal names, also in train/, val/ and "
    "test/; x.png beside x_mask.png; COCO files; nnU-Net's imagesTr/ and labelsTr/; a list (.csv, .tsv, .jsonl, "
    ".parquet) with image_uri and mask_uri"
)
_NOT_READ = ("video",)
_SHOWN = 5  # files that one message names
_NNUNET_FILE = "dataset.json"


def list_dataset(uri: str) -> list[str]:
    """Return the paths of all files below a folder or prefix, relative to it, without hidden files.

    On a local disk a link to a folder is followed, but no link in there: links can form a circle.
    """
    root = storage.open_uri(uri)[1].rstrip("/") + "/"
    found: dict[str, list[str]] = {"file": [], "link": []}
    for info in list_files(uri):
        found.setdefault(info["type"], []).append(info["name"])
    for link in found["link"]:
        found["file"] += [info["name"] for info in list_files(link) if info["type"] == "file"]
    names = (path.removeprefix(root) for path in found["file"])
    return [storage.spell_out(name) for name in names if not _is_hidden(name)]


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def pair_folder(paths: Sequence[str]) -> Pairing:
    """Return the images and masks among the files of a folder."""
    return pair_by_stem(path for path in paths if (kind := kind_of(path)) in FORMATS and kind not in _NOT_READ)


def read_folder(
    name: str, uri: str, paths: Sequence[str], pairing: Pairing, settings: DatasetSettings
) -> Iterator[Record | ManifestError]:
    """Yield a record for each pair, or for each of its classes, and an error for files that make no pair.

    Images without a mask, and masks without an image, are errors if data.skip_unpaired is false. All images of a split
    that has no masks at all are left out, as published test images often are. The log tells what is left out. With
    data.unmasked_images=negative, the images without a mask in splits with masks are negative records. Then a mask
    without an image is always an error: it may be the mask that such an image lacks.

    Args:
        name: name of the dataset.
        uri: the folder.
        paths: as `list_dataset` returns them.
        pairing: as `pair_folder` returns it.
        settings: how to read the dataset.

    Raises:
        ManifestError: nnU-Net's dataset.json cannot be read.
    """
    has_labels = pairing.is_nnunet and _NNUNET_FILE in paths and not labels_of(settings.classes, name)
    labels = _read_nnunet_labels(name, storage.join(uri, _NNUNET_FILE)) if has_labels else {}
    pairs = [*pairing.pairs, *(_negatives(name, pairing) if settings.unmasked_images == "negative" else ())]
    for pair in sorted(pairs, key=lambda pair: pair.image):
        record = _to_record(name, uri, pair)
        yield from split_by_class(record, labels) if labels else [record]
    if settings.unmasked_images == "negative":
        pairing = replace(pairing, lone_images=[])
    yield from _problems(pairing, settings)
    _tell_others(name, paths, pairing)


def _to_record(name: str, uri: str, pair: Pair) -> Record:
    image, *masks = (storage.join(uri, path) for path in (pair.image, *pair.masks))
    mask_uri = masks[0] if masks else NO_MASK
    return Record(name, pair.split, f"{uri}, {pair.image}", image, mask_uri, {}, more_masks=tuple(masks[1:]))


def _negatives(name: str, pairing: Pairing) -> list[Pair]:
    """Return the images without a mask as pairs without masks, and log their number."""
    if images := pairing.lone_images:
        logger.info("dataset %s: %d of %d images have no mask: they do not show the finding (data.unmasked_images)",
                    name, len(images), len(images) + len(pairing.pairs))  # fmt: skip
    return [Pair(split_of_image(path), path, ()) for path in images]


def _problems(pairing: Pairing, settings: DatasetSettings) -> Iterator[ManifestError]:
    """Yield an error for each kind of problem, or log what is left out."""
    for files in pairing.unclear:
        yield ManifestError(f"{' and '.join(files)} compete for one name; keep one of them, or number several masks")
    total = len(pairing.pairs) + len(pairing.lone_images)
    for lone, sentence in (
        (pairing.lone_images, f"no mask for {len(pairing.lone_images):,} of {count(total, 'image')}"),
        (pairing.lone_masks, f"no image for {count(len(pairing.lone_masks), 'mask')}"),
    ):
        if lone and settings.skip_unpaired and settings.unmasked_images is None:
            logger.warning("%s: left out (data.skip_unpaired): %s", sentence, _examples(lone))
        elif lone:
            advice = (
                "correct their names" if settings.unmasked_images else "--set data.skip_unpaired=true leaves them out"
            )
            if lone is pairing.lone_images:
                advice += ", --set data.unmasked_images=negative takes them as images without the finding"
            yield ManifestError(f"{sentence} ({_examples(lone)}); {advice}")


def _tell_others(name: str, paths: Sequence[str], pairing: Pairing) -> None:
    for split, images in pairing.unlabelled.items():
        where = f"split {split}" if split else "no split"
        logger.warning("dataset %s: %s of %s without masks: left out", name, count(len(images), "image"), where)
    if pairing.channels:
        examples = _examples(pairing.channels)
        logger.warning("dataset %s: only the first channel of each image is read, not %s", name, examples)
    if pairing.others:
        examples = _examples(pairing.others)
        logger.info("dataset %s: files in no folder for images or masks are not read: %s", name, examples)
    kinds = Counter(
        describe_other(path) for path in paths if kind_of(path) not in FORMATS or kind_of(path) in _NOT_READ
    )
    if kinds:
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(_SHOWN))
        logger.info("dataset %s: files that are no images are not read: %s", name, counts)


def _examples(paths: Sequence[str]) -> str:
    return ", ".join(paths[:_SHOWN]) + (f" and {len(paths) - _SHOWN:,} more" if len(paths) > _SHOWN else "")


def describe_unknown(name: str, uri: str, paths: Sequence[str], pairing: Pairing) -> str:
    """Return the message for a folder without any pair: what is there, and which layouts are known."""
    if pairing.lone_images and pairing.lone_masks:
        found = f"no image and mask have equal names: {_examples(pairing.lone_images)}; {_examples(pairing.lone_masks)}"
    elif pairing.unclear:
        found = f"{' and '.join(pairing.unclear[0])} compete for one name"
    else:
        counts = Counter((path.rpartition("/")[0], describe_other(path)) for path in paths)
        places = (f"{count:,} {kind} in {folder or 'it'}" for (folder, kind), count in counts.most_common(_SHOWN))
        found = f"it has {', '.join(places) or 'no files'}"
    return f"dataset {name}: {uri!r} has none of the known layouts: {found}. Known are: {LAYOUTS}"


def _read_nnunet_labels(name: str, uri: str) -> Labels:
    """Return the labels of each prompt by nnU-Net's dataset.json; "_" in a name becomes a blank.

    Source: nnU-Net, documentation/dataset_format.md: {"polyp": 1} in version 2, also [1, 2] for a region of several
    labels; {"1": "polyp"} in version 1. Neither 0, the background, nor "ignore" is a class.
    """
    try:
        labels = read_json(uri, uri, ManifestError, "; --set data.classes states the classes").get("labels", {})
        pairs = [_nnunet_label(key, value) for key, value in labels.items()]
    except (ValueError, AttributeError, TypeError, OverflowError) as error:
        raise ManifestError(
            f"{uri} is no dataset.json of nnU-Net ({error}); --set data.classes states the classes"
        ) from error
    classes: dict[str, tuple[int, ...]] = {}
    for text, values in pairs:
        if text != "ignore" and values != (0,):  # two labels of one name are one class
            classes[text.replace("_", " ")] = classes.get(text.replace("_", " "), ()) + values
    logger.info("dataset %s: classes of %s: %s", name, uri, classes)
    return classes


def _nnunet_label(key: str, value: Any) -> tuple[str, tuple[int, ...]]:
    if isinstance(value, str):
        return value, (int(key),)
    return key, tuple(map(int, value)) if isinstance(value, list) else (int(value),)
