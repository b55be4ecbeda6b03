"""The limits for files from outside.

The settings `max_image_bytes` and `max_pixels` limit what is decoded. The constants here limit the work before: while
images are counted, and while one is looked for in its file. Each is far above what cameras, scanners and hubs write. A
file beyond a limit is a failed row that names the limit; the images of an archive before that place stay.
"""

# Images in one file: pages, frames, slices, rows of a Parquet file.
MAX_IMAGES = 1_000_000
# Elements of a DICOM object before its pixels.
MAX_DICOM_ELEMENTS = 100_000
# Members of a tar or zip, and the bytes of all their names together.
MAX_MEMBERS, MAX_NAMES_BYTES = 1 << 18, 1 << 26
# A name of a member, as the image_id of a manifest.
MAX_NAME_BYTES = 8192
# One header of a tar (a long name, attributes); headers, zeros and damage between two members; all of these together.
MAX_TAR_HEADER_BYTES, MAX_TAR_GAP_BYTES, MAX_TAR_HEADERS_BYTES = 1 << 24, 1 << 26, 1 << 29
MAX_TAR_ATTRIBUTES = 1000  # that hold for all members behind them
# The table of a zip's members.
MAX_ZIP_TABLE_BYTES = 1 << 27
# All that is unpacked of one archive while it is listed: this many bytes, or this many times its own size.
MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO = 1 << 36, 100
# A packed member that is kept in memory while it is listed, or a file whose server states no length.
MAX_LISTED_BYTES = 1 << 29
# A line of a list in text, a cell of a list in Parquet, a list that must be read as a whole (JSON).
MAX_LINE_LETTERS, MAX_CELL_BYTES = 1 << 24, 1 << 16
MAX_JSON_BYTES = 1 << 27  # the tokenizer with the largest vocabulary has a third of it
# The probe of a checkpoint: its file, the pixels of its image, its prompts.
MAX_PROBE_BYTES, MAX_PROBE_PIXELS, MAX_PROBE_PROMPTS = 1 << 22, 1 << 20, 12
# A reply by HTTP: silence, and the slowest transfer.
MAX_SILENCE_S, MIN_BYTES_PER_S = 60, 50_000
# Columns of a list that travel into the results of a run, and all values of an image in them together.
MAX_CARRIED_COLUMNS, MAX_CARRIED_BYTES = 100, 8192
# Regions of one label in an image, in a file of an annotation tool.
MAX_REGIONS = 100_000
