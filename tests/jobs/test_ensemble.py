"""Several checkpoints over one archive: the same masks wherever they stand, and those that the members' own give."""

import json

import numpy as np
import pytest

import vlsm
from jobs import segment
from tests.conftest import nightly, read_mask_rows
from tests.tiny import save_tiny_clipseg
from vlsm.images.decode import decode_image
from vlsm.images.preprocess import Square

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", params=["pixel", *nightly("clipseg")])
def members(tmp_path_factory, request):
    """Two models with squares and weights of their own; the second listens where it has a tower for that."""
    import torch

    folder = tmp_path_factory.mktemp("members")
    torch.manual_seed(3)
    vlsm.save_checkpoint(vlsm.build_model("unet_d", image_size=32, width=4), folder / "cnn", prompt="polyp")
    options = {"source": str(save_tiny_clipseg(folder / "hub"))} if request.param == "clipseg" else {}
    model = vlsm.build_model(request.param, image_size=64, **options)
    vlsm.save_checkpoint(model, folder / request.param, prompt="polyp")
    return [
        {"checkpoint": str(folder / "cnn"), "weight": 2, "flip": True},
        {"checkpoint": str(folder / request.param), "prompts": {"a polyp": "flat lesion"}},
    ]


@pytest.fixture
def probabilities(members, archive):
    """Of each image, at its own size: both members', from the library alone.

    The class is the mean of two texts, one of which the second member is told otherwise.
    """
    found = {}
    segmenters = [vlsm.Segmenter(vlsm.load_checkpoint(member["checkpoint"]), device="cpu") for member in members]

    def enlarge(logits, size):
        return Square(len(logits)).enlarge_logits(logits, size)

    def predict(segmenter, image):
        pixels = segmenter.model.image_spec.square.resize_image(image)[None]
        (logits,) = segmenter.predict_logits(pixels, [["growth", "flat lesion"]])
        return 1 / (1 + np.exp(-logits))

    for path in archive.iterdir():
        image = decode_image(path.read_bytes(), "")
        first = (predict(segmenters[0], image) + predict(segmenters[0], image[:, ::-1])[..., ::-1]) / 2
        found[path.name] = [
            np.mean([1 / (1 + np.exp(-enlarge(np.log(p / (1 - p)), image.shape[:2]))) for p in texts], axis=0)
            for texts in (first, predict(segmenters[1], image))
        ]
    return found


def run(archive, output, members, *settings):
    words = [str(archive), str(output), "--set", f"members={json.dumps(members)}"]
    words += ["--set", "classes={polyp: [growth, a polyp]}"]
    assert segment.main([*words, *(word for setting in settings for word in ("--set", setting))]) == 0
    rows = read_mask_rows(output)
    assert {key[1] for key in rows} == {"polyp"}
    assert len(rows) == 6 and {row["status"] for row in rows.values()} == {"ok"}
    return {key[0]: row for key, row in rows.items()}


def dice(one, other):
    return 2 * (one & other).sum() / (one.sum() + other.sum())


@pytest.mark.usefixtures("ray_cluster")
def test_members_agree_together_and_apart(archive, members, probabilities, tmp_path, request):
    """Apart they are in processes of their own, so on Ray; together in this process, as in the tests of other runs."""
    apart = run(archive, tmp_path / "apart", members, "threshold=0.5", "run.placement=apart")
    request.getfixturevalue("in_process")
    together = run(archive, tmp_path / "together", members, "threshold=0.5")
    for name, (first, second) in probabilities.items():
        row, mean = together[name], (2 * first + second) / 3
        assert (row["mask"] != (mean >= 0.5)).mean() < 0.005  # float16, and where a probability lies on the threshold
        assert row["agreement"] == pytest.approx(dice(first >= 0.5, second >= 0.5), abs=0.01)
        assert row["confidence"] == pytest.approx(mean[mean >= 0.5].mean(), abs=0.01)
        names = [name.partition("@")[0] for name in row["model"].split(" + ")]
        assert names == ["unet_d", members[1]["checkpoint"].rpartition("/")[2]]
        np.testing.assert_array_equal(apart[name]["mask"], row["mask"])
        assert apart[name]["agreement"] == row["agreement"]
