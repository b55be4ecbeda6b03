"""A file format is one module and one line of the table."""

import io
import sys
import tarfile

import numpy as np
import pytest

from vlsm.archive.archive import open_archive
from vlsm.config import SegmentSettings, TileSettings
from vlsm.errors import ImageError
from vlsm.images import formats
from vlsm.images.formats import Format, Look, kind_of, split_selector
from vlsm.images.reader import open_images

# a film: "FILM", the number of frames, height, width, and the grey levels
MODULE = """
import numpy as np
from vlsm.errors import ImageError
from vlsm.images.grey_levels import Decoded

def sniff(head):
    return head[:4] == b"FILM"

def list_images(file, name, size_bytes, look):
    head = file.read(7)
    if not sniff(head):
        raise ImageError("corrupt", f"{name} is no film")
    return [f"still={number}" for number in range(head[4])], (head[5], head[6])

def open_images(data, name, settings):
    def decode(selector):
        pixels = np.frombuffer(data[7:], np.uint8).reshape(data[4], data[5], data[6])
        return Decoded(np.dstack([pixels[int(selector.partition("=")[2])]] * 3), "stored")
    return decode
"""


@pytest.fixture
def films(tmp_path, monkeypatch):
    """An archive of a film by its name, one without a name that tells, one in a tar, and a damaged one."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "film_format.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "code")
    line = Format((".film",), "film_format", r"still=\d+", is_sniffed=True)
    monkeypatch.setitem(formats.FORMATS, "film", line)
    folder = tmp_path / "archive"
    folder.mkdir()
    film = make_film(0)
    (folder / "a.film").write_bytes(film)
    (folder / "b").write_bytes(make_film(50))
    (folder / "c.film").write_bytes(b"no film")
    with tarfile.open(folder / "d.tar", "w") as tar:
        info = tarfile.TarInfo("e.film")
        info.size = len(film)
        tar.addfile(info, io.BytesIO(film))
    yield folder
    sys.modules.pop("film_format", None)


def make_film(level):
    stills = np.stack([np.full((8, 12), level + number, np.uint8) for number in range(3)])
    return b"FILM" + bytes(stills.shape) + stills.tobytes()


def test_an_added_format_is_listed_and_decoded_everywhere(films):
    rows = list(open_archive(str(films), ("polyp",)).rows)
    names = [row["image_id"] for row in rows]
    stills = ["still=0", "still=1", "still=2"]
    assert names == [*(f"a.film#{s}" for s in stills), *(f"b#{s}" for s in stills), "c.film", *(
        f"d.tar#e.film#{s}" for s in stills)]  # fmt: skip
    assert rows[6]["problem"] == f"corrupt: {films}/c.film is no film"
    settings = SegmentSettings(input="", output="", members=[{"checkpoint": "x"}])
    levels = {}
    for number, opening in open_images(rows, settings):
        if rows[number]["problem"]:
            with pytest.raises(ImageError, match="is no film"):
                opening()
            continue
        content, frame = opening()
        pixels = content.decode(frame).pixels
        assert pixels.shape == (8, 12, 3)
        levels[names[number]] = int(pixels[0, 0, 0])
    assert [levels[name] for name in names if name in levels] == [0, 1, 2, 50, 51, 52, 0, 1, 2]


def test_an_added_format_is_cut_into_windows(films):
    look = Look(tile=TileSettings(size=8, overlap=0))
    rows = list(open_archive(str(films / "a.film"), ("polyp",), look=look).rows)
    assert [row["num_windows"] for row in rows] == [2, 2, 2]


def test_selectors_are_told_from_member_names(films):
    assert kind_of("x.FILM") == "film"
    assert split_selector("d.tar", "e.film#still=1") == ("e.film", "still=1")
    assert split_selector("d.tar", "e#other=1") == ("e#other=1", None)
