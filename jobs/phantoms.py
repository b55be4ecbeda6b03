"""Drawn images with two kinds of objects and their masks: labelled archives that contain no patient data."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

KINDS = ("lesion", "stone")


def draw_phantom(
    rng: np.random.Generator, sides_px: tuple[int, int] = (96, 420)
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return an image of textured tissue with one lesion and one stone, and the mask of each.

    Only the prompt decides which of the two a model should segment. The lesion is an irregular blob with another colour
    and texture and a soft edge. The stone is a pale polygon. Bright reflections at random positions belong to neither.

    Args:
        rng: random numbers of the drawing.
        sides_px: range of the height and width; the second value is excluded.

    Returns:
        image (H, W, 3) uint8, and a dict from kind to mask (H, W) uint8, 0 or 1.
    """
    height, width = (int(side) for side in rng.integers(*sides_px, size=2))
    tissue = rng.uniform((150, 70, 60), (220, 140, 120))
    lesion = np.clip(tissue + rng.choice((-1, 1)) * rng.uniform(35, 70, 3) * (1, 0.8, 0.6), 10, 250)
    centers = _draw_centers(rng)
    mask = _blob(rng, height, width, centers[0])
    rim = _blur(mask * 255.0, rng.uniform(0.5, 2.5))[..., None] / 255
    mottle = _noise(rng, height, width, (4, 9, 23), 22) * (1 - rim) + _noise(rng, height, width, (11, 31), 34) * rim
    image = tissue * (1 - rim) + lesion * rim + mottle
    stone = _lump(rng, height, width, centers[1])
    grey = rng.uniform(185, 225) * np.array([1, 1, 0.85]) + _noise(rng, height, width, (7, 15), 10)
    image = np.where(stone[..., None] > 0, grey, image)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    image *= (1 - 0.35 * (x**2 + y**2) * rng.uniform(0, 1))[..., None]  # darker corners, as in endoscopy
    for _ in range(rng.integers(0, 5)):
        spot = _ellipse(height, width, rng.uniform(0, 1, 2), rng.uniform(0.01, 0.03, 2), rng.uniform(0, np.pi)) < 1
        image[spot] = 245
    image = np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)
    return image, {"lesion": mask * (1 - stone), "stone": stone}


def write_labelled(folder: Path, splits: dict[str, int], seed: int, sides_px: tuple[int, int] = (96, 420)) -> None:
    """Draw a dataset in the usual layout: `images/`, `masks/KIND/` (0 and 255) and `anns/SPLIT.json`.

    Args:
        folder: target folder; files of an earlier drawing are replaced.
        splits: number of images per split; each image gives two records, one per kind.
        seed: equal seeds give equal datasets.
        sides_px: see `draw_phantom`.
    """
    for name in ("images", "anns", *(f"masks/{kind}" for kind in KINDS)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for split, count in splits.items():
        records = []
        for number in range(count):
            image, masks = draw_phantom(rng, sides_px)
            name = f"{split}_{number:04d}"
            # both formats of real archives: lossy JPEG, and PNG
            image_name = f"{name}.jpg" if number % 2 else f"{name}.png"
            Image.fromarray(image).save(folder / "images" / image_name, quality=92)
            for kind, mask in masks.items():
                Image.fromarray(mask * 255).save(folder / "masks" / kind / f"{name}.png")
                prompts = {"p0": "", "p1": kind, "p2": [f"{kind} in the image", f"one {kind}"]}
                records.append({"img_name": image_name, "mask_name": f"{kind}/{name}.png", "prompts": prompts})
        (folder / "anns" / f"{split}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")


def _draw_centers(rng: np.random.Generator) -> np.ndarray:
    """Return two centres (y, x) as fractions of the image that are more than 0.35 apart on one axis."""
    while True:
        centers = rng.uniform(0.2, 0.8, (2, 2))
        if np.abs(centers[0] - centers[1]).max() > 0.35:
            return centers


def _ellipse(height: int, width: int, center: np.ndarray, radii: np.ndarray, angle: float) -> np.ndarray:
    """Return an array (H, W) that is below 1 inside an ellipse; its centre and radii are fractions of the image."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    side = max(height, width)
    y, x = (y - center[0] * height) / side, (x - center[1] * width) / side
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return (u / radii[0]) ** 2 + (v / radii[1]) ** 2


def _lump(rng: np.random.Generator, height: int, width: int, center: np.ndarray) -> np.ndarray:
    """Return the mask (H, W) of a polygon."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, 3)) / 3 + np.arange(0, 6, 2)[:, None] * np.pi / 3
    radii = rng.uniform(0.07, 0.15, angles.size) * max(height, width)
    corners = np.stack([np.cos(angles.ravel()), np.sin(angles.ravel())], axis=1) * radii[:, None]
    canvas = Image.new("L", (width, height))
    points = [(x + center[1] * width, y + center[0] * height) for y, x in corners]
    ImageDraw.Draw(canvas).polygon(points, fill=1)
    return np.asarray(canvas)


def _blob(rng: np.random.Generator, height: int, width: int, center: np.ndarray) -> np.ndarray:
    """Return the mask (H, W) of an ellipse with a wavy edge."""
    radii = rng.uniform(0.09, 0.2, 2)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = np.arctan2(y - center[0] * height, x - center[1] * width)
    wave = sum(rng.uniform(0, 0.12) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5))
    return (np.sqrt(_ellipse(height, width, center, radii, rng.uniform(0, np.pi))) < 1 + wave).astype(np.uint8)


def _noise(rng: np.random.Generator, height: int, width: int, cells: tuple[int, ...], amplitude: float) -> np.ndarray:
    """Return smooth noise (H, W, 1), the mean of several scales; `cells` are the grid cells per side of each scale."""
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
