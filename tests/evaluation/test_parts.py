"""The scores of a part file of a real segment run on storage, without a job."""

import nibabel as nib
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.export.test_dicom_seg import make
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.records import NO_MASK, Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.evaluation.parts import SCORES_SCHEMA, PredictionSource
from vlsm.evaluation.settings import EvaluateSettings
from vlsm.evaluation.systems import Target
from vlsm.runs.results import write_part
from vlsm.segmentation.masks import encode_mask

SIZE = (40, 50)


def box(top, left, side=10):
    mask = np.zeros(SIZE, np.uint8)
    mask[top : top + side, left : left + side] = 1
    return mask


def volume(path, plane, spacing):
    """A NIfTI file of one axial slice that is shown as this plane, with distances (rows, columns) in mm."""
    stored = plane[::-1, ::-1].T[:, :, None]
    nib.save(nib.Nifti1Image(stored, np.diag([spacing[1], spacing[0], 1.0, 1.0])), path)
    return str(path)


@pytest.fixture
def score(tmp_path):
    """Return the scores of masks, given as pairs of a record and a mask, in one part file."""

    def score(*pairs, threshold=None, highest=(), presences=(), **given):
        settings = EvaluateSettings(output="x", datasets={"d": "x"}, checkpoints=("x",), prompts=("p1",), **given)
        rows, targets = [], {}
        for number, (record, mask) in enumerate(pairs):
            row = {"image_id": str(number), "image_uri": record.image_uri, "selector": record.image_selector}
            row |= {"prompt": "polyp", "kind": "mask", "status": "ok", "model": "m", "mask_rle": encode_mask(mask)}
            row |= {"height": SIZE[0], "width": SIZE[1], "area_px": int(mask.sum()), "area_fraction": mask.mean()}
            row |= {"max_probability": highest[number]} if highest else {}
            row |= {"presence": presences[number]} if presences else {}
            rows.append(row)
            targets[str(number)] = [Target(record, str(number), {"p1": "polyp"})]
        write_part(str(tmp_path), 0, rows, "run", 1)
        source = PredictionSource("s", str(tmp_path), "run", 1, targets, settings, threshold)
        return source.score_part(0).to_pylist()

    return score


def record(image, mask, **more):
    return Record("d", "test", f"row {image}", str(image), str(mask), {"p1": ("polyp",)}, **more)


def png(path, values):
    Image.fromarray(values).save(path)
    return str(path)


def test_each_row_has_its_lesions_and_its_surface_distance(score, tmp_path):
    label = box(0, 0) | box(20, 20)
    target = record(png(tmp_path / "i.png", label), png(tmp_path / "m.png", label * 255))
    (same, one, none) = score((target, label), (target, box(0, 3)), (target, label * 0))
    names = ("num_lesions", "num_components", "num_matched", "num_found", "num_right", "lesion_dice", "nsd", "nsd_mm")
    assert [same[name] for name in names] == [2, 2, 2, 2, 2, 1, 1, None]
    assert [one[name] for name in names[:5]] == [2, 1, 1, 1, 1] and one["lesion_dice"] == 0.35
    assert [none[name] for name in names] == [2, 0, 0, 0, 0, 0, 0, None]


def test_the_tolerance_is_that_of_the_settings(score, tmp_path):
    target = record(png(tmp_path / "i.png", box(0, 0)), png(tmp_path / "m.png", box(0, 0) * 255))
    found = [score((target, box(0, 3)), nsd_tolerance_px=tolerance)[0]["nsd"] for tolerance in (0, 2, 3)]
    assert found[0] < found[1] < found[2] == 1


def test_millimetres_are_those_of_the_file_and_absent_where_no_file_states_them(score, tmp_path):
    spacings = {"fine": (0.5, 0.5), "tall": (4.0, 0.5), "wide": (0.5, 4.0)}
    targets = [
        record(volume(tmp_path / f"{name}.nii", box(0, 0), one), tmp_path / f"{name}.nii", **selectors, labels=(1,))
        for name, one in spacings.items()
        for selectors in [{"image_selector": "slice=0", "mask_selector": "slice=0"}]
    ]
    targets.append(record(png(tmp_path / "i.png", box(0, 0)), png(tmp_path / "m.png", box(0, 0) * 255)))
    moved = box(0, 3)  # by three columns
    fine, tall, wide, plain = score(*((one, moved) for one in targets), nsd_tolerance_mm=2.0)
    assert (fine["nsd_mm"], tall["nsd_mm"], plain["nsd_mm"]) == (1, 1, None)
    assert 0 < wide["nsd_mm"] < 1
    assert fine["nsd"] == tall["nsd"] == wide["nsd"] == plain["nsd"]


@pytest.mark.parametrize(("elements", "expected"), [({"PixelSpacing": [0.4, 0.3]}, (0.4, 0.3)), ({}, None)])
def test_the_spacing_of_a_dicom_image_counts_and_that_of_a_detector_does_not(tmp_path, elements, expected):
    made = make(ImagerPixelSpacing=[9, 9], **elements)
    if not elements and "PixelSpacing" in made:
        del made.PixelSpacing
    made.save_as(tmp_path / "i.dcm", enforce_file_format=True)
    reader = ExampleReader(DatasetSettings())
    assert reader.read_spacing(record(tmp_path / "i.dcm", png(tmp_path / "m.png", box(0, 0)))) == expected


def test_earlier_columns_keep_their_names_and_order_and_new_ones_may_be_null():
    earlier = (
        "system checkpoint dataset split group record image_id image_uri selector mask_uri prompt_name prompt "
        "prompt_class status error height width dice iou precision recall hd95_px asd_px"
    ).split()
    assert SCORES_SCHEMA.names[: len(earlier)] == earlier
    for name in ("nsd", "nsd_mm", "num_lesions", "matched_iou", "lesion_dice"):
        assert SCORES_SCHEMA.field(name).nullable
    assert SCORES_SCHEMA.field("num_lesions").type == pa.int32()


def test_a_negative_record_is_scored_against_an_empty_label_of_its_images_size(score, tmp_path):
    negative = record(png(tmp_path / "i.png", box(0, 0)), NO_MASK)
    silent, marked = score((negative, box(0, 0) * 0), (negative, box(0, 0)), nsd_tolerance_mm=1.0)
    names = ("status", "mask_uri", "target_fraction", "dice", "is_present", "num_components")
    assert [silent[name] for name in names] == ["ok", "none", 0, 1, False, 0]
    assert [marked[name] for name in names] == ["ok", "none", 0, 0, True, 1]
    assert marked["area_fraction"] == 0.05


def test_a_threshold_of_presence_judges_the_highest_probability_and_not_the_mask(score, tmp_path):
    target = record(png(tmp_path / "i.png", box(0, 0)), png(tmp_path / "m.png", box(0, 0) * 255))
    pairs = [(target, box(0, 0)), (target, box(0, 0) * 0)]
    rows = score(*pairs, threshold=0.7, highest=(0.6, 0.8))
    assert [(row["is_present"], row["presence_threshold"], row["max_probability"]) for row in rows] == [
        (False, 0.7, 0.6), (True, 0.7, 0.8),
    ]  # fmt: skip
    assert [row["is_present"] for row in score(*pairs, threshold=0.7)] == [None, None]  # rows of an earlier version
    rows = score(*pairs, threshold=0.7, highest=(0.6, 0.8), presences=(0.75, 0.25))
    assert [(row["is_present"], row["presence"]) for row in rows] == [(True, 0.75), (False, 0.25)]
    assert [row["is_present"] for row in score(*pairs)] == [True, False]
