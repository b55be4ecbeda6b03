"""Export the masks of a run as files for other tools. Scripts import the functions named here."""

from vlsm.export.coco import export_coco
from vlsm.export.files import export_masks, export_overlays, export_probability

__all__ = ["export_coco", "export_masks", "export_overlays", "export_probability"]
