"""Pictures of masks drawn on their images, and contact sheets of such pictures."""

import bisect
import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

Colour = tuple[int, int, int]

_CONTOUR_LETTERS = 13  # of the shortest contour in a path
_GREEN = (0, 230, 118)
_MAGENTA = (255, 64, 200)
# Okabe and Ito's colours without black, which differ for every kind of colour vision, and white
PROMPT_COLORS = (
    (86, 180, 233),
    (230, 159, 0),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (213, 94, 0),
    (0, 114, 178),
    (255, 255, 255),
)


def draw_overlay(
    image: np.ndarray, mask: np.ndarray | None, target_mask: np.ndarray | None = None, colour: Colour = _GREEN
) -> np.ndarray:
    """Return the image with the mask tinted and outlined in a colour, and the target mask outlined in magenta.

    Args:
        image: (H, W, 3) uint8.
        mask: (H, W) of 0 and 1, or None to draw no mask.
        target_mask: (H, W) of 0 and 1, ground truth, or None to draw no target mask.
        colour: of the mask, RGB.

    Returns:
        (H, W, 3) uint8.
    """
    picture = image.astype(np.float32)
    thickness = max(1, round(min(image.shape[:2]) / 250))
    if mask is not None:
        inside = mask.astype(bool)
        picture[inside] = 0.7 * picture[inside] + 0.3 * np.array(colour, np.float32)
        picture[outline(inside, thickness)] = colour
    if target_mask is not None:
        picture[outline(target_mask.astype(bool), thickness)] = _MAGENTA
    return picture.astype(np.uint8)


def prompt_colors(number: int) -> list[tuple[int, int, int]]:
    """Return the colours of the first prompts, all different: PROMPT_COLORS, then hues of which neighbours differ."""
    colors = list(PROMPT_COLORS)
    for index in range(len(colors), number):  # hues at the golden angle
        shares = colorsys.hsv_to_rgb(index * 0.618034 % 1, (0.55, 0.8, 1.0)[index % 3], (1.0, 0.75)[index % 2])
        colors.append((round(255 * shares[0]), round(255 * shares[1]), round(255 * shares[2])))
    return colors[:number]


def draw_outlines(image: np.ndarray, masks: Sequence[np.ndarray], thickness: int) -> np.ndarray:
    """Return the image with the outline of each mask in its colour of `prompt_colors`.

    Equal outlines do not hide each other: each mask leaves gaps in its outline, where earlier ones are seen.

    Args:
        image: (H, W, 3) uint8.
        masks: (H, W) of 0 and 1 each.
        thickness: thickness of the outlines in pixels.

    Returns:
        (H, W, 3) uint8.
    """
    picture = image.copy()
    height, width = image.shape[:2]
    stripes = (np.arange(height)[:, None] + np.arange(width)) // (8 * thickness)
    drawn = np.zeros(image.shape[:2], bool)
    for color, mask in zip(prompt_colors(len(masks)), masks, strict=True):
        rim = outline(mask.astype(bool), thickness)
        picture[rim & ~(drawn & (stripes % 2 == 0))] = color
        drawn |= rim
    return picture


def draw_legend(picture: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return a picture with a strip below it: the colour of each mask of `draw_outlines`, its number and its name.

    Letters that the built-in font lacks become question marks; the number tells which name it is.

    Args:
        picture: (H, W, 3) uint8.
        names: one per mask.

    Returns:
        (H + strip, W, 3) uint8.
    """
    side = max(12, min(40, round(min(picture.shape[:2]) / 28)))
    font = ImageFont.load_default(side)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    width, line_px, places, x, y = picture.shape[1], round(1.5 * side), [], 0, 0
    for number, name in enumerate(names, start=1):
        text = f"{number} {name}".encode("latin-1", "replace").decode("latin-1")
        text = _cut_text(" ".join(text.split()), max(1, width - 3 * side), pen, font)
        length = round(2.5 * side + pen.textlength(text, font))
        if x and x + length > width:
            x, y = 0, y + line_px
        places.append((x, y, text))
        x += length
    strip = Image.new("RGB", (width, y + line_px), (24, 24, 24))
    pen = ImageDraw.Draw(strip)
    for color, (x, y, text) in zip(prompt_colors(len(places)), places, strict=True):
        top = y + (line_px - side) // 2
        box = (x + side // 2, top, x + side // 2 + side, top + side)
        pen.rectangle(box, fill=color)
        pen.text((x + 2 * side, y + line_px // 2), text, fill=(230, 230, 230), font=font, anchor="lm")
    return np.concatenate([picture, np.asarray(strip)])


def draw_label(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return a small image with a mask in green: outlined, and tinted so little that the image can be judged.

    The outline has a dark rim outside, so that it is visible on bright images too.

    Args:
        image: (H, W, 3) uint8, some hundred pixels wide.
        mask: (H, W) bool.

    Returns:
        (H, W, 3) uint8.
    """
    picture = image.astype(np.float32)
    picture[mask] = 0.88 * picture[mask] + 0.12 * np.array(_GREEN, np.float32)
    around = np.pad(~mask, 1, constant_values=True)
    picture[outline(around, 1)[1:-1, 1:-1]] = 0
    picture[outline(mask, 2)] = _GREEN
    return picture.astype(np.uint8)


def draw_sheet(pictures: Sequence[tuple[np.ndarray, str]], columns: int = 6, tile_px: int = 220) -> np.ndarray:
    """Return one sheet of pictures with captions, filled row by row.

    Args:
        pictures: pairs of an image (H, W, 3) uint8 and its caption, of one or several lines.
        columns: number of pictures per row.
        tile_px: side of the square that holds a picture, in pixels.

    Returns:
        (H, W, 3) uint8.
    """
    line_px, gap_px = 16 * max((caption.count("\n") + 1 for _, caption in pictures), default=1), 4
    rows = -(-len(pictures) // columns)
    step_x, step_y = tile_px + gap_px, tile_px + line_px + gap_px
    sheet = Image.new("RGB", (columns * step_x + gap_px, rows * step_y + gap_px), (24, 24, 24))
    pen = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(pictures):
        row, column = divmod(number, columns)
        left, top = gap_px + column * step_x, gap_px + row * step_y
        tile = ImageOps.pad(Image.fromarray(picture), (tile_px, tile_px), color=(0, 0, 0))
        sheet.paste(tile, (left, top))
        # Pillow's built-in font has only Latin letters
        lines = caption.encode("latin-1", "replace").decode("latin-1").split("\n")
        text = "\n".join(_cut_text(line, tile_px, pen) for line in lines)
        pen.multiline_text((left, top + tile_px + 1), text, fill=(230, 230, 230))
    return np.asarray(sheet)


def _cut_text(text: str, width_px: int, pen: ImageDraw.ImageDraw, font: Any = None) -> str:
    """Return a text that fits the width; a longer one ends with dots."""
    if pen.textlength(text[:width_px], font) <= width_px and len(text) <= width_px:
        return text

    def fits(length: int) -> bool:
        return pen.textlength(f"{text[:length]}..", font) <= width_px

    length = bisect.bisect_left(range(1, min(width_px, len(text)) + 1), True, key=lambda number: not fits(number))
    return f"{text[:length]}.."


def shrink_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a mask (H, W) of 0 and 1 at a picture's size, as bool. A mask smaller than a pixel keeps one pixel.

    Args:
        mask: (H, W) uint8 of 0 and 1.
        size: (width, height) of the picture in pixels.
    """
    share = np.asarray(Image.fromarray(mask * np.uint8(255)).resize(size, Image.Resampling.BOX))
    return np.asarray(share >= min(128, max(1, int(share.max()))))


def outline_path(mask: np.ndarray, side: int, most_letters: int) -> tuple[str, tuple[int, int]]:
    """Return the outlines of a mask as the path of an SVG, and the (width, height) of the path's coordinates.

    The lines run through the middle of the outermost pixels of each region and each hole. A mask whose path would be
    longer than `most_letters` is drawn with coarser pixels.

    Args:
        mask: (H, W) uint8 of 0 and 1.
        side: most pixels on the longer side of the coordinates; a smaller mask keeps its size.
        most_letters: longest path; at least 1,000.

    Returns:
        The path, empty for an empty mask, and the size.
    """
    import cv2  # imported here because most users of this module draw no paths

    while True:
        scale = min(1.0, side / max(mask.shape))
        size = (max(1, round(mask.shape[1] * scale)), max(1, round(mask.shape[0] * scale)))
        shape = shrink_mask(mask, size).astype(np.uint8) if mask.any() else np.zeros(size[::-1], np.uint8)
        contours, _ = cv2.findContours(shape, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
        if len(contours) * _CONTOUR_LETTERS <= most_letters:
            path = "".join(_contour_path(cv2.approxPolyDP(each, 0.7, True)[:, 0]) for each in contours)
            if len(path) <= most_letters:
                return path, size
        side = max(size) // 2


def _contour_path(points: np.ndarray) -> str:
    """Return a closed line through points (N, 2) as a part of a path: its start, then the steps between points."""
    (x, y), steps = points[0].tolist(), np.diff(points, axis=0).tolist()
    lines = " ".join(f"{right} {down}" for right, down in steps).replace(" -", "-")
    return f"M{x + 0.5} {y + 0.5}l{lines or '0 0'}z"  # a step of no length is a dot, for a region of one pixel


def outline(mask: np.ndarray, thickness: int) -> np.ndarray:
    """Return the outline of a mask: the pixels that an erosion by `thickness` pixels removes.

    Args:
        mask: (H, W) bool.
        thickness: thickness of the outline in pixels.

    Returns:
        (H, W) bool.
    """
    eroded = mask
    for _ in range(thickness):
        padded = np.pad(eroded, 1, constant_values=False)
        eroded = eroded & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~eroded
