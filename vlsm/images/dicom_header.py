"""Reads elements of DICOM files. Damaged and hostile files cause no warning or log line that quotes their values."""

import contextlib
import io
import logging
import threading
import warnings
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import pydicom.config
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.filereader import _read_file_meta_info, read_dataset, read_partial, read_preamble

from vlsm.errors import BeyondLimitError, ImageError
from vlsm.limits import MAX_DICOM_ELEMENTS

UNDEFINED_LENGTH = 0xFFFFFFFF  # the length of an element that ends with a delimiter

_quiet_lock = threading.Lock()
_num_quiet = 0
_before_quiet: contextlib.ExitStack


def read_header(file: BinaryIO, stop_when: Any, tags: list[int], max_bytes: int, name: str) -> Dataset:
    """Return the chosen elements of a DICOM file.

    The data set also has a `file_meta`, always with a transfer syntax, and `is_cut`: whether it ends inside an element.

    Args:
        file: at its start.
        stop_when: takes (tag, VR, length) of a top-level element and returns whether to stop before it. None reads all.
        tags: the elements to read; others are skipped.
        max_bytes: at most this many bytes of a deflated object are unpacked. pydicom's own reader has no limit.
        name: the file's name in error messages.

    Raises:
        ImageError: "too_large": stop_when is None and a deflated object has more than max_bytes.
        Exception: any error that pydicom raises for damage.
    """
    read_preamble(file, force=True)
    meta = _read_file_meta_info(file)
    start = file.tell()
    if file.read(2) == bytes(2):  # pydicom would read such elements without end; DICOM allows them in no file
        raise ImageError("corrupt", f"{name} has elements of the group 0000, which no DICOM file has")
    file.seek(start)
    if meta.get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian:
        content, is_all = _inflate(file, max_bytes)
        if not is_all and stop_when is None:
            raise ImageError("too_large", f"{name} holds more than {max_bytes:,} bytes")
        file, end = io.BytesIO(content), _End(stop_when, name)
        dataset = read_dataset(file, False, True, stop_when=end.see(file), specific_tags=list(tags))
        if stop_when is None:
            meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        dataset.file_meta = meta
    else:
        end = _End(stop_when, name)
        file.seek(0)
        dataset = read_partial(file, end.see(file), force=True, specific_tags=list(tags))
    dataset.is_cut = end.is_beyond(file)
    if "TransferSyntaxUID" not in dataset.file_meta:
        is_implicit, is_little = dataset.original_encoding
        explicit = uid.ExplicitVRLittleEndian if is_little else uid.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if is_implicit else explicit
    return dataset


class _End:
    """Remembers where the last element that pydicom has seen should end. pydicom skips beyond the end of a file."""

    def __init__(self, stop_when: Any, name: str) -> None:
        self._stop_when, self._name = stop_when, name
        self._offset = -1
        self._num_elements = 0

    def see(self, file: BinaryIO) -> Any:
        """Return the stop_when for pydicom, which is at an element's value when it calls it."""

        def stop(tag: Any, vr: str | None, length: int) -> bool:
            self._num_elements += 1
            if self._num_elements > MAX_DICOM_ELEMENTS:
                raise BeyondLimitError(f"{self._name} has more than {MAX_DICOM_ELEMENTS:,} elements before its pixels")
            self._offset = 0 if length == UNDEFINED_LENGTH else file.tell() + length
            if self._stop_when is None or not self._stop_when(tag, vr, length):
                return False
            self._offset = 0
            return True

        return stop

    def is_beyond(self, file: BinaryIO) -> bool:
        """Return whether the file ends inside the last element, or before the first one."""
        return self._offset < 0 or (self._offset > 0 and self._offset > file.seek(0, io.SEEK_END))


def _inflate(file: BinaryIO, max_bytes: int) -> tuple[bytes, bool]:
    """Return at most the first max_bytes of an unpacked raw deflate stream, and whether these are all bytes.

    Raises:
        zlib.error: the stream is damaged.
    """
    inflater, content = zlib.decompressobj(-zlib.MAX_WBITS), bytearray()
    while not inflater.eof and len(content) < max_bytes:
        chunk = inflater.unconsumed_tail or file.read(1 << 16)
        if not chunk:
            raise zlib.error("the deflate stream ends early")
        content += inflater.decompress(chunk, max_bytes - len(content))
    return bytes(content), inflater.eof


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and log lines of pydicom and highdicom, which quote header values.

    Numbers that violate the standard's format are accepted. Threads may overlap: the last one to leave restores the
    former state.
    """
    global _num_quiet, _before_quiet
    with _quiet_lock:
        _num_quiet += 1
        if _num_quiet == 1:
            _before_quiet = contextlib.ExitStack()
            _before_quiet.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            _before_quiet.enter_context(pydicom.config.disable_value_validation())
            for log in (logging.getLogger("pydicom"), logging.getLogger("highdicom")):
                _before_quiet.callback(log.setLevel, log.level)
                log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        with _quiet_lock:
            _num_quiet -= 1
            if not _num_quiet:
                _before_quiet.close()
