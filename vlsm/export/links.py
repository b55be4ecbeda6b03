"""Links to the images of a run, for tools that open the images by themselves."""

import itertools
import logging
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vlsm import storage
from vlsm.errors import ConfigError
from vlsm.export.coco_names import FileNames
from vlsm.export.origins import Filters, read_settings
from vlsm.images.formats import split_selector
from vlsm.runs.carried import CARRIED, as_json
from vlsm.runs.results import check_columns, open_results, read_ok_rows, read_rows

logger = logging.getLogger("vlsm")

Row = dict[str, Any]


@dataclass(frozen=True)
class LinkPrefix:
    """The beginning of the locations of some images, and of the links to them.

    Attributes:
        location: beginning of a location, such as /data/scans/.
        link: what stands there instead, such as /data/local-files/?d=scans/.
    """

    location: str
    link: str

    @classmethod
    def parse(cls, words: str) -> "LinkPrefix":
        """Return the prefix of "FROM=TO". FROM ends at the first equals sign.

        Raises:
            ConfigError: the words do not have this form.
        """
        location, sign, link = words.partition("=")
        if not location or not sign:
            raise ConfigError(f"--link-prefix {words!r} is not of the form FROM=TO, such as s3://scans/=https://host/")
        return cls(storage.absolute(location) + "/" * location.endswith("/"), link)

    def apply(self, location: str) -> str:
        """Return the link to a location with this beginning. In a URL, the characters of the rest are escaped."""
        rest = location.removeprefix(self.location)
        is_url = "?" in self.link or self.link.startswith(("http://", "https://"))
        return self.link + (urllib.parse.quote(rest) if is_url else rest)


class ImageLinks:
    """Names and links of the images of a run. Call `name` once for each image, in the order of the rows.

    An image that is a file has its location as its link. A frame, page, slice or member has the link of its made-up
    name (see `FileNames`) in the folder of the images: a tool can be given such files. Links have no secrets, because
    the rows of a run have none.

    Args:
        output: OUTPUT of the run.
        prefixes: other beginnings of links. The longest one that fits is used.

    Attributes:
        names: the names, which importers can tell apart.
    """

    def __init__(self, output: str, prefixes: Sequence[LinkPrefix] = ()) -> None:
        # the names do not depend on the filters
        uris = (row["image_uri"] for row in read_rows(output, None, ["image_uri"]))
        self.names = FileNames(uris, read_settings(output).input)
        self._prefixes = sorted(prefixes, key=lambda prefix: -len(prefix.location))
        self._unused, self._first = list(prefixes), ""

    def name(self, row: Row) -> tuple[str, str]:
        """Return the name of an image below the folder of all images, and the link to the image."""
        name = self.names.name(row["image_uri"], row["selector"])
        member, inner = split_selector(row["image_uri"], row["selector"])
        is_file = member is None and inner is None
        location = row["image_uri"] if is_file else f"{self.names.folder.rstrip('/')}/{name.removeprefix('./')}"
        fitting = [prefix for prefix in self._prefixes if location.startswith(prefix.location)]
        self._first = self._first or location
        self._unused = [prefix for prefix in self._unused if prefix not in fitting]
        return name, fitting[0].apply(location) if fitting else location

    def report(self) -> None:
        """Warn of names that are alike, and of prefixes that no image has. Call it at the end."""
        self.names.report()
        if self._first and self._unused:
            prefixes = ", ".join(prefix.location for prefix in self._unused)
            logger.warning("--link-prefix: no link begins with %s; the first one is %s", prefixes, self._first)


def read_images(
    output: str, filters: Filters = None, limit: int | None = None, columns: Sequence[str] = ()
) -> Iterator[list[Row]]:
    """Yield the rows of each image with a mask, as `read_ok_rows` does; `limit` counts rows.

    Raises:
        ConfigError: OUTPUT has no masks, or a filter names an unknown column.
    """
    check_columns((column for column, *_ in filters or ()), open_results(output).schema)  # before a file is written
    rows = read_ok_rows(output, filters, limit, ["confidence", *columns])
    # different images may have the same image_id in a list
    for _, image_rows in itertools.groupby(rows, key=lambda row: (row["image_uri"], row["selector"])):
        yield list(image_rows)


def carried_values(row: Row, taken: Sequence[str] = ()) -> Row:
    """Return the columns of the list of a row as JSON holds them. A name that is taken gets `list_` in front."""
    return {f"list_{name}" if name in taken else name: as_json(value) for name, value in row[CARRIED].items()}
