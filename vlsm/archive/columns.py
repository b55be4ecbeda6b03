"""Finds the columns of a list by their names, and reads their cells: missing values, and lists written as text."""

import ast
import difflib
import json
import logging
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlsm.documents import parse_json, parse_yaml
from vlsm.errors import ManifestError, VlsmError

if TYPE_CHECKING:
    from vlsm.archive.carried import Carried

logger = logging.getLogger("vlsm")

KNOWN = (
    *("image_uri", "image_id", "selector", "prompt", "prompts", "size_bytes", "etag", "mtime"),
    *("mask_uri", "mask_selector", "split", "dataset", "group"),  # of labelled images
)
# names that other programs give to the location of an image, the likeliest first
_LOCATIONS = (
    "path file_path filepath image_path img_path image_file file file_name filename uri url image_url image img"
).split()
# texts that programs write for a missing value. "NA" is not among them: it may be an id or a short word.
_MISSING = frozenset({"nan", "NaN", "NaT", "None", "null", "NULL", "N/A", "n/a", "#N/A", "<NA>"})
# a text that begins like this was a list, even if its end is cut off
_LIST_START = re.compile(r"""[\[({]\s*['"]|(?:array|list|tuple|set|frozenset)\(""")
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_PROMPTS = {"prompt", "prompts"}
CARRIED = "carried "  # marks the names of further columns, which travel into the results, among known names
_SHOWN = 20  # columns that a message names
_MOST_HEADERS = 1000  # that are remembered

Row = dict[str, Any]
Cells = Iterator[tuple[int, Mapping[str, int], Sequence[Any]]]  # a row's number, the positions of known columns, cells


class Columns:
    """Finds the columns of lists and reads their cells. One object serves all files of a list.

    A name is compared without blanks around it, in lower case, with "_" for inner blanks and hyphens.

    Args:
        chosen: the setting `columns`, from known names to names in the list. None where this setting does not exist.
        setting: the name of this setting in messages.
        carried: further columns that are read, by marked names.
    """

    def __init__(
        self, chosen: Mapping[str, str] | None, setting: str = "columns", carried: "Carried | None" = None
    ) -> None:
        self._setting, self.carried = setting, carried
        self._chosen = {known: name for known, name in (chosen or {}).items() if known != "image"}
        self._can_choose = chosen is not None
        self._found: dict[tuple[str, ...], dict[str, int]] = {}  # by header: a record of JSON is a header as well
        self._met: set[str] = set()
        self._missing = Counter[str]()
        self._first: set[str] | None = None  # known columns of the first file
        self._is_told = self._is_located = False

    def find(self, names: Sequence[str], where: str) -> dict[str, int]:
        """Return the position of each known column in a header or in the keys of a record.

        Raises:
            ManifestError: two columns have the same known name; `where` names the list in the message.
        """
        key = tuple(names)
        if key not in self._found:
            if len(self._found) > _MOST_HEADERS:
                self._found.clear()
            self._found[key] = self._find(key, where)
            self._met |= self._found[key].keys()
        return self._found[key]

    def _find(self, names: tuple[str, ...], where: str) -> dict[str, int]:
        found = {}
        for known in KNOWN:
            if known in _PROMPTS and known not in self._chosen and not _PROMPTS.isdisjoint(self._chosen):
                continue  # the chosen one replaces both
            wanted = self._chosen.get(known, known)
            exact = [position for position, name in enumerate(names) if name == wanted and known in self._chosen]
            alike = [position for position, name in enumerate(names) if normalize(name) == normalize(wanted)]
            same = exact or alike
            if len(same) > 1:
                twins = ", ".join(repr(names[position]) for position in same)
                raise ManifestError(f"{where} has several columns {known}: {twins}; rename or remove all but one")
            if same:
                found[known] = same[0]
        return found if self.carried is None else found | self.carried.find(names)

    def require(self, names: Sequence[str], uri: str, also: Sequence[str] = ()) -> dict[str, int]:
        """Return the positions as `find` does, for a list whose header states all its columns.

        Args:
            names: the header.
            uri: the list in messages.
            also: further columns, which the names of the folders state.

        Raises:
            ManifestError: as for `find`; or there is no column with the locations, or not the one that was chosen.
        """
        found = self.find(names, uri)
        listed = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        known = found.keys() | self.find(also, uri).keys()
        if absent := [name for name in self._chosen if name not in known]:
            raise ManifestError(
                f"{self._setting}.{absent[0]} is {self._chosen[absent[0]]!r}, but {uri} has the columns {listed}"
            )
        found = self.locate(names, found)
        if "image_uri" not in found:
            raise ManifestError(f"{uri} has the columns {listed}; a manifest needs image_uri{self.suggest(names)}")
        known |= found.keys()
        if self._first is not None and self._first != known:
            logger.warning("%s has the columns %s; the list's first file has %s", uri, _join(known), _join(self._first))
        self._first = self._first or known
        unread = [name for position, name in enumerate(names) if name and position not in found.values()]
        if unread and not self._is_told and self.carried is None:
            self._is_told = True
            logger.info("%s: columns that are not read: %s", uri, ", ".join(unread[:_SHOWN]))
        return found

    def locate(self, names: Sequence[str], found: dict[str, int]) -> dict[str, int]:
        """Return `found` with image_uri: without that name, the one column with a name that other programs give it."""
        if "image_uri" in found or (position := self.guess_location(names)) is None:
            return found
        if not self._is_located:
            self._is_located = True
            other = assign("image_uri", "NAME", self._setting)
            logger.info("the column %s of the list names the images; --set %s chooses another", names[position], other)
        return found | {"image_uri": position}

    def guess_location(self, names: Sequence[str]) -> int | None:
        """Return the position of the one column that has a name such as path; None for no such column or several."""
        if "image_uri" in self._chosen or not self._can_choose:
            return None
        likely = [position for position, name in enumerate(names) if normalize(name) in _LOCATIONS]
        return likely[0] if len(likely) == 1 else None

    def check_met(self, uri: str) -> None:
        """Raise a ManifestError if no record of a list had a column that was chosen."""
        if self._met and (absent := [known for known in self._chosen if known not in self._met]):
            raise ManifestError(
                f"{self._setting}.{absent[0]} is {self._chosen[absent[0]]!r}; no record of {uri} has it"
            )

    def suggest(self, names: Sequence[str]) -> str:
        """Return the end of a message: the setting that names the column with the locations, ready to copy."""
        if not self._can_choose:
            return ""
        by_name = {normalize(name): name for name in reversed(names)}
        likely = next((by_name[name] for name in _LOCATIONS if name in by_name), None)
        if likely is None and (near := difflib.get_close_matches("image_uri", by_name, 1, 0.7)):
            likely = by_name[near[0]]
        word = assign("image_uri", likely, self._setting) if likely else f"{self._setting}.image_uri=NAME"
        return f": --set {word}" + ("" if likely else " names its column")

    def read(self, cells: Sequence[Any], found: Mapping[str, int], where: str) -> Row:
        """Return the values of a row by the names of known columns; absent cells are None.

        Raises:
            ManifestError: a text that stands for a list is none; `where` names the row in the message.
        """
        row = {known: self._value(cells[position]) for known, position in found.items() if position < len(cells)}
        for name in ("prompt", "prompts"):
            if isinstance(text := row.get(name), str):
                row[name] = parse_texts(text, where)
        return row

    def _value(self, cell: Any) -> Any:
        """Return the value of a cell: None for a missing one, and text for bytes, as some writers store text."""
        if isinstance(cell, bytes):
            cell = cell.decode("utf-8", "surrogateescape")
        if isinstance(cell, str) and cell in _MISSING:
            self._missing[cell] += 1
            return None
        return None if isinstance(cell, float) and cell != cell else cell

    def report(self, uri: str) -> None:
        """Log how many cells were read as missing because of their text."""
        for text, count in self._missing.items():
            logger.warning("%s: %r stands in %d cells: it is read as no value", uri, text, count)


def _join(known: set[str]) -> str:
    names = [name for name in KNOWN if name in known]
    return ", ".join([*names, *sorted(name.removeprefix(CARRIED) for name in known if name.startswith(CARRIED))])


def normalize(name: str) -> str:
    """Return a column's name in the form in which names are compared."""
    return re.sub(r"[\s\-]+", "_", name.strip(" \t\r\n\ufeff\xa0").casefold())


def assign(known: str, name: str, setting: str = "columns") -> str:
    """Return the word for --set that says which column of a list has a meaning, as a shell takes it."""
    return shlex.quote(f"{setting}.{known}={name if _is_plain(name) else json.dumps(name, ensure_ascii=False)}")


def _is_plain(name: str) -> bool:
    """Return whether a name without quotes is the same text in YAML."""
    try:
        return bool(re.fullmatch(r"[\w .\-]+", name)) and parse_yaml(f"x: {name}\n", "a name") == {"x": name}
    except VlsmError:
        return False


def parse_texts(text: str, where: str) -> str | list[str]:
    """Return the texts of a list that is written as text, as pandas writes a column of lists; else the text itself.

    Read are JSON, lists and tuples of Python, and arrays as numpy prints them: ["a", "b"], ['a', 'b'], ['a' 'b'].

    Raises:
        ManifestError: a text in brackets or braces, or one that begins with a bracket and a quote, is not such a list.
    """
    inner = text.strip()
    if not (_LIST_START.match(inner) or inner[:1] + inner[-1:] in ("[]", "{}")):
        return text
    texts = _read_list(inner)
    if texts is None:
        raise ManifestError(
            f"{where}: the prompt {shorten(text)} looks like a list but is none; write a list as "
            '["polyp", "flat polyp"], and a prompt with brackets as ["[a prompt]"]'
        )
    if not all(map(str.strip, texts)):
        raise ManifestError(f"{where}: prompts are {shorten(texts)}; they must be one text or a list of texts")
    return texts


def _read_list(inner: str) -> list[str] | None:
    try:
        texts = parse_json(inner, "the list", ManifestError)
    except ManifestError:
        if inner[0] + inner[-1] not in ("[]", "()"):
            return None
        literals = _QUOTED.findall(inner)
        between = _QUOTED.sub("", inner[1:-1])
        # Python would join 'a' 'b' to one text; numpy prints two items like this.
        if between.strip(", \t\r\n") or between.count(",") not in (0, len(literals) - 1, len(literals)):
            return None
        try:
            texts = [ast.literal_eval(literal) for literal in literals]
        except (ValueError, SyntaxError):
            return None
    is_list = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    return texts if is_list else None


def shorten(value: Any) -> str:
    """Return the repr of a value, cut to about 100 characters, for messages."""
    text = repr(value)
    return text if len(text) < 120 else f"{text[:100]}... ({len(text):,} characters)"
