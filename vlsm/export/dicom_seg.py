"""Export masks of DICOM images as DICOM segmentations (SEG), which a PACS stores and a viewer shows over the images."""

from pathlib import Path

from vlsm.export.dicom_objects import DicomExport
from vlsm.export.dicom_seg_object import make_segmentation
from vlsm.export.folder import ExportFolder, open_folder
from vlsm.export.origins import Filters


def export_dicom_seg(
    output: str, directory: str | Path | ExportFolder, filters: Filters = None, limit: int | None = None
) -> int:
    """Write one DICOM SEG per DICOM source file, at `DIR/FILE.seg.dcm`, with one segment per prompt, and the index.

    The SEG has type BINARY. It refers to the frames of the source file and names the model as its algorithm. If the run
    has label maps, the segments are their classes. UIDs are derived from the UIDs of the source file, the model and the
    prompts, so that a repeated export writes identical objects.

    A SEG repeats the patient and the study of its source file, as DICOM requires. Protect it like the source file. Its
    character set is UTF-8. Values that break the standard are repaired or emptied, by the rules in
    `vlsm.export.dicom_values`; one line of the log counts them. A SEG whose source has no complete position in the
    patient has none either: it refers to the frames of its source by their numbers.

    Args:
        output: OUTPUT of a segment run, local or in an object store.
        directory: a local folder; created if it does not exist.
        filters: conditions that the rows must meet, as a list of (column, operator, value).
        limit: maximum number of rows.

    Returns:
        Number of written files. The function skips files that are not DICOM, and a warning counts their masks. Rows of
        source files that cannot be read, or that lack attributes which a SEG requires, are noted in the index.

    Raises:
        ConfigError: OUTPUT has no masks, or a filter names an unknown column.
    """
    with open_folder(directory) as folder:
        return DicomExport(output, folder, limit, make_segmentation, ".seg.dcm").write_files(filters)


def export_dicom_seg_series(
    output: str, directory: str | Path | ExportFolder, filters: Filters = None, limit: int | None = None
) -> int:
    """Write one DICOM SEG per series, at `DIR/SERIES_INSTANCE_UID.DIGEST.seg.dcm`.

    `DicomExport.write_series` tells which slices share a SEG. Other images have a SEG each. Arguments, result and
    errors are as for `export_dicom_seg`.
    """
    with open_folder(directory) as folder:
        return DicomExport(output, folder, limit, make_segmentation, ".seg.dcm").write_series(filters)
