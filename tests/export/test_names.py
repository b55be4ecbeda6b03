"""Names of exported files: different for each row, on every file system, and short enough."""

import itertools
import unicodedata

import pytest

from vlsm.export.folder import ExportFolder
from vlsm.export.naming import relative_path

LONG = "/".join("f" * 200 for _ in range(40))


def ids(*image_ids):
    return [(image_id, "p") for image_id in image_ids]


def prompts(*texts):
    return [("a", text) for text in texts]


# rows (image_id, prompt, kind) that share a file in one way or another
TWINS = {
    "a dot": [("a", "b"), ("a.b", "")],
    "a kind": [("a.x", "member_1"), ("a", "x", "member 1"), ("a", "x member_1"), ("a.x", "labels")],
    "punctuation": prompts("b c", "b_c", "b.c", "b,c", "b  c", "b_c ", "", "b-c"),
    "case": [*ids("A.png", "a.png", "a.PNG", "STRASSE", "straße"), ("a.png", "P")],
    "case of prompts": prompts("Polyp", "polyp", "POLYP"),
    "case of folders": ids("A/x.png", "a/x.png"),
    "normal forms": ids(*(unicodedata.normalize(form, "é한.png") for form in ("NFC", "NFD"))),
    "normal forms of prompts": prompts(*(unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))),
    "trailing dots and spaces": ids("a/x", "a./x", "a /x", "a../x", "a_/x", ".../x", "_/x"),
    "names of devices": ids("con", "_con", "CON/x", "_CON/x", "lpt1.png", "com¹", "con .png"),
    "characters that Windows refuses": ids(*(f"a{character}" for character in '\\:*?"<>|_\n\x7f\x85')),
    "folders and dots": ids("a/b", "a//b", "a/./b", "a/../b", "/a/b", "a/b/", "../a/b"),
    "equal names in folders": ids("x/a.png", "y/a.png", "a.png"),
    "nothing": [*ids("", "/", "..", "_"), ("p", "")],
    "length": [*ids("n" * 300, "n" * 301, "n" * 255), ("n" * 300, "p" * 200), ("n" * 300, "p" * 201)],
    "bytes": [*ids("한" * 120, "한" * 121, "🫀" * 60), ("한" * 120, "한" * 90), ("한" * 120, "한" * 91)],
    "long folders": ids(f"{LONG}/a", f"{LONG}/b", f"{LONG}g/a", f"{'한' * 90}/a", f"{'한' * 91}/a"),
    "a file and a folder": ids("a", "a.p.png/x", "a.p.PNG/x", "index.csv/x", "coco.json/x"),
}


def make_row(image_id, prompt, kind="mask"):
    return {"image_id": image_id, "prompt": prompt, "kind": kind}


@pytest.mark.parametrize("twins", TWINS.values(), ids=TWINS)
@pytest.mark.parametrize("suffix", [".png", ".nii.gz", ".seg.dcm"])
def test_different_rows_have_different_files_everywhere(tmp_path, twins, suffix):
    folder = ExportFolder(tmp_path / "x")
    paths = [folder.path(make_row(*row), suffix) for row in twins]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")  # the file system of this machine accepts it
        parts = path.relative_to(tmp_path / "x").parts
        assert len("/".join(parts).encode()) < 1024
        for part in parts:
            assert len(part.encode()) <= 255
            assert unicodedata.is_normalized("NFC", part)
            assert part == part.rstrip(". ")
            assert not set(part) & set('\\:*?"<>|\n')
            assert part.split(".")[0].lower() not in ("con", "lpt1", "com¹")
    told = [unicodedata.normalize("NFD", str(path)).casefold() for path in paths]
    assert len(set(told)) == len(twins)
    assert not any(first.startswith(f"{second}/") for first, second in itertools.permutations(told, 2))
    assert len({relative_path(make_row(*row), suffix) for row in twins}) == len(twins)
    assert paths[0] == tmp_path / "x" / relative_path(make_row(*twins[0]), suffix)


def test_an_escaped_name_cannot_be_taken_by_another_row():
    escaped = relative_path(make_row("a:b", "p"), "").removesuffix(".p")
    prompt = relative_path(make_row("a", "b c"), "").removeprefix("a.")
    assert escaped.startswith("a_b~")
    assert relative_path(make_row(escaped, "p"), "") != f"{escaped}.p"
    assert relative_path(make_row("a", prompt), "") != f"a.{prompt}"


@pytest.mark.parametrize(
    ("row", "suffix", "name"),
    [
        (("a/b.png", "polyp"), ".png", "a/b.png.polyp.png"),
        (("IMG_0001.JPG", "polyp"), ".png", "IMG_0001.JPG.polyp.png"),
        (("a.png", "polyp", "member 12"), ".png", "a.png.polyp.member_12.png"),
        (("a.png", "", "labels"), ".png", "a.png.labels.png"),
        (("s.zip#a/b.nii", "дом-1"), ".nii.gz", "s.zip#a/b.nii.дом-1.nii.gz"),
        (("loop.dcm", "", None), ".seg.dcm", "loop.dcm.seg.dcm"),
    ],
)
def test_usual_rows_have_plain_names(row, suffix, name):
    assert relative_path(make_row(*row), suffix) == name
