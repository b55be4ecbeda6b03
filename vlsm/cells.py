"""Cells of the tables that are written for people: CSV for spreadsheets, and Markdown.

**CSV.** A spreadsheet takes a cell that begins with `=`, `+`, `-` or `@` for a formula, and a formula may send the
sheet away or start a program. A text that begins so gets an apostrophe in front: a spreadsheet then takes it for text.
The same holds for the full-width and small forms of these characters, behind blanks, for a tab or line break at the
beginning, and for a text that begins with apostrophes before one of these (so that reading is exact). Numbers are
written by us and stay numbers. `read_cell` returns the original text.

**Markdown.** Characters that make HTML, links, images, emphasis, code or another cell are escaped.
"""

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from vlsm.shown import escape

# the index of an export; it is also a list of images, which `vlsm.archive` reads
INDEX_COLUMNS = ("file", "image_id", "image_uri", "selector", "prompt", "kind", "error")
# the list of corrected masks, which a training reads
LABEL_COLUMNS = ("image_uri", "selector", "mask_uri", "prompt", "image_id", "outcome", "prediction_dice")
# the first columns of a list of images to label, which is read again with masks
CHOICE_COLUMNS = ("rank", "image_id", "image_uri", "selector", "prompt", "why")

_BLANK = r"[\s\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]"
_FORMULA = re.compile(rf"'*(?:[\t\r\n\0]|{_BLANK}*[=+\-@\uff1d\uff0b\uff0d\uff20\ufe66\ufe62\ufe63\ufe6b\u2212])")
_MARKDOWN = re.compile(r"[\\`*\[\]<>&|!~#$]|(?<![^\W_])_|_(?![^\W_])")
_BARE_LINK = re.compile(
    r"(?<=[A-Za-z])(:)(?=//)|(?<=www)(\.)|(?<=\w)(@)(?=\w)|(?<=mailto)(:)|(?<=xmpp)(:)", re.IGNORECASE
)


def write_cell(value: Any) -> Any:
    """Return the value of a cell as a CSV file for spreadsheets holds it; only texts change."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def read_cell(text: str) -> str:
    """Return the text that `write_cell` was given."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


class CsvWriter:
    """Writes rows as CSV with cells that no spreadsheet takes for formulas.

    Args:
        file: a text file.
        columns: names of the columns; the header is written at once.
    """

    def __init__(self, file: TextIO, columns: Sequence[str]) -> None:
        self._writer = csv.DictWriter(file, columns)  # with line ends that make it quote a cell with a part of them
        self._writer.writeheader()

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a row, a dict with these columns; None becomes an empty cell."""
        self._writer.writerow({name: write_cell(value) for name, value in row.items()})

    def write_all(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write several rows."""
        for row in rows:
            self.write(row)


def markdown_cell(text: str) -> str:
    """Return a text as a cell of a Markdown table, or inside a line, that shows exactly this text."""
    text = escape(" ".join(text.splitlines()))
    text = _MARKDOWN.sub(lambda found: f"&#{ord(found[0])};" if found[0] in "<>&" else f"\\{found[0]}", text)
    return _BARE_LINK.sub(lambda found: f"&#{ord(found[0])};", text)
