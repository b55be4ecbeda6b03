"""Chooses the images among the members of an archive: the fields of WebDataset samples, which share a key."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from vlsm.images.formats import Inside, kind_of

Members = dict[str, list[Inside]]


def choose_fields(members: Members, fields: Sequence[str], is_tar: bool, skipped: Counter[str]) -> Members:
    """Return the members of which the images are segmented.

    If `fields` are chosen, these are the members with these fields. Else they are all images, except the labels in a
    WebDataset. A tar is a WebDataset if, for some key, an image and another file differ in their last extension: 7.jpg
    beside 7.cls or 7.seg.png, 7.image.png beside 7.json. In a plain tar, scan.v2.png and scan.png are two images. A
    label is an image with a word in its field, such as 7.seg.png, beside an image without one, such as 7.jpg.

    Images that share a key carry their fields, so that a warning can name them.

    Args:
        members: all regular members by path, those without images included.
        fields: the setting `fields`.
        is_tar: whether the archive can be a WebDataset.
        skipped: counter of skipped files, by description; this function adds to it.
    """
    wanted = {field.lower().lstrip(".") for field in fields}
    if not wanted and not is_tar:
        return members
    has_labels = not wanted and _is_web_dataset(members)
    plain = {key for key, field in (_sample_of(name) for name, images in members.items() if images) if "." not in field}
    kept: Members = {}
    for name, images in members.items():
        key, field = _sample_of(name)
        if images and wanted and field not in wanted:
            skipped[f".{field} is not in fields"] += 1
        elif images and has_labels and key in plain and "." in field and _is_word(field) and _is_picture(name):
            skipped[f".{field} of a sample"] += 1
        else:
            kept[name] = images
    return kept if wanted else _note_fields(kept, has_labels)


def _note_fields(members: Members, is_web_dataset: bool) -> Members:
    """Return the members with the fields of images that share a key.

    Numbers are no fields, as 25.111.png; in a plain tar, nothing with a digit is one.
    """
    samples = {name: _sample_of(name) for name, images in members.items() if images}
    samples = {
        name: (key, field)
        for name, (key, field) in samples.items()
        if (not field.partition(".")[0].isdecimal() if is_web_dataset else _is_word(field))
    }
    shared = Counter(key for key, _ in samples.values())
    return members | {
        name: [replace(image, sample_field=field) for image in members[name]]
        for name, (key, field) in samples.items()
        if shared[key] > 1
    }


def _is_web_dataset(members: Members) -> bool:
    """Return whether, for some key, an image and another member differ in their last extension."""
    endings: dict[str, dict[str, bool]] = {}  # of each key: the last extension, and whether such a member is an image
    for name, images in members.items():
        key, field = _sample_of(name)
        known = endings.setdefault(key, {})
        ending = field.rpartition(".")[2]
        known[ending] = known.get(ending, False) or bool(images)
        if len(known) > 1 and any(known.values()):
            return True
    return False


def _is_word(field: str) -> bool:
    """Return whether a field has no digits, as seg.png: in v2.png and 0001.png they are versions and numbers."""
    return not any(character.isdigit() for character in field)


def _is_picture(name: str) -> bool:
    return kind_of(name) in ("image", "tiff")


def _sample_of(name: str) -> tuple[str, str]:
    """Return a member's key and field as WebDataset defines them: the file name is split at its first dot."""
    folder, slash, base = name.rpartition("/")
    key, _, field = base.partition(".")
    return f"{folder}{slash}{key}", field.lower()
