"""Damage the content of files on purpose: bytes, numbers and words, chunks, and values inside of containers.

A file whose checksums would give every change away (gzip, PNG, tar, zip, Parquet, safetensors) is also damaged inside:
it is unpacked, its content is changed, and it is packed again with checksums that agree.
"""

import gzip
import io
import random
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

Files = dict[str, bytes]  # the content of each file by its path below a folder
WAY = "way"  # name of a file that is never damaged: it says in which of several ways the others are read
Change = Callable[[bytearray, random.Random], None]

_MOST_CHANGES = 4
_MOST_BYTES = 1 << 22  # of a damaged file: repeated chunks do not let it grow without end
_INTEGERS = (0, 1, -1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_NUMBERS = (
    "0 1 -1 255 256 65535 65536 2147483647 -2147483648 4294967296 9223372036854775807 1e308 1e999 -1e9 0.5".split()
)
_NUMBERS += ["NaN", "Infinity", "-Infinity", "1_0", "0x10", "9" * 400]
_WORDS = ["null", "true", "[]", "{}", '""', "[[", "]]", "{", "}", '"', "'", ",", ":", "\n", "\t", "\0", "\x1b[2J", "~"]
_WORDS += [
    "../..",
    "/etc/passwd",
    "/dev/zero",
    "file:///etc/passwd",
    "a" * 5000,
    "%s%n",
    "é",
    "\u202e",
    "\ufeff",
    "=1+1",
]
_WORDS += ["&a", "*a", "<<: *a", "!!python/name:os.system", "- - - -", "[" * 3000, '{"a":' * 3000, "\r", "#frame=3"]


def mutate(files: Files, rng: random.Random) -> Files:
    """Return the files with one file damaged, seldom with one file missing or two exchanged.

    Args:
        files: undamaged; they are not changed.
        rng: decides everything, so equal seeds give equal files.
    """
    damaged, names = dict(files), sorted(name for name in files if name != WAY)
    if len(names) > 1 and rng.random() < 0.05:
        first, second = rng.sample(names, 2)
        if rng.random() < 0.5:
            del damaged[first]
        else:
            damaged[first], damaged[second] = damaged[second], damaged[first]
        return damaged
    name = rng.choice(names)
    damaged[name] = mutate_file(name, files[name], rng)
    return damaged


def mutate_file(name: str, data: bytes, rng: random.Random) -> bytes:
    """Return the damaged content of one file.

    Args:
        name: its ending says which container it may be.
        data: its content.
        rng: random numbers.
    """
    inside = next((change for ending, change in _INSIDE.items() if name.lower().endswith(ending)), None)
    if inside is not None and rng.random() < 0.5:
        try:
            return inside(data, rng)
        except Exception:  # the seed is no such file, or its damaged content cannot be packed
            return _change_bytes(data, rng)
    return _change_bytes(data, rng)


def _change_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    is_text = b"\0" not in data[:1000]
    for _ in range(rng.randint(1, _MOST_CHANGES)):
        rng.choice(_TEXT_CHANGES if is_text and rng.random() < 0.8 else _CHANGES)(changed, rng)
    return bytes(changed[:_MOST_BYTES])


def _place(data: bytearray, rng: random.Random) -> int:
    """Return a position: often near the start or the end, where most formats keep their headers and indexes."""
    where, size = rng.random(), len(data)
    if where < 0.5:
        return rng.randrange(min(size, 512) + 1)
    return rng.randrange(max(0, size - 512), size + 1) if where < 0.65 else rng.randrange(size + 1)


def _overwrite(data: bytearray, rng: random.Random) -> None:
    start = _place(data, rng)
    data[start : start + rng.randint(1, 4)] = rng.randbytes(rng.randint(1, 4))


def _flip(data: bytearray, rng: random.Random) -> None:
    if data:
        data[min(_place(data, rng), len(data) - 1)] ^= 1 << rng.randrange(8)


def _integer(data: bytearray, rng: random.Random) -> None:
    start, width = _place(data, rng), rng.choice((1, 2, 4, 8))
    value = rng.choice(_INTEGERS) % (1 << (8 * width))
    data[start : start + width] = value.to_bytes(width, rng.choice(("little", "big")))


def _truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _cut(data: bytearray, rng: random.Random) -> None:
    start = _place(data, rng)
    del data[start : start + rng.choice((1, 2, 4, 16, 64, 512))]


def _repeat(data: bytearray, rng: random.Random) -> None:
    start = _place(data, rng)
    chunk = data[start : start + rng.choice((1, 4, 16, 64, 512, 4096))]
    data[start:start] = chunk * rng.choice((1, 2, 16, 256))


def _splice(data: bytearray, rng: random.Random) -> None:
    """Copy one part of the file over another."""
    source, target, length = _place(data, rng), _place(data, rng), rng.choice((2, 8, 32, 128))
    data[target : target + length] = data[source : source + length]


def _number(data: bytearray, rng: random.Random) -> None:
    _replace_match(rb"-?\d+(\.\d+)?", rng.choice(_NUMBERS), data, rng)


def _word(data: bytearray, rng: random.Random) -> None:
    _replace_match(rb"[\w./+-]+|\"[^\"\n]*\"", rng.choice(_WORDS), data, rng)


def _insert_word(data: bytearray, rng: random.Random) -> None:
    start = _place(data, rng)
    data[start:start] = rng.choice(_WORDS).encode()


def _copy_line(data: bytearray, rng: random.Random) -> None:
    """Repeat, remove or move a line."""
    lines = bytes(data).splitlines(keepends=True)
    if lines:
        line = rng.choice(lines) if rng.random() < 0.5 else lines.pop(rng.randrange(len(lines)))
        lines[rng.randrange(len(lines) + 1) : 0] = [line] * rng.choice((0, 1, 2, 50))
        data[:] = b"".join(lines)


def _replace_match(pattern: bytes, text: str, data: bytearray, rng: random.Random) -> None:
    matches = [match.span() for match in re.finditer(pattern, bytes(data[:200_000]))]
    if matches:
        start, end = rng.choice(matches)
        data[start:end] = text.encode()


_CHANGES: tuple[Change, ...] = (_overwrite, _flip, _integer, _truncate, _cut, _repeat, _splice, _number)
_TEXT_CHANGES: tuple[Change, ...] = (_number, _number, _word, _word, _insert_word, _copy_line, _flip, _truncate)


def _inside_gzip(data: bytes, rng: random.Random) -> bytes:
    return gzip.compress(_change_bytes(gzip.decompress(data), rng), mtime=0)


def _inside_png(data: bytes, rng: random.Random) -> bytes:
    """Change one chunk, or repeat it; all checksums agree afterwards. Pixels are changed before their compression."""
    chunks, place = [], 8
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    number = rng.randrange(len(chunks))
    kind, content = chunks[number]
    if kind == b"IDAT" and rng.random() < 0.7:
        content = zlib.compress(_change_bytes(zlib.decompress(content), rng))
    else:
        content = _change_bytes(content, rng)
    chunks[number : number + 1] = [(kind, content)] * rng.choice((1, 1, 1, 2, 50))
    packed = [
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    ]
    return data[:8] + b"".join(packed)


def _inside_tar(data: bytes, rng: random.Random) -> bytes:
    """Change a header and mend its checksum."""
    block = tarfile.BLOCKSIZE
    headers = [start for start in range(0, len(data), block) if data[start + 257 : start + 262] == b"ustar"]
    start = rng.choice(headers)
    header = bytearray(data[start : start + block])
    _change_field(header, rng)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:start] + bytes(header) + data[start + block :]


def _change_field(header: bytearray, rng: random.Random) -> None:
    """Change one field of a tar header: name, size, type, or link."""
    start, length, values = rng.choice(
        [
            (0, 100, [b"../../x.png", b"/etc/passwd", b"a\n\x1b[2J.png", b"\xff\xfe.png", b"", b"a" * 100]),
            (124, 12, [b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"0" * 12, b"-1" + b" " * 10]),
            (156, 1, [b"1", b"2", b"3", b"5", b"6", b"L", b"S", b"g", b"x", b"\0"]),
            (157, 100, [b"../../../etc/passwd", b"/dev/zero", b""]),
        ]
    )
    header[start : start + length] = rng.choice(values).ljust(length, b"\0")[:length]


def _inside_zip(data: bytes, rng: random.Random) -> bytes:
    """Change one member, or its name."""
    sink = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as damaged:
        chosen = rng.choice(archive.infolist()).filename
        for info in archive.infolist():
            name, content = info.filename, archive.read(info)
            if name == chosen:
                content = mutate_file(name, content, rng)
                name = rng.choice([name, name, "../../x.png", "/x.png", "a\n.png", "x.png/", "a" * 9000 + ".png"])
            damaged.writestr(zipfile.ZipInfo(name), content)
    return sink.getvalue()


def _inside_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change the text of the header; its stated length agrees afterwards."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = _change_bytes(data[8:end], rng)
    return struct.pack("<Q", len(header)) + header + data[end:]


def _inside_parquet(data: bytes, rng: random.Random) -> bytes:
    """Change one value of one row, or drop a column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(pa.BufferReader(data), pre_buffer=False) as file:
        table = file.read(use_threads=False)  # as vlsm.storage.read_table does, and why
    number = rng.randrange(table.num_columns)
    if rng.random() < 0.1:
        changed = table.remove_column(number)
    else:
        rows, name = table.to_pylist(), table.column_names[number]
        row = rows[rng.randrange(len(rows))]
        row[name] = _other_value(row[name], rng)
        fields = [field.with_nullable(True) for field in table.schema]
        changed = pa.Table.from_pylist(rows, pa.schema(fields, table.schema.metadata))
    sink = pa.BufferOutputStream()
    pq.write_table(changed, sink, row_group_size=rng.choice((1, 2, 64)))
    return sink.getvalue().to_pybytes()


def _other_value(value: Any, rng: random.Random) -> Any:
    """Return another value of the same type, or None."""
    if rng.random() < 0.2:
        return None
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((0, -1, 1, 2**31 - 1, -(2**31), 65536))
    if isinstance(value, float):
        return rng.choice((0.0, -1.0, 1e308, float("nan"), float("inf")))
    if isinstance(value, str):
        return _change_bytes(value.encode() or b"x", rng).decode(errors="ignore")
    if isinstance(value, bytes):
        return mutate_file("x.png" if value[1:4] == b"PNG" else "x", value, rng)
    if isinstance(value, list):
        # a map has tuples; pyarrow ends the process if an entry of a map is null
        items = [item if isinstance(item, tuple) else _other_value(item, rng) for item in value]
        return items * rng.choice((0, 1, 3))
    return value


_INSIDE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".gz": _inside_gzip,
    ".tgz": _inside_gzip,
    ".png": _inside_png,
    ".tar": _inside_tar,
    ".zip": _inside_zip,
    ".safetensors": _inside_safetensors,
    ".parquet": _inside_parquet,
}
