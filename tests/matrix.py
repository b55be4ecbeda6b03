"""Masks of one environment against those of another: other versions of Python and of libraries, another processor.

`python -m tests.matrix write FOLDER` writes tiny checkpoints of all models, images in all kinds of formats, and what
this environment makes of them. `python -m tests.matrix compare FOLDER` makes it again, in another one, and exits
with 1 if it differs.

- **Pixels** of decoded images are equal.
- **Squares** that a model sees may differ by a level of 255: on Linux with ARM, Pillow resizes. `write FOLDER portable`
  resizes with Pillow too; then squares must be equal.
- **Masks** are equal but for pixels whose probability is within TOLERANCE of the threshold: torch adds numbers in
  another order from version to version. A level in the square moves probabilities of the tiny models by more.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

import vlsm
from tests.tiny import save_tiny_sources, tiny_options
from vlsm.errors import VlsmError
from vlsm.images import preprocess

TOLERANCE = 1e-3  # of a probability
LEVELS, RESIZED_TOLERANCE = 1, 1e-2  # of 255, in a square that another library has resized; then of a probability
PROMPTS = ["a polyp", "a large round polyp"]
V0 = Path(__file__).parent / "written" / "v0"


def write(folder):
    """Write the checkpoints, the images, and what this environment makes of them."""
    folder.mkdir(parents=True)
    options = tiny_options(save_tiny_sources(folder / "sources"))
    (folder / "checkpoints").mkdir()
    for name, chosen in options.items():
        torch.manual_seed(5)
        model = vlsm.build_model(name.partition("+")[0], **chosen).eval()
        vlsm.save_checkpoint(model, folder / "checkpoints" / name, prompt=PROMPTS[0])
    _write_images(folder / "images")
    np.savez_compressed(folder / "expected.npz", **make(folder))


def _write_images(folder):
    """Photographs of the earlier version, and drawn images in formats with decoders of their own."""
    import nibabel
    import pydicom
    import tifffile
    from PIL import Image
    from pydicom.data import get_testdata_file

    folder.mkdir()
    for path in sorted((V0 / "archive").iterdir()):
        if path.name != "broken.png":
            (folder / path.name).write_bytes(path.read_bytes())
    random = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((120, 90)))
    for ending, more in {"webp": {"lossless": True}, "bmp": {}, "jp2": {}, "gif": {}, "jpg": {"quality": 80}}.items():
        Image.fromarray(smooth).save(folder / f"drawn.{ending}", **more)
    deep = smooth[..., 0].astype(np.uint16) * 200
    tifffile.imwrite(folder / "deep.tif", deep, compression="zlib")
    tifffile.imwrite(folder / "float.tif", smooth[..., 0] / np.float32(255), compression="lzw")
    Image.fromarray(deep).save(folder / "deep.png")
    scan = pydicom.dcmread(get_testdata_file("MR_small.dcm"))
    scan.save_as(folder / "scan.dcm")
    nibabel.save(nibabel.Nifti1Image(deep.astype(np.int16)[..., None], np.eye(4)), folder / "slice.nii.gz")


def make(folder):
    """Return the pixels of all images, and the probabilities of every model for each image and prompt, by name."""
    torch.set_num_threads(1)
    paths = sorted((folder / "images").iterdir())
    places = [f"{path}#slice=0" if path.suffixes[-2:] == [".nii", ".gz"] else str(path) for path in paths]
    found = {}
    for checkpoint in sorted((folder / "checkpoints").iterdir()):
        segmenter = vlsm.Segmenter(vlsm.load_checkpoint(checkpoint), device="cpu")
        square = segmenter.model.image_spec.square
        results = segmenter.segment(places, PROMPTS, probabilities=True, allow_equal_masks=True)
        found[f"square {checkpoint.name}"] = np.stack([square.resize_image(result.image) for result in results])
        for path, result in zip(paths, results, strict=True):
            found[f"pixels {path.name}"] = result.image
            found[f"mask {checkpoint.name} {path.name}"] = np.asarray(result)
            found[f"probability {checkpoint.name} {path.name}"] = np.float32(result.probability)
    return found


def compare(expected, found):
    """Return what differs between two environments, one line for each, and the largest differences by kind."""
    lines = [f"{name} is in one environment only" for name in sorted(expected.keys() ^ found.keys())]
    largest = {"pixels": 0.0, "square": 0.0, "probability": 0.0, "mask pixels": 0}
    is_equal = all(np.array_equal(found.get(name), square) for name, square in expected.items() if "square" in name)
    tolerance = TOLERANCE if is_equal else RESIZED_TOLERANCE
    for name in sorted(expected.keys() & found.keys()):
        kind, before, now = name.partition(" ")[0], expected[name], found[name]
        if before.shape != now.shape:
            lines.append(f"{name}: {before.shape} there, {now.shape} here")
            continue
        differs = before != now
        if kind == "mask":
            probability = found[f"probability{name.removeprefix('mask')}"]
            largest["mask pixels"] += int(differs.sum())
            allowed = np.abs(probability - 0.5) < tolerance
            if (differs & ~allowed).any():
                lines.append(f"{name}: {int((differs & ~allowed).sum()):,} pixels are on the other side")
            continue
        most = float(np.abs(before.astype(np.float64) - now.astype(np.float64)).max(initial=0))
        largest[kind] = max(largest[kind], most)
        if most > {"pixels": 0, "square": LEVELS, "probability": tolerance}[kind]:
            lines.append(f"{name}: the largest difference is {most:.4g}")
    return lines, largest


def main(words):
    """Write or compare. Returns the exit code."""
    command, folder = words[0], Path(words[1])
    if command == "write":
        if "portable" in words:
            preprocess.resizer = None
        write(folder)
        return 0
    with np.load(folder / "expected.npz") as file:
        expected = dict(file)
    try:
        lines, largest = compare(expected, make(folder))
    except VlsmError as error:  # such as the probe of a checkpoint
        lines, largest = [str(error)], {}
    print(json.dumps({"python": sys.version.split()[0], "torch": torch.__version__, **largest}), *lines, sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
