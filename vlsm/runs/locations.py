"""Whole locations of the images of a run: its results show them without secrets, its plan and its lists have them."""

from collections.abc import Sequence

from vlsm import storage
from vlsm.archive.places import lies_outside
from vlsm.errors import ImageError
from vlsm.shown import public_uri

_FOLDERS = ("manifest", "inputs")  # the plan of a segment run, the lists of an evaluation
_OPEN = ("file", "local", "s3", "s3a", "gs", "gcs", "memory")  # their credentials come from the environment


class Locations:
    """Finds the whole location of an image by the one in its row. A signature may have expired since.

    The rule for lists holds for the rows too, because other people may have written them: an OUTPUT in a store names
    images of its own bucket.

    Args:
        output: OUTPUT of the run. It is read when the first location asks for it.
        allow: more places that an OUTPUT in a store may name.
    """

    def __init__(self, output: str, allow: Sequence[str] = ()) -> None:
        self._output, self._allow = output, tuple(allow)
        self._whole: dict[str, str] | None = None

    def __call__(self, uri: str) -> str:
        """Return the whole location; one without secrets stays as it is.

        Raises:
            ImageError: an OUTPUT in a store may not name it.
        """
        whole = self._find(uri)
        if lies_outside(whole, self._output, self._allow):
            message = f"{public_uri(uri)} lies outside of the bucket of OUTPUT; --allow FOLDER lets it be read"
            raise ImageError("forbidden", message)
        return whole

    def _find(self, uri: str) -> str:
        if storage.split_scheme(uri)[0].lower() in _OPEN:
            return uri
        if self._whole is None:
            self._whole = self._read()
        return self._whole.get(uri, uri)

    def _read(self) -> dict[str, str]:
        whole: dict[str, str] = {}
        for folder in _FOLDERS:
            for name in storage.list_names(storage.join(self._output, folder)):
                if name.endswith(".parquet"):
                    table = storage.read_table(storage.join(self._output, folder, name), ["image_uri"])
                    whole |= {shown: uri for uri in table["image_uri"].to_pylist() if (shown := public_uri(uri)) != uri}
        return whole
