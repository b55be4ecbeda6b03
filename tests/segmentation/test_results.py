"""What `segment` returns: an array that also knows its image, its confidence and its picture."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

import vlsm
from tests.tiny import save_tiny_clipseg
from vlsm.errors import CheckpointError, ImageError
from vlsm.images.decode import decode_image
from vlsm.segmentation.masks import probabilities

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def segmenter(bright_checkpoint):
    return vlsm.Segmenter(vlsm.load_checkpoint(bright_checkpoint))


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory):
    return save_tiny_clipseg(tmp_path_factory.mktemp("hub") / "clipseg")


def test_a_list_of_arrays_gives_a_list_of_arrays_as_ever(segmenter):
    (mask,) = segmenter.segment([IMAGE], "bright", 0.6)
    assert isinstance(mask, np.ndarray) and mask.dtype == np.uint8 and mask.shape == (40, 60)
    logits = segmenter.predict_logits(segmenter.model.image_spec.square.resize_image(IMAGE)[None], [["bright"]])[0][0]
    enlarged = segmenter.model.image_spec.square.enlarge_logits(logits, (40, 60))
    np.testing.assert_array_equal(mask, probabilities(enlarged) >= 0.6)
    for derived in (mask == 1, mask + mask, mask[3:5], mask[mask > 0], np.stack([mask, mask]), np.where(mask, 1, 0)):
        assert type(derived) is np.ndarray
    assert isinstance(mask.mean(), float) and Image.fromarray(mask * 255).size == (60, 40)


def test_one_image_gives_one_result_and_many_give_a_list(segmenter, tmp_path):
    data = io.BytesIO()
    Image.fromarray(IMAGE[::2]).save(data, "PNG")
    path = tmp_path / "x.jpg"
    Image.fromarray(IMAGE).save(path)
    expected = [segmenter.segment([image])[0] for image in (IMAGE[::2], decode_image(path.read_bytes(), "x"), IMAGE)]
    several = segmenter.segment(iter([data.getvalue(), path, Image.fromarray(IMAGE)]))
    assert isinstance(several, list)
    for found, mask in zip(several, expected, strict=True):
        np.testing.assert_array_equal(found, mask)
    np.testing.assert_array_equal(segmenter.segment(str(path)), expected[1])
    assert segmenter.segment(IMAGE, ["a", "b"], allow_equal_masks=True).shape == (2, 40, 60)
    assert segmenter.segment([]) == []


def test_a_result_knows_what_it_belongs_to(segmenter):
    result = segmenter.segment(IMAGE, probabilities=True)
    np.testing.assert_array_equal(result.probability >= 0.5, result.mask == 1)
    assert type(result.mask) is np.ndarray and result.probability.dtype == np.float32
    assert result.confidence == pytest.approx(result.probability[result.mask == 1].mean(), abs=1e-6)
    assert (result.prompt, result.overlay().size, result.overlay().mode) == ("bright", (60, 40), "RGB")
    np.testing.assert_array_equal(result.image, IMAGE)
    assert segmenter.segment(IMAGE).probability is None
    empty = segmenter.segment(np.zeros((5, 9), np.uint8))
    assert empty.confidence is None and "empty" in repr(empty) and empty.overlay().size == (9, 5)


def test_each_of_several_prompts_is_a_result(segmenter):
    both = segmenter.segment(IMAGE, ["a", "b"], probabilities=True, allow_equal_masks=True)
    assert both.prompt == ("a", "b") and len(both.confidence) == 2 and both.probability.shape == (2, 40, 60)
    assert [one.prompt for one in both] == ["a", "b"]
    assert both[-1].probability.shape == both[1].shape == (40, 60)
    first, all_drawn = np.asarray(both[0].overlay()), np.asarray(both.overlay())
    assert first.shape == all_drawn.shape and (first != all_drawn).any()  # each has its own colour
    assert segmenter.segment(IMAGE, ["bright"]).prompt == ("bright",)


def test_the_overlay_tints_the_mask_alone(segmenter):
    result = segmenter.segment(IMAGE)
    changed = (np.asarray(result.overlay()) != IMAGE).any(axis=2)
    assert changed[result.mask == 1].mean() > 0.99 and not changed[result.mask == 0].any()


def test_what_is_computed_from_a_result_no_longer_belongs_to_the_image(segmenter):
    result = segmenter.segment(IMAGE)
    for derived in (result.T, result.astype(bool), result.copy()):
        with pytest.raises(AttributeError, match="computed from a segmentation"):
            derived.overlay()
        assert not hasattr(derived, "confidence") and derived._repr_html_() is None and "array(" in repr(derived)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(derived)), derived)


def test_a_result_survives_the_way_to_another_process(segmenter):
    result = segmenter.segment(IMAGE, probabilities=True)
    twin = pickle.loads(pickle.dumps(result))
    assert repr(twin) == repr(result) and twin.overlay().tobytes() == result.overlay().tobytes()
    np.testing.assert_array_equal(twin.probability, result.probability)


def test_reprs_are_one_short_line(segmenter, bright_checkpoint):
    prompts = [f"prompt {number} " + "word " * 50 for number in range(9)]
    things = [segmenter.segment(IMAGE), segmenter.segment(IMAGE, prompts, allow_equal_masks=True), segmenter]
    for thing in [*things, vlsm.load_checkpoint(bright_checkpoint)]:
        assert "\n" not in repr(thing) and len(repr(thing)) < 300
    assert "60 x 40 pixels; 'bright': " in repr(things[0]) and "6 more" in repr(things[1])
    assert "pixel@" in repr(segmenter) and "not calibrated" in repr(segmenter)


def test_a_notebook_shows_a_small_picture_and_the_prompt_as_text(segmenter):
    result = segmenter.segment(np.repeat(np.repeat(IMAGE, 30, 0), 30, 1), "<b>x</b>", allow_equal_masks=True)
    page = result._repr_html_()
    assert "<b>" not in page and "&lt;b&gt;" in page
    source = page.partition("base64,")[2].partition('"')[0]
    import base64

    assert max(Image.open(io.BytesIO(base64.b64decode(source))).size) == 640


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "one prompt or more"),
        (5, TypeError, "a text, or a list"),
        ([["a"]], TypeError, "a text, or a list"),
    ],
)
def test_prompts_that_are_none_are_refused(segmenter, prompts, error, message):
    with pytest.raises(error, match=message):
        segmenter.segment(IMAGE, prompts)


def test_wrong_input_is_named_by_its_number_before_any_work(segmenter, monkeypatch):
    monkeypatch.setattr(segmenter, "predict", lambda *args: pytest.fail("worked"))
    with pytest.raises(ValueError, match="image 2 is float64"):
        segmenter.segment([IMAGE, IMAGE / 255])
    with pytest.raises(ValueError, match=r"threshold is 50; .* such as 0\.5"):
        segmenter.segment(IMAGE, threshold=50)
    with pytest.raises(ImageError, match=r"there is no file .*no\.png"):
        segmenter.segment("no.png")


def test_one_line_segments_with_a_folder_or_a_checkpoint(bright_checkpoint, segmenter):
    expected = segmenter.segment(IMAGE)
    for source in (bright_checkpoint, str(bright_checkpoint), vlsm.load_checkpoint(bright_checkpoint)):
        np.testing.assert_array_equal(vlsm.segment(IMAGE, source), expected)
    assert vlsm.segment([IMAGE], bright_checkpoint, "Bright ", threshold=0.9, device="cpu")[0].sum() < expected.sum()


def test_a_published_clipseg_segments_without_a_checkpoint(clipseg, tmp_path, monkeypatch):
    vlsm.save_checkpoint(vlsm.build_model("clipseg", source=str(clipseg)), tmp_path / "ck")
    expected = vlsm.segment(IMAGE, tmp_path / "ck", "polyp", probabilities=True)
    monkeypatch.chdir(clipseg.parent)
    for source in (clipseg, "clipseg"):
        found = vlsm.segment(IMAGE, source, "polyp", probabilities=True)
        np.testing.assert_allclose(found.probability, expected.probability, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["ck"]
    with pytest.raises(CheckpointError, match="without a stored prompt; give a prompt"):
        vlsm.segment(IMAGE, clipseg)


def test_a_hub_id_is_loaded_from_the_hub(clipseg, monkeypatch):
    asked = []
    from vlsm.segmentation import published

    build = published.build_model
    monkeypatch.setattr(
        published, "build_model", lambda name, source: asked.append((name, source)) or build(name, source=str(clipseg))
    )
    for source in ("CIDAS/clipseg-rd64-refined", "hf-hub:CIDAS/clipseg-rd64-refined"):
        assert vlsm.segment(IMAGE, source, "polyp").shape == (40, 60)
    assert asked == [("clipseg", "CIDAS/clipseg-rd64-refined")] * 2


def test_a_source_that_is_no_model_says_what_can_be_used(tmp_path):
    with pytest.raises(CheckpointError, match="hub cannot be reached; of published models only CLIPSeg"):
        vlsm.segment(IMAGE, "some/model", "polyp")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="of published models only CLIPSeg segments without a training"):
        vlsm.segment(IMAGE, tmp_path, "polyp")
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        vlsm.segment(IMAGE, tmp_path / "nothing", "polyp")
