"""The columns of all tables that a segment run writes."""

import pyarrow as pa

from vlsm.errors import ResultError
from vlsm.version import FORMAT, newer_format

_FORMAT_KEY = b"vlsm.format"

# The plan: one row per image. A row group is a shard.
PLAN_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image_uri", pa.string(), nullable=False),
        pa.field("selector", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("problem", pa.string()),
        pa.field("image_version", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("etag", pa.string()),
        pa.field("mtime", pa.timestamp("us", tz="UTC")),
        pa.field("prompts", pa.list_(pa.string()), nullable=False),
        pa.field("vanished", pa.bool_(), nullable=False),
    ]
)

# What the columns of the output mean. Each file states it in the metadata of its columns, for people who open it with
# another tool: `pyarrow.parquet.read_schema(FILE).field("confidence").metadata`.
COLUMN_NOTES = {
    "image_id": "name of the image: its path below INPUT, with the selector behind a #, or the name in the list",
    "image_uri": "file of the image, without secrets",
    "selector": "which image of its file: frame=3, page=2, slice=17, or the member of a tar or zip; null: the only one",
    "image_version": "version of the planned file: its etag, or its size and time of change; null: a list has none",
    "content_sha256": "SHA-256 of the file's bytes; null: none could be read",
    "prompt": "text with which the image was segmented, or the name of a class; for a label map, a JSON list of them",
    "kind": "mask: the result; member N: the mask of one model of an ensemble; labels: a label map of all prompts",
    "height": "height of the image in pixels",
    "width": "width of the image in pixels",
    "grey_rule": "rule that turned stored values of more than 8 bits into grey levels; null: none was needed",
    "mask_rle": "the mask as COCO run lengths of (height, width); vlsm.read_masks decodes it",
    "label_map": "of kind labels: PNG, 0 is background, k is the k-th prompt",
    "probability_map": "PNG with the probability of each pixel: 0 to 255 stand for 0 to 1; null: it was not kept",
    "area_px": "foreground pixels",
    "area_fraction": "foreground pixels as a share of the image, from 0 to 1; 0: the mask is empty",
    "bbox": "[x, y, width, height] of the foreground in pixels; null: the mask is empty",
    "confidence": "mean probability of the pixels inside the mask, from 0 to 1; null: the mask is empty. A probability "
    "belongs to one pixel. Without calibration, a high confidence does not mean that the mask is good",
    "max_probability": "highest probability of any pixel of the image, from 0 to 1, before masks are cleaned: how sure "
    "the model is that the image shows the finding at all; null: an earlier version did not write it",
    "agreement": "mean Dice between the masks of an ensemble's members, from 0 to 1; null: one model only",
    "review": "why a person should look at the mask: low confidence, low agreement, odd area; null: no reason",
    "embedding": "vector of the image by a model's image tower, of length 1, in the first row of each image: the "
    "projected embedding of CLIP for cris, else the mean of its last patches; null: other rows, or not kept",
    "model": "the model and the start of its checkpoint's digest",
    "status": "ok, failed (see error) or vanished (no longer in INPUT)",
    "error": "REASON: message of a failed image; null: none",
}

# The output: one row per (image, prompt, kind). By default the only kind is "mask".
_RESULT_COLUMNS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image_uri", pa.string(), nullable=False),
        pa.field("selector", pa.string()),
        pa.field("image_version", pa.string()),
        pa.field("content_sha256", pa.string()),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("grey_rule", pa.string()),
        pa.field("mask_rle", pa.string()),
        pa.field("label_map", pa.binary()),
        pa.field("probability_map", pa.binary()),
        pa.field("area_px", pa.int64()),
        pa.field("area_fraction", pa.float64()),
        pa.field("bbox", pa.list_(pa.int32())),
        pa.field("confidence", pa.float64()),
        pa.field("max_probability", pa.float64()),
        pa.field("agreement", pa.float64()),
        pa.field("review", pa.string()),
        pa.field("embedding", pa.list_(pa.float16())),
        pa.field("model", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)
RESULT_SCHEMA = pa.schema([field.with_metadata({"description": COLUMN_NOTES[field.name]}) for field in _RESULT_COLUMNS])


def part_schema(embedding_width: int) -> pa.Schema:
    """Return the schema of a part file.

    Args:
        embedding_width: number of values in an embedding. A run without embeddings (0) has no such column, since some
            tools do not read float16 yet.
    """
    position = RESULT_SCHEMA.get_field_index("embedding")
    if not embedding_width:
        return RESULT_SCHEMA.remove(position)
    field = RESULT_SCHEMA.field(position)
    return RESULT_SCHEMA.set(position, field.with_type(pa.list_(pa.float16(), embedding_width)))


def with_format(schema: pa.Schema, **metadata: str) -> pa.Schema:
    """The schema with the format version, and more, in its metadata."""
    return schema.with_metadata({_FORMAT_KEY: str(FORMAT)} | metadata)


def check_format(schema: pa.Schema, name: str) -> None:
    """Do nothing if this version can read a file with such a schema.

    Raises:
        ResultError: the file has a newer format, or states none that is a number.
    """
    stated = (schema.metadata or {}).get(_FORMAT_KEY)
    if stated is not None:
        stated = int(stated) if stated.isdigit() else stated.decode(errors="replace")
    if message := newer_format(stated, name):
        raise ResultError(message)


def complete(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return a table of an earlier version, or of anybody, with the columns of a schema; absent ones are null.

    Raises:
        ValueError: a column is absent, or has nulls, which its schema forbids.
        pa.ArrowException: a column cannot be cast, or its values are invalid.
    """
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            column = pa.chunked_array([pa.nulls(len(table), field.type)])
        elif (column := table[field.name]).type != field.type:
            column = column.cast(field.type)
        if not field.nullable and column.null_count:
            raise ValueError(f"the column {field.name} is absent or has nulls")
        columns.append(column)
    completed = pa.Table.from_arrays(columns, schema=schema)
    completed.validate(full=True)  # also that texts are UTF-8
    return completed
