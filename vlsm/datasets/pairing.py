"""Pairs images with masks by the names of their files and folders. Only names are looked at; no file is read.

1. **Folders.** The deepest folder of a path whose name means images or masks decides: images/, img, Original, imagesTr,
   train_images; masks/, label, GT, Ground Truth, labelsTr. Names with further words count where there is no such name:
   ISIC_Training_Input. If there are not both, files with a word for masks in their names are the masks: x.png and
   x_mask.png.
2. **Splits.** A folder above or below decides: train, Training, val, validation, valid, dev, test, TestDataset; so do
   these words in the folder with the images, and nnU-Net's Tr and Ts. Without such a folder the split is "".
3. **Names.** An image and a mask are a pair if they are in the same folder, apart from images/ and masks/, and their
   names are equal without endings. If there is no such pair, words for masks and images do not count: x.jpg and
   x_mask.png, image_7.png and mask_7.png. Upper and lower case count in the rest of the name.
4. **Several masks** of one image are numbered: x_mask.png, x_mask_1.png. Or its folder holds one image, and only masks
   of other names, as a folder for each image does.
5. **Channels.** In imagesTr and imagesTs, x_0000.png is the first channel of the image x. Other channels are not read.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from vlsm.images.formats import FORMATS

_IMAGE = "images? imgs? inputs? originals? raw frames photos pictures scans sat".split()
_MASK = (
    *"masks? labels? gts? truths? groundtruths? annotations? annots? segs? segmentations? manual".split(),
    *"targets? labelcol".split(),
)
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_NNUNET = {"tr": "train", "va": "val", "val": "val", "ts": "test"}
_FILLERS = {"set", "sets", "data", "dataset", "split", "folder"}  # beside a split in the name of a folder
_SEPARATOR = r"[ _.\-]"
_IS_IMAGE, _IS_MASK = (re.compile("|".join(words)) for words in (_IMAGE, _MASK))
_IMAGE_WORD, _MASK_WORD = (
    re.compile(rf"(?:^|{_SEPARATOR}+)(?:{'|'.join(words)}|ground{_SEPARATOR}truth)(?={_SEPARATOR}|$)", re.IGNORECASE)
    for words in (_IMAGE, _MASK)
)
_NUMBERED = re.compile(
    rf"(.+?){_SEPARATOR}+(?:{'|'.join(_MASK)}|ground{_SEPARATOR}truth)"
    rf"\(?\d*\)?(?:{_SEPARATOR}+\(?\d+\)?)*(?<=[\d)])",
    re.IGNORECASE,
)
_ENDINGS = sorted((ending for known in FORMATS.values() for ending in known.endings), key=len, reverse=True)


@dataclass(frozen=True)
class Pair:
    """An image and its masks, which are paths as they were given. The split is one of SPLITS, or "" if unknown."""

    split: str
    image: str
    masks: tuple[str, ...]


@dataclass
class Pairing:
    """What the names of a folder's files say.

    Attributes:
        pairs: in the order of the images' paths.
        lone_images: images without a mask, except those of `unlabelled`.
        lone_masks: masks without an image.
        unclear: files that compete for one name: two images x.png and x.jpg, or two masks x.png and x_label.png.
        unlabelled: by split, the images of the splits that have no masks at all, while another split has masks.
        channels: files with further channels of an image, as nnU-Net names them.
        others: files that are in no folder for images or masks.
        is_nnunet: whether an image is in nnU-Net's imagesTr or imagesTs.
    """

    pairs: list[Pair] = field(default_factory=list)
    lone_images: list[str] = field(default_factory=list)
    lone_masks: list[str] = field(default_factory=list)
    unclear: list[tuple[str, ...]] = field(default_factory=list)
    unlabelled: dict[str, list[str]] = field(default_factory=dict)
    channels: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    is_nnunet: bool = False


@dataclass(frozen=True)
class _File:
    path: str
    stem: str
    split: str
    folders: tuple[str, ...]  # without images/ and masks/; splits by their usual names
    is_mask: bool | None = None
    is_nnunet: bool = False


def pair_by_stem(paths: Iterable[str]) -> Pairing:
    """Return the pairs of images and masks, by the rules of this module.

    Args:
        paths: files of one dataset, relative to its folder, with "/" between the parts.
    """
    files = [_place(path) for path in sorted(paths)]
    pairing = Pairing()
    if {file.is_mask for file in files} >= {True, False}:
        pairing.others = [file.path for file in files if file.is_mask is None]
    else:
        files = [_place_by_name(file.path) for file in files]
    groups = defaultdict[tuple[str, ...], list[_File]](list)
    for file in files:
        if file.is_mask is not None:
            groups[file.folders].append(file)
    lone = list[_File]()
    for group in groups.values():
        lone += _pair_group(group, pairing)
    labelled = {pair.split for pair in pairing.pairs} | {file.split for file in lone if file.is_mask}
    for file in lone:
        if file.is_mask:
            pairing.lone_masks.append(file.path)
        elif file.split in labelled or not pairing.pairs:
            pairing.lone_images.append(file.path)
        else:
            pairing.unlabelled.setdefault(file.split, []).append(file.path)
    pairing.pairs.sort(key=lambda pair: pair.image)
    return pairing


def split_of_image(path: str) -> str:
    """Return the split of an image by the folders of its path, relative to the dataset; "" if they state none."""
    return _place(path).split


def split_of(name: str) -> str | None:
    """Return the split that a text means, such as "Validation", or None if it means none."""
    return _SPLITS.get(name.strip().lower())


@functools.lru_cache(maxsize=4096)
def _words(folder: str) -> list[str]:
    """Return the words in a folder's name, which capitals can divide too, and the whole name as one word."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", folder)
    return [word.lower() for word in words] + [re.sub(r"[^a-z0-9]", "", folder.lower())]


def _place(path: str) -> _File:
    """Return a file with the meaning of its folders."""
    *folders, name = path.split("/")
    ranks = [(_rank_folder(folder), position) for position, folder in enumerate(folders)]
    rank, position = max(ranks, default=(0, 0))
    if not rank:
        return _place_others(path, folders, None)
    words = _words(folders[position])
    nnunet = _NNUNET.get(words[1]) if len(words) == 3 and words[0] in ("images", "labels") else None
    named = {_SPLITS[word] for word in words if word in _SPLITS}
    split = nnunet or (named.pop() if len(named) == 1 else None)
    file = _place_others(path, folders[:position] + folders[position + 1 :], split)
    return replace(file, is_mask=any(map(_IS_MASK.fullmatch, words)), is_nnunet=nnunet is not None)


@functools.lru_cache(maxsize=4096)
def _rank_folder(folder: str) -> int:
    """Return 2 if a folder's name means images or masks, 1 if it has further words, else 0."""
    *words, whole = _words(folder)
    matches = [_IS_IMAGE.fullmatch(word) or _IS_MASK.fullmatch(word) for word in (*words, whole)]
    known = [bool(match) or word in _SPLITS or word in _NNUNET for match, word in zip(matches, words, strict=False)]
    return (2 if matches[-1] or all(known) else 1) if any(matches) else 0


def _place_by_name(path: str) -> _File:
    """Return a file of which only the name says if it is a mask."""
    *folders, _ = path.split("/")
    file = _place_others(path, folders, None)
    return replace(file, is_mask=bool(_MASK_WORD.search(file.stem) or _NUMBERED.fullmatch(file.stem)))


def _place_others(path: str, folders: list[str], split: str | None) -> _File:
    """Return a file with the split of its folders, other than images/ and masks/, if these state none."""
    kept = []
    for folder in folders:
        named = _split_folder(folder)
        split = named or split
        kept.append(folder if named is None or re.search(r"\d", folder) else named)  # train_1/ and train_2/ stay apart
    if split and split not in kept:
        kept.append(split)  # train_images/x.png and test_masks/x.png are no pair
    return _File(path, _stem(path.rsplit("/", 1)[-1]), split or "", tuple(sorted(kept, key=lambda one: one != split)))


def _split_folder(folder: str) -> str | None:
    *words, _ = _words(folder)
    named = {_SPLITS[word] for word in words if word in _SPLITS}
    has_others = any(word not in _SPLITS and word not in _FILLERS and not word.isdecimal() for word in words)
    return None if has_others or len(named) != 1 else named.pop()


def _stem(name: str) -> str:
    return next((name[: -len(ending)] for ending in _ENDINGS if name.lower().endswith(ending)), name)


def _pair_group(group: list[_File], pairing: Pairing) -> list[_File]:
    """Add the pairs of one folder, and return the files that have no partner."""
    images, masks = [file for file in group if not file.is_mask], [file for file in group if file.is_mask]
    pairing.is_nnunet = pairing.is_nnunet or any(file.is_nnunet for file in images)
    by_name = _images_by_name(images, masks, pairing)
    found = defaultdict[str, list[tuple[bool, _File]]](list)
    lone_masks = []
    for mask in masks:
        fitting = ((by_name[name], is_last) for name, is_last in _names_of_mask(mask.stem) if name in by_name)
        image, is_numbered = next(fitting, (None, False))
        if image is None:
            lone_masks.append(mask)
        else:
            found[image.path].append((is_numbered, mask))
    left = list({file.path: file for file in by_name.values()}.values())
    is_one_image = len(left) == 1 and not found and lone_masks
    if is_one_image and any(folder != left[0].split for folder in left[0].folders):
        found[left[0].path], lone_masks = [(True, mask) for mask in lone_masks], []
    for image in left:
        if image.path in found:
            _add_pair(image, found[image.path], pairing)
    return [file for file in left if file.path not in found] + lone_masks


def _images_by_name(images: list[_File], masks: list[_File], pairing: Pairing) -> dict[str, _File]:
    """Return the images by their names, and by their names without a word for images. Exact names come first."""
    exact = defaultdict[str, list[_File]](list)
    for image in images:
        exact[image.stem].append(image)
    pairing.unclear += [tuple(file.path for file in same) for same in exact.values() if len(same) > 1]
    single = {stem: same[0] for stem, same in exact.items() if len(same) == 1}
    stems_of_masks = {mask.stem for mask in masks}
    by_name = dict(single)
    for stem, image in single.items():
        short = _shorten_image(image)
        if short == stem or stem in stems_of_masks:
            continue
        if image.is_nnunet and by_name.get(short, image) is not image:
            pairing.channels.append(image.path)
            del by_name[stem]
        else:
            by_name.setdefault(short, image)
    return by_name


def _shorten_image(image: _File) -> str:
    return re.sub(r"_\d{4}$", "", image.stem) if image.is_nnunet else _without(_IMAGE_WORD, image.stem)


def _names_of_mask(stem: str) -> Iterator[tuple[str, bool]]:
    """Yield the names that the image of a mask may have, the likeliest first, and whether the mask is then numbered."""
    yield stem, False
    yield _without(_MASK_WORD, stem), False
    if numbered := _NUMBERED.fullmatch(stem):
        yield numbered[1], True


def _without(word: re.Pattern[str], stem: str) -> str:
    """Return a name without the last of these words in it."""
    found = list(word.finditer(stem))
    return re.sub(rf"^{_SEPARATOR}+", "", stem[: found[-1].start()] + stem[found[-1].end() :]) if found else stem


def _add_pair(image: _File, masks: list[tuple[bool, _File]], pairing: Pairing) -> None:
    """Add the pair of an image, unless two of its masks are not numbered, or its masks are in several folders."""
    folders = {mask.path.rpartition("/")[0] for _, mask in masks}
    if len(folders) > 1 or sum(not is_numbered for is_numbered, _ in masks) > 1:
        pairing.unclear.append(tuple(mask.path for _, mask in masks))
    else:
        ordered = sorted(masks, key=lambda one: (one[0], _natural(one[1].path)))
        pairing.pairs.append(Pair(image.split, image.path, tuple(mask.path for _, mask in ordered)))


def _natural(path: str) -> list[tuple[int, str]]:
    """Return a key that sorts x_10 after x_9."""
    return [(int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", path)]
