"""The `file_name` of images in a COCO file, and in the files of other tools."""

import hashlib
import itertools
import logging
import posixpath
import re
from collections.abc import Iterable

from vlsm import storage
from vlsm.export.folder import INDEX_NAME
from vlsm.export.naming import MAX_NAME_BYTES, path_key
from vlsm.images.formats import split_selector

logger = logging.getLogger("vlsm")


class FileNames:
    """Gives each image a `file_name` that leads to its file and that no importer takes for another one's.

    The rule:

    - An image that is a file has the path of the file below `folder`. This is INPUT, or the folder of INPUT if INPUT
      is a list, an archive, a glob or an image. If not all images lie there, it is the deepest folder with all images.
      In a store, `folder` is a prefix: copy it to a disk, and the names are paths below the copy.
    - A member of a tar or zip has the path of the archive, then its own: `a.tar/b/c.png`, as if the archive were
      unpacked into a folder of this name.
    - A frame, page, slice or row has the path of its file, with "_" for all dots, and the selector:
      `b/loop_dcm_frame_3.png` for `b/loop.dcm#frame=3`. No such file exists, but other tools can be given one.

    Importers compare names without the text behind the last dot, and some ignore case. If two files differ only there,
    as `a.png` and `a.jpg`, the second name starts with "./". It leads to the same file. Names that lead to no file have
    a digest instead.

    Args:
        uris: the image_uri of all images of a run.
        input_uri: INPUT of the run.

    Attributes:
        folder: the folder that the names start from.
        num_repeated: number of names that start with "./".
        num_made_up: number of names that lead to no file.
    """

    def __init__(self, uris: Iterable[str], input_uri: str) -> None:
        common = _common_folder(uris)
        given = _split(re.split(r"[*?\[]", input_uri)[0])
        starts = [start for start in (given, given[:-1]) if start and start == common[: len(start)]]
        self._folder = starts[0] if starts else common
        self._taken: set[int] = set()
        self.num_repeated = self.num_made_up = 0

    @property
    def folder(self) -> str:
        """The folder that the names start from."""
        return "/".join(self._folder) or "/"

    def report(self) -> None:
        """Log where the names start, and which ones need attention."""
        logger.info("file_name starts from %s", self.folder)
        if self.num_made_up:
            logger.info(
                "%d images are inside of other files or have impossible names; %s maps their file_name to them",
                self.num_made_up,
                INDEX_NAME,
            )
        if self.num_repeated:
            logger.warning(
                "%d images differ from another one only behind the last dot, or in case; their file_name starts with "
                "'./'; a tool that removes it takes both for one image",
                self.num_repeated,
            )

    def name(self, uri: str, selector: str | None) -> str:
        """Return the `file_name` of an image. Call it once for each image."""
        member, inner = split_selector(uri, selector)
        if member and re.fullmatch(r"\w+=\d+", member):  # a row of a table is no file
            member, inner = None, f"{member}_{inner}" if inner else member
        parts = [*_split(uri)[len(self._folder) :], *(member or "").split("/")]
        parts[0] = parts[0].rpartition("://")[2]  # images of several stores: the names start with the bucket
        safe = [part for part in parts if part not in ("", ".", "..")]
        if inner is not None:
            safe[-1:] = [re.sub(r"[^\w-]+", "_", f"{safe[-1] if safe else ''}_{inner}") + ".png"]
        name = "/".join(map(_shorten, safe))
        is_file = inner is None and name == "/".join(part for part in parts if part not in ("", "."))
        while (key := hash(path_key(posixpath.splitext(name)[0]))) in self._taken:
            stem, ending = posixpath.splitext(name)
            digest = hashlib.sha256(f"{uri}#{selector}#{name}".encode()).hexdigest()[:16]
            name = f"./{name}" if is_file else f"{stem}~{digest}{ending}"
        self._taken.add(key)
        self.num_repeated += name.startswith("./")
        self.num_made_up += not is_file
        return name


def _shorten(name: str) -> str:
    """Return the name of a file or folder, cut with a digest if no file system accepts its length."""
    if len(name.encode()) <= MAX_NAME_BYTES:
        return name
    stem, ending = posixpath.splitext(name)
    ending = f"~{hashlib.sha256(name.encode()).hexdigest()[:16]}{ending if len(ending) < 10 else ''}"
    return stem.encode()[: MAX_NAME_BYTES - len(ending.encode())].decode(errors="ignore") + ending


def _split(uri: str) -> list[str]:
    """Return the parts of a location: ["", "data", "a.png"] or ["s3://bucket", "a.png"], without a query."""
    scheme, path = storage.split_scheme(uri)
    if scheme in ("file", "local"):
        return posixpath.normpath(path).split("/") if path else []
    if scheme in ("http", "https"):
        path = re.split(r"[?#]", path)[0]
    bucket, *parts = path.rstrip("/").split("/")
    return [f"{scheme}://{bucket}", *parts]


def _common_folder(uris: Iterable[str]) -> list[str]:
    """Return the parts of the deepest folder that holds all files."""
    common: list[str] | None = None
    for uri in uris:
        folder = _split(uri)[:-1]
        if common is None:
            common = folder
        elif folder[: len(common)] != common:
            pairs = zip(common, folder, strict=False)
            common = [part for part, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return common or []
