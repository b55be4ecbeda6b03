"""Masks of a run as files for other tools. The functions for scripts are named here."""

from vlsm.export.files import export_coco, export_masks, export_overlays

__all__ = ["export_coco", "export_masks", "export_overlays"]
