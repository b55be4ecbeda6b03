"""The presence of a model that computes it, on its way from the model into rows, reviews and results."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import vlsm
from tests.segmentation.test_predictor import make_settings, segment
from tests.tiny import save_tiny_sam3
from vlsm.config import ReviewSettings
from vlsm.images.windows import plan_windows
from vlsm.segmentation.image_rows import review_reasons
from vlsm.segmentation.masks import MaskRecord
from vlsm.segmentation.presence import join_presence

PROMPTS = ("polyp", "lesion")
NOISE = 1e-3  # of floats, grown as below


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """SAM 3 with presence, for squares of 64 pixels."""
    folder = tmp_path_factory.mktemp("sam3")
    torch.manual_seed(0)
    model = vlsm.build_model("sam3", source=str(save_tiny_sam3(folder / "hub")), image_size=64, presence=True).eval()
    with torch.no_grad():  # so small a model hardly tells images apart: its differences grow, from probabilities of 0.5
        last = model.detr_decoder.presence_head.layer3
        last.weight *= 300
        last.bias.zero_()
        features = model.encode_images(torch.zeros(1, 3, 64, 64)), model.encode_prompts(["polyp"])
        seen = []
        last.register_forward_hook(lambda module, args, output: seen.append(output))
        model.decode_with_presence(*features)
        last.bias -= seen[-1].flatten()
    vlsm.save_checkpoint(model, folder / "checkpoint", prompt="polyp")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three images, of which the last has the bytes of the first, and one that is none."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, size in (("a.png", (64, 64)), ("b.png", (80, 70))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "twin.png").write_bytes((folder / "a.png").read_bytes())
    return folder


def presence_of(checkpoint, image, texts):
    """The presence of the whole image, in the steps of the contract."""
    model = vlsm.load_checkpoint(checkpoint).model.eval()
    square = model.image_spec.square.resize_image(image)
    with torch.no_grad():
        features = model.encode_images(model.image_spec.normalize(torch.from_numpy(square.copy())[None]))
        pairs = [model.decode_with_presence(features, model.encode_prompts([text]))[1] for text in texts]
    return torch.cat(pairs).sigmoid().numpy()


@pytest.mark.parametrize(
    ("members", "weights", "expected"),
    [
        ([[[0.2, 0.8]]], [1], [0.8, 0.8]),  # the highest of two windows
        ([[[0.2, 0.8], [0.4, 0.1]]], [1], [0.6, 0.6]),  # the mean of two texts
        ([[[0.2]], [[0.8]]], [1, 3], [0.65, 0.2, 0.8]),
        ([[[0.2]], None], [1, 3], [0.2, 0.2, None]),  # a member whose model computes none says nothing
        ([None], [2], [None, None]),
    ],
)
def test_values_of_windows_texts_and_members_are_joined(members, weights, expected):
    arrays = [None if member is None else np.array(member, np.float32) for member in members]
    assert join_presence(arrays, weights) == [value if value is None else pytest.approx(value) for value in expected]


@pytest.mark.parametrize("finish", ["cpu", "device"])
def test_each_row_has_the_presence_of_its_image_and_prompt(folder, checkpoint, finish):
    batch, rows = segment(folder, make_settings([checkpoint], finish), PROMPTS)
    assert bool(batch.masks) == (finish == "device")
    for position, name in ((0, "a.png"), (1, "b.png"), (3, "a.png")):
        expected = presence_of(checkpoint, np.asarray(Image.open(folder / name)), PROMPTS)
        assert abs(expected[0] - expected[1]) > 5e-3
        assert [row.presence for row in rows[position]] == pytest.approx(expected, abs=NOISE)
    assert {*rows} == {0, 1, 3}


@pytest.mark.parametrize("finish", ["cpu", "device"])
@pytest.mark.parametrize("label_maps", [False, True])
def test_windows_texts_and_members_have_one_presence(folder, checkpoint, bright_checkpoint, finish, label_maps):
    options = {"tile": {"size": 64}, "classes": {"lesion": ["a lesion", "flat"]}, "member_rows": True}
    settings = make_settings([bright_checkpoint, checkpoint], finish, label_maps=label_maps, **options)
    _, rows = segment(folder, settings, PROMPTS)
    image = np.asarray(Image.open(folder / "b.png"))
    windows = [window.cut(image) for window in plan_windows((80, 70), settings.tile)]
    assert len(windows) == 4
    values = np.array([presence_of(checkpoint, window, ["polyp", "a lesion", "flat"]) for window in windows]).max(0)
    polyp, lesion = (pytest.approx(value, abs=NOISE) for value in (values[0], values[1:].mean()))
    # the combined mask, the member without a presence, the member with one; then the label map
    expected = [polyp, None, polyp, lesion, None, lesion] + [None] * label_maps
    assert [row.presence for row in rows[1]] == expected


@pytest.mark.parametrize("finish", ["cpu", "device"])
def test_a_mirrored_member_has_the_mean_presence(folder, checkpoint, finish):
    settings = make_settings([checkpoint], finish)
    (member,) = settings.members
    _, rows = segment(folder, settings.model_copy(update={"members": (member.model_copy(update={"flip": True}),)}))
    image = np.asarray(Image.open(folder / "a.png"))
    values = [presence_of(checkpoint, each, ["a"])[0] for each in (image, image[:, ::-1])]
    assert rows[0][0].presence == pytest.approx(np.mean(values), abs=NOISE)


def test_other_models_have_none(folder, bright_checkpoint):
    for finish in ("cpu", "device"):
        _, rows = segment(folder, make_settings([bright_checkpoint], finish))
        assert {row.presence for own in rows.values() for row in own} == {None}


@pytest.mark.parametrize(
    ("presence", "area_px", "minimum", "expected"),
    [
        (0.2, 9, 0.5, "low presence"), (0.5, 9, 0.5, None), (0.2, 0, 0.5, None), (None, 9, 0.5, None),
        (0.2, 9, None, None),
    ],
)  # fmt: skip
def test_a_mask_of_little_presence_is_for_review(presence, area_px, minimum, expected):
    record = MaskRecord("", area_px, area_px / 100, None, None, presence=presence)
    assert review_reasons(record, ReviewSettings(min_presence=minimum)) == expected


@pytest.mark.parametrize("finish", ["cpu", "device"])
def test_runs_review_by_presence(folder, checkpoint, finish):
    _, rows = segment(folder, make_settings([checkpoint], finish, threshold=0.01, review={"min_presence": 1}))
    assert all(row.area_px and row.review == "low presence" for own in rows.values() for row in own)


def test_a_segmentation_has_the_presence(folder, checkpoint):
    image = np.asarray(Image.open(folder / "b.png"))
    expected = presence_of(checkpoint, image, PROMPTS)
    segmenter = vlsm.Segmenter(vlsm.load_checkpoint(checkpoint), "cpu", batch_size=1)
    both = segmenter.segment(image, PROMPTS)
    assert both.presence == pytest.approx(expected, abs=NOISE)
    assert both[1].presence == segmenter.segment(image, "lesion").presence == pytest.approx(expected[1], abs=NOISE)
    assert pickle.loads(pickle.dumps(both)).presence == both.presence  # noqa: S301 - our own


def test_a_segmentation_of_other_models_has_no_presence(bright_checkpoint):
    mask = vlsm.Segmenter(vlsm.load_checkpoint(bright_checkpoint), "cpu").segment(np.zeros((8, 8, 3), np.uint8))
    assert (mask.presence, mask.presences) == (None, ())


@pytest.mark.nightly  # tracing takes most of a minute
def test_a_compiled_model_has_the_same_presence(folder, checkpoint, monkeypatch):
    from tests.models.test_compiling import eager_compiler

    eager_compiler(monkeypatch)
    torch.compiler.reset()
    images = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    texts = [["polyp"], ["lesion", "polyp"], ["flat"]]
    plain, compiled = (
        vlsm.Segmenter(vlsm.load_checkpoint(checkpoint), "cpu", 2, compile=is_compiled) for is_compiled in (False, True)
    )
    for one, other in zip(compiled.predict(images, texts), plain.predict(images, texts), strict=True):
        np.testing.assert_allclose(one.logits, other.logits, atol=1e-4)
        np.testing.assert_allclose(one.presence, other.presence, atol=NOISE)
    assert compiled.network.is_compiled
