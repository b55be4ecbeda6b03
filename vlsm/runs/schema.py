"""The columns of all tables that a segment run writes."""

import pyarrow as pa

# The plan: one row per image. A row group is a shard.
MANIFEST_SCHEMA = pa.schema(
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

# The output: one row per (image, prompt, kind). By default the only kind is "mask".
RESULT_SCHEMA = pa.schema(
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
        pa.field("mask_rle", pa.string()),
        pa.field("label_map", pa.binary()),
        pa.field("area_px", pa.int64()),
        pa.field("area_fraction", pa.float64()),
        pa.field("bbox", pa.list_(pa.int32())),
        pa.field("confidence", pa.float64()),
        pa.field("agreement", pa.float64()),
        pa.field("review", pa.string()),
        pa.field("model", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)
