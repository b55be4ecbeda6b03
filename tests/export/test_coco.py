"""COCO files that other tools import: pycocotools, torchvision, and the rules of datumaro, which CVAT uses."""

import json
import os
from collections import Counter, deque

import numpy as np
import pytest
import yaml
from pycocotools import mask as coco
from pycocotools.coco import COCO

from tests.conftest import save_square
from vlsm import export
from vlsm.export.__main__ import main
from vlsm.export.coco_names import FileNames
from vlsm.runs.results import write_part
from vlsm.segmentation.masks import encode_mask

SHAPE = 40, 60
MASK = np.zeros(SHAPE, np.uint8)
MASK[5:20, 10:30] = 1


def make_row(uri, selector=None, prompt="polyp", mask=MASK, **more):
    area = int(mask.sum())
    row = {"image_id": f"{uri}#{selector}", "image_uri": str(uri), "selector": selector, "prompt": prompt}
    row |= {"height": mask.shape[0], "width": mask.shape[1], "mask_rle": encode_mask(mask), "area_px": area}
    return row | {"kind": "mask", "confidence": 0.5 if area else None, "model": "m", "status": "ok"} | more


@pytest.fixture
def export_rows(tmp_path):
    def export_rows(rows, *words, source=tmp_path / "in", prompts=("polyp", "fold"), code=0):
        output = tmp_path / "out"
        write_part(str(output), 0, rows, "run", 0)
        config = {"input": str(source), "prompts": prompts and list(prompts)}
        record = {"config": config, "plan": {}, "planned_at": "2026-01-02T03:04:05"}
        (output / "config.yaml").write_text(yaml.safe_dump(record))
        assert main([str(output), str(tmp_path / "x"), "--format", "coco", *words]) == code
        return json.loads((tmp_path / "x" / "coco.json").read_text(encoding="utf-8"))

    return export_rows


def datumaro_items(dataset):
    """The ids that datumaro 1.13.12 gives the images of a COCO file, by the rules of its importer."""
    for image in dataset["images"]:
        name = image["file_name"]
        assert not os.path.isabs(name)
        assert ".." not in name.replace("\\", "/").split("/")
    ids = [os.path.splitext(image["file_name"])[0] for image in dataset["images"]]
    assert len(set(ids)) == len(ids), "RepeatedItemError"
    return ids


def test_torchvision_opens_the_images_with_their_masks(tmp_path, export_rows, caplog):
    from torchvision.datasets import CocoDetection

    rows, shown = [], []
    for number, name in enumerate(["a.png", "sub/a.png", "a.jpg", "A.PNG", "b c/é.png", "empty.png", "x.y.png"]):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shown.append(save_square(path, size=(40, 60 + number)))
        mask = np.zeros((40, 60 + number), np.uint8)
        mask[: 0 if name == "empty.png" else 9, number:20] = 1
        rows.append(make_row(path, mask=mask, image_id="patient-007" if number % 2 else f"case {number}"))
    dataset = export_rows(rows)
    read = CocoDetection(tmp_path / "in", str(tmp_path / "x" / "coco.json"))
    assert len(read) == len(datumaro_items(dataset)) == 7
    for number, (image, targets) in enumerate(read):
        assert image.size == (60 + number, 40)
        assert np.abs(np.asarray(image).astype(int) - shown[number]).mean() < 8  # JPEG
        assert len(targets) == (number != 5)
        if targets:
            np.testing.assert_array_equal(read.coco.annToMask(targets[0])[:9, number:20], 1)
            assert targets[0]["bbox"] == [number, 0, 20 - number, 9]
    assert [image["file_name"] for image in dataset["images"]] == [
        "a.png",
        "sub/a.png",
        "./a.jpg",
        "././A.PNG",
        "b c/é.png",
        "empty.png",
        "x.y.png",
    ]
    assert "2 images differ from another one only behind the last dot, or in case" in caplog.text


def test_pycocotools_loads_and_evaluates_it(tmp_path, export_rows, capsys):
    from pycocotools.cocoeval import COCOeval

    rows = [make_row(f"{tmp_path}/in/{name}.png", prompt=prompt) for name in "ab" for prompt in ("fold", "polyp")]
    export_rows(rows)
    truth = COCO(str(tmp_path / "x" / "coco.json"))
    results = truth.loadRes([dict(annotation) for annotation in truth.dataset["annotations"]])
    assert {"info", "licenses"} <= truth.dataset.keys()
    score = COCOeval(truth, results, "segm")
    score.evaluate()
    score.accumulate()
    score.summarize()
    assert score.stats[0] == pytest.approx(1)
    assert {category["name"]: number for number, category in truth.cats.items()} == {"polyp": 1, "fold": 2}
    for annotation in truth.anns.values():
        np.testing.assert_array_equal(truth.annToMask(annotation), MASK)
        assert annotation["area"] == coco.area(truth.annToRLE(annotation)) == 300
    capsys.readouterr()


def test_an_image_is_there_once_whatever_its_ids_and_the_order_of_rows(tmp_path, export_rows):
    rows = [
        make_row(tmp_path / "in/a.png", image_id="patient-007"),
        make_row(tmp_path / "in/b.png", image_id="patient-007", mask=0 * MASK),
        make_row(tmp_path / "in/a.png", image_id="patient-007", prompt="fold"),
    ]
    dataset = export_rows(rows)
    assert [(image["id"], image["file_name"]) for image in dataset["images"]] == [(1, "a.png"), (2, "b.png")]
    assert [(one["id"], one["image_id"], one["category_id"]) for one in dataset["annotations"]] == [
        (1, 1, 1),
        (2, 1, 2),
    ]


IMAGES = [  # (path below the folder, selector, file_name)
    ("a.png", None, "a.png"),
    ("sub/b.png", None, "sub/b.png"),
    ("loop.dcm", "frame=0", "loop_dcm_frame_0.png"),
    ("loop.dcm", "frame=1", "loop_dcm_frame_1.png"),
    ("s/loop.dcm", "frame=1", "s/loop_dcm_frame_1.png"),
    ("ct.nii.gz", "slice=0", "ct_nii_gz_slice_0.png"),
    ("ct.nii.gz", "volume=1,slice=10", "ct_nii_gz_volume_1_slice_10.png"),
    ("scan.tif", "page=2", "scan_tif_page_2.png"),
    ("data.parquet", "row=17", "data_parquet_row_17.png"),
    ("data.parquet", "row=17#frame=3", "data_parquet_row_17_frame_3.png"),
    ("single.dcm", None, "single.dcm"),
    ("s.tar", "x/y.png", "s.tar/x/y.png"),
    ("s.tar", "x/y.jpg", "./s.tar/x/y.jpg"),
    ("s.tar", "/x/z.png", "s.tar/x/z.png"),
    ("s.zip", "a/b.dcm#frame=3", "s.zip/a/b_dcm_frame_3.png"),
]


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("{}", "{}"),
        ("{}/", "{}"),
        ("{}/*.png", "{}"),
        ("{}/s*/**", "{}"),
        ("{}/list.csv", "{}"),
        ("{}/s.tar", "{}"),
        ("/elsewhere/list.csv", "{}"),
        ("s3://other/list.parquet", "{}"),
    ],
)
@pytest.mark.parametrize("root", ["/data/in", "s3://bucket/in", "https://host/in"])
def test_names_follow_the_rule(source, folder, root):
    query = "?signature=secret" if root.startswith("https") else ""
    uris = [f"{root}/{path}{query}" for path, _, _ in IMAGES]
    names = FileNames(uris, source.format(root))
    found = [names.name(uri, selector) for uri, (_, selector, _) in zip(uris, IMAGES, strict=True)]
    assert names.folder == folder.format(root)
    if not query:  # such a member would be read from a plain URI
        assert found == [name for _, _, name in IMAGES]
    assert len({os.path.splitext(name)[0].lower() for name in found}) == len(IMAGES)
    assert "secret" not in "".join(found)


@pytest.mark.parametrize(
    ("uris", "folder", "expected"),
    [
        (["/a/x/1.png", "/a/y/2.png"], "/a", ["x/1.png", "y/2.png"]),
        (["/a/x/1.png", "/b/2.png"], "/", ["a/x/1.png", "b/2.png"]),
        (["/a/../b/1.png", "/b//2.png"], "/b", ["1.png", "2.png"]),
        (["s3://one/1.png", "s3://two/1.png"], "/", ["one/1.png", "two/1.png"]),
        (["/one/1.png", "s3://one/1.png"], "/", ["one/1.png", "./one/1.png"]),
        (["/a/1.png"], "/a", ["1.png"]),
        ([], "/", []),
    ],
)
def test_images_elsewhere_have_names_below_their_common_folder(uris, folder, expected):
    names = FileNames(uris, "/lists/m.csv")
    assert (names.folder, [names.name(uri, None) for uri in uris]) == (folder, expected)


def test_names_that_lead_to_no_file_are_different_too():
    uris = ["/in/a.b.dcm", "/in/a_b.dcm", "/in/a.b_dcm", "/in/a_b_dcm_frame_1.png", *["/in/s.tar"] * 3]
    selectors = ["frame=1", "frame=1", "frame=1", None, "../x.png", "x.png", "y/../x.jpg"]
    uris += [f"/in/{'한' * 83}.dcm"] * 2 + [f"s3://in/{'k' * length}.png" for length in (300, 301)]
    selectors += ["frame=1", "frame=2", None, None]
    names = FileNames(uris, "/in")
    found = [names.name(uri, selector) for uri, selector in zip(uris, selectors, strict=True)]
    datumaro_items({"images": [{"file_name": name} for name in found]})
    assert found[3] == "./in/a_b_dcm_frame_1.png"  # the only file
    assert max(len(part.encode()) for name in found for part in name.split("/")) <= 255


def flood(mask):
    """The components of a mask as sets of pixels, by a search from pixel to pixel."""
    left, found = set(zip(*np.nonzero(mask), strict=True)), []
    while left:
        component, queue = set(), deque([left.pop()])
        while queue:
            y, x = pixel = queue.popleft()
            component.add(pixel)
            for other in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if other in left:
                    left.remove(other)
                    queue.append(other)
        found.append(frozenset((int(y), int(x)) for y, x in component))
    return Counter(found)


@pytest.mark.parametrize(
    "mask",
    [
        np.array([[1, 0], [0, 1]], np.uint8),
        np.ones((3, 4), np.uint8),
        np.ones((1, 1), np.uint8),
        np.array([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]], np.uint8),
        (np.random.default_rng(1).random((37, 53)) < 0.5).astype(np.uint8),
        (np.random.default_rng(2).random((53, 37)) < 0.6).astype(np.uint8),
    ],
    ids=["corners", "all", "pixel", "ring", "noise", "dense"],
)
def test_each_component_is_an_annotation_on_request(tmp_path, export_rows, mask):
    dataset = export_rows([make_row(tmp_path / "in/a.png", mask=mask)], "--components")
    shapes = [coco.decode(annotation["segmentation"]) for annotation in dataset["annotations"]]
    pixels = [frozenset(zip(*(axis.tolist() for axis in np.nonzero(shape)), strict=True)) for shape in shapes]
    assert Counter(pixels) == flood(mask)
    for annotation, shape in zip(dataset["annotations"], shapes, strict=True):
        ys, xs = np.nonzero(shape)
        assert annotation["area"] == shape.sum()
        assert annotation["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        assert annotation["segmentation"]["counts"] == encode_mask(shape)
        assert annotation["score"] == 0.5


def test_the_index_leads_from_names_to_images(tmp_path, export_rows):
    rows = [
        make_row(tmp_path / "in/l.dcm", f"frame={n}", image_id=f"=id {n}", confidence=float("nan")) for n in range(2)
    ]
    dataset = export_rows(rows)
    lines = (tmp_path / "x" / "index.csv").read_text().splitlines()
    assert lines[0] == "file,image_id,image_uri,selector,prompt,kind,error"
    assert lines[1:] == [f"l_dcm_frame_{n}.png,'=id {n},{tmp_path}/in/l.dcm,frame={n},,," for n in range(2)]
    assert not any("score" in annotation for annotation in dataset["annotations"])


def test_json_is_valid_where_nothing_matches(tmp_path, export_rows):
    dataset = export_rows([make_row(tmp_path / "in/a.png")], "--filter", "prompt = nothing", prompts=None, code=1)
    assert dataset == {
        "info": {
            "description": "Masks of a segment run of vlsm",
            "version": dataset["info"]["version"],
            "year": 2026,
            "date_created": "2026-01-02",
            "contributor": "",
            "url": "",
            "image_folder": str(tmp_path / "in"),
        },
        "licenses": [],
        "images": [],
        "annotations": [],
        "categories": [],
    }


def test_scripts_call_it_with_a_path(tmp_path, export_rows):
    export_rows([make_row(tmp_path / "in/a.png")])
    assert export.export_coco(str(tmp_path / "out"), tmp_path / "y") == 1
    assert export.export_coco(str(tmp_path / "out"), str(tmp_path / "z"), components=True) == 1
