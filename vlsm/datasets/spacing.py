"""The distance of pixels in the patient, where a file states it: DICOM images, and the slices of volumes.

Other files are not asked: the resolution of a PNG, JPEG or TIFF is that of a print or a scanner. So is DICOM's
ImagerPixelSpacing, which holds at the detector of an X-ray machine and not in the patient.
"""

import io
import math
from typing import Any

from vlsm.errors import ImageError
from vlsm.images.formats import FORMATS
from vlsm.images.reader import Content

_VOLUMES = ("nifti", "nrrd", "metaimage")
_TAGS = [0x00280030, 0x52009229, 0x52009230]  # PixelSpacing, and the functional groups of all frames and of each frame
_PIXELS = 0x7FE00000  # all elements from here on
_MAX_HEADER_BYTES = 1 << 28


def read_spacing(content: Content, frame: str | None, axis: str) -> tuple[float, float] | None:
    """Return the distance between rows, and between columns, of an image in millimetres. None if it is not stated.

    Args:
        content: the file of the image.
        frame: which image of the file it is, such as "slice=17"; None for the only one.
        axis: the direction of slices, as in data.slices.
    """
    if content.kind in _VOLUMES:
        module: Any = FORMATS[content.kind].load()
        spacing = module.read_header(io.BytesIO(content.data), content.name, axis).grid.slice_spacing
    elif content.kind == "dicom":
        spacing = _read_dicom(content, int((frame or "frame=0").removeprefix("frame=")))
    else:
        return None
    return spacing if spacing is not None and all(math.isfinite(one) and one > 0 for one in spacing) else None


def _read_dicom(content: Content, frame: int) -> tuple[float, float] | None:
    from vlsm.images.dicom import damage  # needs pydicom, which takes long to import
    from vlsm.images.dicom_form import read_numbers
    from vlsm.images.dicom_header import read_header

    try:
        with damage(content.name):
            file = io.BytesIO(content.data)
            header = read_header(file, lambda tag, *_: tag >= _PIXELS, _TAGS, _MAX_HEADER_BYTES, content.name)
            own = (header.get("PerFrameFunctionalGroupsSequence") or ())[frame : frame + 1]
            groups = [*own, *(header.get("SharedFunctionalGroupsSequence") or ())[:1]]
            homes = [item for group in groups for item in group.get("PixelMeasuresSequence") or ()]
            found = [numbers for home in (*homes, header) if (numbers := read_numbers(home, "PixelSpacing"))]
    except ImageError:  # an image without a readable spacing is scored in pixels
        return None
    if not found or len(found[0]) != 2 or None in found[0]:
        return None
    rows, columns = (float(number or 0) for number in found[0])
    return rows, columns
