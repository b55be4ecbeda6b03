"""Drawn images with a lesion and its mask: labelled archives where real data may not travel."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

_PROMPTS = ("lesion", "lesion in the image")


def draw_phantom(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image of mottled tissue with one lesion, and the lesion's mask.

    Sizes vary between 96 and 420 pixels a side; the lesion is an uneven blob of another colour and texture with a soft
    rim; bright reflections, which are no lesions, lie anywhere.

    Returns:
        image (H, W, 3) uint8 and mask (H, W) uint8 of 0 and 1.
    """
    height, width = (int(side) for side in rng.integers(96, 420, size=2))
    tissue = rng.uniform((150, 70, 60), (220, 140, 120))
    lesion = np.clip(tissue + rng.choice((-1, 1)) * rng.uniform(35, 70, 3) * (1, 0.8, 0.6), 10, 250)
    mask = _blob(rng, height, width)
    rim = _blur(mask * 255.0, rng.uniform(0.5, 2.5))[..., None] / 255
    mottle = _noise(rng, height, width, (4, 9, 23), 22) * (1 - rim) + _noise(rng, height, width, (11, 31), 34) * rim
    image = tissue * (1 - rim) + lesion * rim + mottle
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    image *= (1 - 0.35 * (x**2 + y**2) * rng.uniform(0, 1))[..., None]  # darker towards the corners, as endoscopes are
    for _ in range(rng.integers(0, 5)):
        spot = _ellipse(height, width, rng.uniform(0, 1, 2), rng.uniform(0.01, 0.03, 2), rng.uniform(0, np.pi)) < 1
        image[spot] = 245
    return np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8), mask


def write_labelled(folder: Path, splits: dict[str, int], seed: int) -> None:
    """Draw a dataset in the usual layout: `images/`, `masks/` (0 and 255) and `anns/SPLIT.json`.

    Args:
        folder: where to; the files of an earlier drawing are replaced.
        splits: how many images each split gets.
        seed: equal seeds draw equal datasets.
    """
    for name in ("images", "masks", "anns"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for split, count in splits.items():
        records = []
        for number in range(count):
            image, mask = draw_phantom(rng)
            name = f"{split}_{number:04d}"
            # both real kinds of file: lossy JPEG, and PNG
            image_name = f"{name}.jpg" if number % 2 else f"{name}.png"
            Image.fromarray(image).save(folder / "images" / image_name, quality=92)
            Image.fromarray(mask * 255).save(folder / "masks" / f"{name}.png")
            prompts = {"p0": "", **{f"p{index}": prompt for index, prompt in enumerate(_PROMPTS, start=1)}}
            records.append({"img_name": image_name, "mask_name": f"{name}.png", "prompts": prompts})
        (folder / "anns" / f"{split}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")


def _ellipse(height: int, width: int, center: np.ndarray, radii: np.ndarray, angle: float) -> np.ndarray:
    """(H, W): below 1 inside an ellipse given as fractions of the image."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    side = max(height, width)
    y, x = (y - center[0] * height) / side, (x - center[1] * width) / side
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return (u / radii[0]) ** 2 + (v / radii[1]) ** 2


def _blob(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A mask (H, W) of an ellipse whose rim wavers."""
    center, radii = rng.uniform(0.25, 0.75, 2), rng.uniform(0.09, 0.24, 2)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = np.arctan2(y - center[0] * height, x - center[1] * width)
    waver = sum(rng.uniform(0, 0.12) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5))
    return (np.sqrt(_ellipse(height, width, center, radii, rng.uniform(0, np.pi))) < 1 + waver).astype(np.uint8)


def _noise(rng: np.random.Generator, height: int, width: int, cells: tuple[int, ...], amplitude: float) -> np.ndarray:
    """(H, W, 1) of smooth noise at several scales; `cells` counts the grid cells a side."""
    layers = [
        np.asarray(
            Image.fromarray(rng.normal(0, 1, (n, n)).astype(np.float32)).resize(
                (width, height), Image.Resampling.BICUBIC
            )
        )
        for n in cells
    ]
    return (np.mean(layers, axis=0) * amplitude)[..., None]


def _blur(values: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(values.astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius)), np.float32)
