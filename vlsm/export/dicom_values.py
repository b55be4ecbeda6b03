"""Copies elements of a DICOM header in the form that the standard allows, and counts the values that it had to change.

Rules, one per kind of value:

- Text is decoded with the character set of the source and kept, also if it is longer than the standard allows: it
  identifies the patient. The copy has the character set UTF-8, which can hold every text.
- A date, time, age, code or number that breaks its format is repaired where its meaning is plain ("1970.01.02",
  "10:20:30", "45Y", "m", "70,5").
- Any other value is emptied if the standard requires the element (type 2), and left out if not (type 3).
"""

import contextlib
import datetime
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable

from pydicom import charset
from pydicom.datadict import dictionary_VM, dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_data_element
from pydicom.multival import MultiValue
from pydicom.valuerep import DT, STR_VR, TEXT_VR_DELIMS, TM, format_number_as_ds, is_valid_ds

logger = logging.getLogger("vlsm")

UTF_8 = "ISO_IR 192"
# Elements of the modules Patient and General Study that are required, but may be empty (type 2).
TYPE_2 = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"),
)
# Optional elements (type 3) of the modules General Study and Specimen. Groups 0010 and 0012 are copied as a whole.
_OPTIONAL = (
    *("StudyDescription", "PhysiciansOfRecord", "NameOfPhysiciansReadingStudy", "ReferencedStudySequence"),
    *("IssuerOfAccessionNumberSequence", "ProcedureCodeSequence", "ContainerIdentifier", "ContainerTypeCodeSequence"),
    *("IssuerOfTheContainerIdentifierSequence", "SpecimenDescriptionSequence"),
)
_ESCAPES = re.compile(r"\x1b[$()*+,./-]{1,2}[0-~]")  # pydicom 3.0 leaves those of ISO 2022 IR 58 in the decoded text
_BACKSLASH_ENCODINGS = ("GB18030", "GBK")  # the second byte of a character can be that of a backslash


class Repairs:
    """Counts changed values by keyword. It never keeps a value, because values identify patients."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, keyword: str, change: str) -> None:
        """Count one element. `change` says what happened to it, such as "emptied"."""
        self._counts[keyword, change] += 1

    def log(self) -> None:
        """Log one line with all counts, if there are any."""
        if self._counts:
            changes = ", ".join(f"{keyword} {what} in {n:,}" for (keyword, what), n in sorted(self._counts.items()))
            logger.warning("DICOM values that could not be copied as they are, by number of images: %s", changes)


def copy_common_elements(header: Dataset, repairs: Repairs) -> Dataset:
    """Return the elements that all objects of a study share: of the patient, study, clinical trial and specimen.

    The result has all elements of type 2, and the character set UTF-8. It has no UIDs.
    """
    names = read_texts(header, "SpecificCharacterSet")
    if any(name and name not in charset.python_encoding for name in names):
        repairs.add("SpecificCharacterSet", "unknown")
    tags = {int(tag) for tag in header.keys() if tag.group in (0x0010, 0x0012)}
    tags |= {int(tag_for_keyword(keyword) or 0) for keyword in (*TYPE_2, *_OPTIONAL)}
    clean = copy_elements(header, [keyword for tag in sorted(tags) if (keyword := keyword_for_tag(tag))], repairs)
    for keyword in TYPE_2:
        if keyword not in clean:
            setattr(clean, keyword, None)
    clean.SpecificCharacterSet = UTF_8
    return clean


def copy_elements(header: Dataset, keywords: Iterable[str], repairs: Repairs) -> Dataset:
    """Return the given elements that the header has, in a form that can be written with the character set UTF-8."""
    # unknown character sets are ISO 8859-1, as pydicom reads them
    encodings, clean = charset.convert_encodings(read_texts(header, "SpecificCharacterSet")), Dataset()
    for keyword in keywords:
        if keyword not in header:
            continue
        try:
            element, is_repaired = _copy_element(header, keyword, encodings)
        except Exception:  # damage causes errors of many types
            repairs.add(keyword, "emptied" if keyword in TYPE_2 else "left out")
            continue
        clean.add(element)
        if is_repaired:
            repairs.add(keyword, "repaired")
    return clean


def read_texts(header: Dataset, keyword: str, encodings: list[str] | None = None) -> list[str]:
    """Return the values of an element as text without padding; an empty list if it is missing or empty.

    The function also reads an element whose VR or format differs from the standard: it decodes the bytes.
    """
    stored = header.get_item(keyword) if keyword in header else None
    raw = stored.value if isinstance(stored, RawDataElement) else None
    try:
        value = header[keyword].value if stored is not None else None
    except Exception:  # pydicom cannot convert the value, for example a DS of "0,5"
        value = raw
    if encodings and encodings[0] in _BACKSLASH_ENCODINGS:
        value = raw or value  # pydicom splits the bytes, and so breaks characters
    if isinstance(value, bytes):
        value = charset.decode_bytes(value, encodings or ["iso8859"], TEXT_VR_DELIMS).rstrip("\0 ").split("\\")
    values = list(value) if isinstance(value, list | MultiValue) else [value]
    texts = ["" if one is None else _ESCAPES.sub("", str(one)).rstrip("\0 ") for one in values]
    return texts if any(texts) else []


def read_numbers(header: Dataset, keyword: str, count: int) -> list[float] | None:
    """Return `count` finite numbers, or None if the element does not hold them. A decimal comma is accepted."""
    with contextlib.suppress(ValueError):
        numbers = [float(text.replace(",", ".")) for text in read_texts(header, keyword)]
        if len(numbers) == count and all(math.isfinite(number) for number in numbers):
            return numbers
    return None


def _copy_element(header: Dataset, keyword: str, encodings: list[str]) -> tuple[DataElement, bool]:
    """Return an element and whether its value differs from the bytes in the header.

    Raises:
        Exception: the value breaks the format of the element, or cannot be written.
    """
    tag, vr, is_repaired = int(tag_for_keyword(keyword) or 0), dictionary_VR(keyword), False
    if vr in STR_VR:
        texts = read_texts(header, keyword, encodings)
        values = [_format_text(keyword, vr, text, is_single=len(texts) == 1) for text in texts]
        is_changed = [value.strip() for value in values] != [text.strip() for text in texts]
        is_repaired = is_changed or any("\ufffd" in text for text in texts)  # pydicom's mark of undecodable bytes
        element = DataElement(tag, vr, values[0] if len(values) == 1 else values or None)
    else:
        value = header[keyword].value
        element = DataElement(tag, vr, _decode_items(value) if vr == "SQ" else value)
    file = DicomBytesIO()
    file.is_little_endian, file.is_implicit_VR = True, False
    write_data_element(file, element, ["utf8"])
    return element, is_repaired


def _decode_items(items: Iterable[Dataset]) -> list[Dataset]:
    """Decode all text in the items of a sequence, so that it can be written with another character set."""
    for item in items:
        for element in item:  # this decodes it
            if element.VR == "SQ":
                _decode_items(element.value)
        item.pop("SpecificCharacterSet", None)
    return list(items)


def _format_text(keyword: str, vr: str, text: str, is_single: bool) -> str:
    """Return a text in the format of its VR. Raises ValueError if it breaks the format and its meaning is not plain."""
    if vr not in _FORMATS or not text:
        return text
    value = _FORMATS[vr](text.strip())
    if not is_single and dictionary_VM(keyword) == "1":
        raise ValueError("more than one value")
    if keyword == "PatientSex" and value not in ("M", "F", "O"):
        raise ValueError("not a code of the standard")
    return value


def _format_date(text: str) -> str:
    digits = re.sub("[-./]", "", text)
    if not re.fullmatch("[0-9]{8}", digits):
        raise ValueError("not a date")
    datetime.datetime.strptime(digits, "%Y%m%d")  # raises ValueError
    return digits


def _format_time(text: str) -> str:
    digits = text.replace(":", "")[:13]  # at most six digits of a second's fraction
    TM(digits)  # raises ValueError
    return digits


def _format_datetime(text: str) -> str:
    DT(text)  # raises ValueError
    return text


def _format_age(text: str) -> str:
    match = re.fullmatch("([0-9]{1,3})([DWMY])", text.upper())
    if match is None:
        raise ValueError("not an age")
    return f"{int(match[1]):03}{match[2]}"


def _format_code(text: str) -> str:
    if not re.fullmatch("[A-Z0-9 _]{1,16}", text.upper()):
        raise ValueError("not a code")
    return text.upper()


def _format_decimal(text: str) -> str:
    number = float(text.replace(",", "."))
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return text if is_valid_ds(text) and len(text) <= 16 else format_number_as_ds(number)


def _format_integer(text: str) -> str:
    return text if re.fullmatch("[+-]?[0-9]{1,11}", text) else str(int(text))


def _format_uid(text: str) -> str:
    if not re.fullmatch("[0-9.]{1,64}", text):
        raise ValueError("not a UID")
    return text


# VR -> function that returns a text of its format, or raises ValueError. Other text is kept.
_FORMATS: dict[str, Callable[[str], str]] = {
    "DA": _format_date,
    "TM": _format_time,
    "DT": _format_datetime,
    "AS": _format_age,
    "CS": _format_code,
    "DS": _format_decimal,
    "IS": _format_integer,
    "UI": _format_uid,
}
