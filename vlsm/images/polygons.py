"""Polygons of masks, and masks of polygons.

`trace_edges` follows the edges between pixels: (x, y) is the upper left corner of the pixel in column x and row y. So a
polygon has the area of its pixels, and every tool that fills it by the centers of pixels gets the mask again.
`trace_centers` goes through the centers of the outermost pixels, for tools that fill a polygon with its outline.
"""

import bisect
from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco

Ring = np.ndarray  # (corners, 2) of x and y; the first corner is not repeated
Polygon = list[Ring]  # the outer ring, then the holes


def trace_edges(mask: np.ndarray) -> list[Polygon]:
    """Return the polygons of a mask along the edges of its pixels, one for each region. Pixels share sides in a region.

    No ring meets itself: where it would touch itself, it becomes two rings.

    Args:
        mask: (H, W) of 0 and 1.

    Returns:
        Polygons of int64 rings, each with every corner of every pixel on its way; `drop_straight` removes those between
        others. Outer rings run clockwise on the screen, holes against it.
    """
    import cv2  # here: it takes memory in processes that only decode

    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return []
    top, left = int(rows[0]), int(columns[0])
    inside = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1] != 0, 1)
    width = inside.shape[1]
    edges, following = _link_edges(inside)
    _, labels = cv2.connectedComponents(inside.astype(np.uint8), connectivity=4)
    regions: dict[int, tuple[list[Ring], list[Ring]]] = {}
    corners = _corners(edges, width)
    for loop in _loops(following, corners):
        ring = np.column_stack([corners[loop] % width, corners[loop] // width])
        outer, holes = regions.setdefault(int(labels.flat[edges[loop[0]] // 4]), ([], []))
        (outer if _area(ring) > 0 else holes).append(ring + (left - 1, top - 1))
    return [[*outer, *holes] for outer, holes in regions.values()]


def _link_edges(inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges of pixels as 4 * pixel + side, in order, and the index of the edge that follows each.

    The sides are 0 top, 1 right, 2 bottom, 3 left. The foreground lies to the right of an edge.

    Args:
        inside: (H, W) bool, with a border of background.
    """
    width, flat = inside.shape[1], inside.ravel()
    beside = (-width, 1, width, -1)  # the neighbour at each side
    pixels = np.flatnonzero(flat)
    all_edges, all_next = [], []
    for side in range(4):
        own = pixels[~flat[pixels + beside[side]]]
        ahead = own + beside[(side + 1) % 4]
        corner = ahead + beside[side]
        turned, straight = 4 * own + (side + 1) % 4, 4 * ahead + side
        around = np.where(flat[corner], 4 * corner + (side - 1) % 4, straight)
        all_edges.append(4 * own + side)
        all_next.append(np.where(flat[ahead], around, turned))
    edges, following = np.concatenate(all_edges), np.concatenate(all_next)
    order = np.argsort(edges)
    return edges[order], np.searchsorted(edges[order], following[order])


def _corners(edges: np.ndarray, width: int) -> np.ndarray:
    """Return the corner at which each edge begins, as y * width + x."""
    pixels, sides = np.divmod(edges, 4)
    shifts: np.ndarray = np.array([0, 1, width + 1, width])[sides]
    return pixels + shifts


def _loops(following: np.ndarray, corners: np.ndarray) -> list[list[int]]:
    """Return the edges of each closed way, as indices. A way that passes a corner twice is cut there."""
    values, counts = np.unique(corners, return_counts=True)
    twice = set(values[counts > 1].tolist())
    next_edge, starts = following.tolist(), corners.tolist()
    is_done = bytearray(len(next_edge))
    loops = []
    for first in range(len(next_edge)):
        if is_done[first]:
            continue
        way: list[int] = []
        passed: dict[int, int] = {}
        edge = first
        while not is_done[edge]:
            is_done[edge] = 1
            corner = starts[edge]
            if corner in twice:
                if corner in passed:
                    place = passed[corner]
                    loops.append(way[place:])
                    del way[place:]
                    while next(reversed(passed.values()), -1) >= place:  # they are in the order of the way
                        passed.popitem()
                passed[corner] = len(way)
            way.append(edge)
            edge = next_edge[edge]
        loops.append(way)
    return loops


def _area(ring: Ring) -> int:
    """Return twice the area of a ring; below 0 if it runs against the clock on the screen."""
    after = np.roll(ring, -1, axis=0)
    return int((ring[:, 0] * after[:, 1] - after[:, 0] * ring[:, 1]).sum())


def trace_centers(mask: np.ndarray) -> list[Polygon]:
    """Return the polygons of a mask through the centers of its outermost pixels; the first center is (0, 0).

    Pixels of a region share sides or corners. A region of one pixel is a ring of one corner.

    Args:
        mask: (H, W) of 0 and 1.

    Returns:
        Polygons of int64 rings, with every pixel on their way.
    """
    import cv2  # here: as above

    contours, tree = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    polygons: dict[int, Polygon] = {}
    for number, parent in enumerate(tree.reshape(-1, 4)[:, 3].tolist() if contours else []):
        ring = contours[number].reshape(-1, 2).astype(np.int64)
        polygons.setdefault(number if parent < 0 else parent, []).insert(0 if parent < 0 else 1, ring)
    return list(polygons.values())


def join_rings(polygon: Polygon) -> Ring:
    """Return a polygon as one ring: a channel without width leads from each hole to the left, to the next ring.

    A channel lies in the foreground, on a grid line. Tools without holes fill such a ring as they fill the polygon.

    Args:
        polygon: rings with every corner on their way.
    """
    corners, following = polygon[0].tolist(), [*range(1, len(polygon[0])), 0]  # a linked list
    rows: dict[int, list[tuple[int, int]]] = {}  # x and place of the corners, by y

    def note(places: range) -> None:
        for place in places:
            x, y = corners[place]
            bisect.insort(rows.setdefault(y, []), (x, place))

    note(range(len(corners)))
    holes = [ring.tolist() for ring in polygon[1:]]
    for hole in sorted(holes, key=min):
        start = hole.index(min(hole))  # to its left is foreground, or a ring that is joined already
        x, y = hole[start]
        _, nearest = rows[y][bisect.bisect_right(rows[y], (x, len(corners))) - 1]
        first = len(corners)
        corners += [*hole[start:], *hole[: start + 1], corners[nearest]]
        following += [*range(first + 1, len(corners)), following[nearest]]
        following[nearest] = first
        note(range(first, first + len(hole)))
    places = [0]
    while (place := following[places[-1]]) != 0:
        places.append(place)
    joined = np.array(corners, np.int64)[places]
    is_new = (joined != np.roll(joined, 1, axis=0)).any(axis=1)  # a hole may touch the next ring
    return joined[is_new] if is_new.any() else joined[:1]


def drop_straight(ring: Ring) -> Ring:
    """Return a ring without the corners that lie on a straight line between their neighbours."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    is_turn = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    is_back = (before * after).sum(axis=1) < 0  # the end of a channel
    return ring[is_turn | is_back] if len(ring) > 2 else ring


def fill_polygon(polygon: Sequence[list[float]], size: tuple[int, int]) -> np.ndarray:
    """Return the mask of a polygon, (H, W) uint8 of 0 and 1: the pixels inside the outer ring and outside of its holes.

    Args:
        polygon: the outer ring, then the holes; each x and y of its corners in turn, which the caller has checked.
        size: (height, width) in pixels.
    """
    outer, *holes = (coco.decode(coco.frPyObjects([ring], *size))[..., 0] for ring in polygon)
    for hole in holes:
        outer &= ~hole & 1
    return np.ascontiguousarray(outer)
