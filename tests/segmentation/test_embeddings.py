"""Embeddings of images: what they are, who makes them, and their way into the rows."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import vlsm
from tests.conftest import each_model
from tests.tiny import save_tiny_sources, tiny_options
from vlsm.checkpoints import read_checkpoint, read_settings
from vlsm.config import SegmentSettings
from vlsm.errors import ConfigError
from vlsm.models import BLIND, MODELS
from vlsm.models.towers import Towers
from vlsm.runs.results import read_masks, read_part, write_part
from vlsm.segmentation.embeddings import check_embedding
from vlsm.segmentation.predictor import Predictor
from vlsm.segmentation.shard import Entry, ShardBatch, Unguarded, read_shard_images

TOWERS = [name for name in MODELS if name not in (*BLIND, "stack")]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return tiny_options(save_tiny_sources(tmp_path_factory.mktemp("sources")))


@pytest.fixture(scope="module")
def checkpoint_of(options, tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def make(name):
        if name not in made:
            torch.manual_seed(5)
            made[name] = folder / name
            vlsm.save_checkpoint(vlsm.build_model(name, **options[name]), made[name], prompt="polyp")
        return str(made[name])

    return make


@pytest.fixture
def segmenter(checkpoint_of):
    return lambda name, **more: vlsm.Segmenter(vlsm.load_checkpoint(checkpoint_of(name)), device="cpu", **more)


def random_images(number, side=64):
    return np.random.default_rng(number).integers(0, 255, (number, side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", each_model(TOWERS))
@torch.no_grad()
def test_an_embedding_is_the_mean_of_the_last_patches_and_the_tower_runs_once(segmenter, name):
    ready = segmenter(name)
    model, inputs = ready.model, ready.prepare(torch.from_numpy(random_images(3)))
    expected = ready.predict_tensor(inputs, [["polyp"], ["a flat lesion", "polyp"], ["polyp"]]).logits
    calls = []
    for towers in (part for part in model.modules() if isinstance(part, Towers)):
        encode = towers.encode_images
        towers.encode_images = lambda values, encode=encode: calls.append(len(values)) or encode(values)
    (logits, _), embeddings = ready.predict_and_embed(inputs, [["polyp"], ["a flat lesion", "polyp"], ["polyp"]])
    assert calls == [3] * (2 if name == "vlsm_c" else 1)
    assert torch.equal(logits, expected)
    assert embeddings.shape == (3, model.embedding_width) and embeddings.dtype == torch.float32
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(3), atol=1e-5)
    _, alone = ready.predict_and_embed(inputs[1:2], [["another prompt"]])
    torch.testing.assert_close(alone, embeddings[1:2], atol=1e-5, rtol=1e-4)
    assert (embeddings[0] - embeddings[1]).abs().max() > 1e-4
    if name != "cris":
        towers = model.a.towers if name == "vlsm_c" else model.towers
        patches = towers.encode_images(inputs)[-1][:, towers.num_prefix_tokens :]
        assert patches.shape[1] == towers.grid**2
        mean = patches.sum(dim=1) / towers.grid**2
        torch.testing.assert_close(embeddings, mean / mean.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_embedding_of_cris_is_clips_own(options):
    model = vlsm.build_model("cris", **options["cris"]).eval()
    pixel_values = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = model.towers.visual(pixel_values)  # open_clip's forward, at the size of its positions
    embeddings = model.embed_images(model.encode_towers(pixel_values))
    assert embeddings.shape[1] == model.towers.text_width
    torch.testing.assert_close(embeddings, expected / expected.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-4)


def make_settings(*checkpoints, **changes):
    members = [{"checkpoint": str(checkpoint)} for checkpoint in checkpoints]
    tree = {"input": "", "output": "", "members": members, "embedding": True, "threshold": 0.5, "prompts": ["polyp"]}
    return SegmentSettings.model_validate(tree | changes)


def predict(folder, settings, members=None, batch=None):
    files = {number: read_checkpoint(member.checkpoint) for number, member in enumerate(settings.members)}
    squares = [read_settings(member.checkpoint).image.spec.square for member in settings.members]
    rows = [{"image_uri": str(path), "selector": None} for path in sorted(folder.iterdir())]
    texts = [settings.texts_of(settings.prompts)] * len(rows)
    if batch is None:
        entries = [Entry(position, num_texts=len(settings.prompts)) for position in range(len(rows))]
        batch = read_shard_images(ShardBatch(0, False, entries), rows, squares, settings, Unguarded())
    chosen = {number: files[number] for number in members or files}
    return ShardBatch.unpack(Predictor(settings, chosen, "cpu").predict(batch, texts, Unguarded()).pack())


def vectors_of(batch):
    return [None if entry.embedding is None else np.frombuffer(entry.embedding, np.float16) for entry in batch.entries]


@pytest.fixture
def folder(tmp_path):
    """Two equal images, a large one, and one that is none."""
    folder = tmp_path / "images"
    folder.mkdir()
    (small,) = random_images(1)
    for name in ("a.png", "b.png"):
        Image.fromarray(small).save(folder / name)
    Image.fromarray(random_images(2, 100)[1]).save(folder / "c.png")
    (folder / "d.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("finish", ["cpu", "device"])
def test_each_image_of_a_shard_gets_its_embedding_once(checkpoint_of, segmenter, folder, finish):
    settings = make_settings(checkpoint_of("clipseg"), run={"finish": finish}, prompts=["polyp", "lesion"])
    batch = predict(folder, settings)
    first, twin, large, broken = vectors_of(batch)
    assert batch.embedding_width == 32 and broken is None
    assert first.dtype == np.float16 and np.array_equal(first, twin) and not np.array_equal(first, large)
    result = segmenter("clipseg").segment(str(folder / "a.png"), "polyp", embedding=True)
    assert np.array_equal(result.embedding, first)
    assert not predict(folder, settings.model_copy(update={"embedding": False})).embedding_width


def test_the_embedding_of_a_tiled_image_is_the_mean_of_its_windows(checkpoint_of, segmenter, folder):
    batch = predict(folder, make_settings(checkpoint_of("clipseg"), tile={"size": 64, "overlap": 0}))
    assert [entry.num_windows for entry in batch.entries] == [1, 1, 4, 0]
    pixels, ready = np.asarray(Image.open(folder / "c.png")), segmenter("clipseg")
    corners = [(top, left) for top in (0, 36) for left in (0, 36)]
    windows = np.stack([pixels[top : top + 64, left : left + 64] for top, left in corners])
    _, each = ready.predict_and_embed(ready.prepare(torch.from_numpy(windows)), [["polyp"]] * 4)
    mean = each.numpy().mean(axis=0)
    np.testing.assert_allclose(vectors_of(batch)[2], mean / np.linalg.norm(mean), atol=1e-3)


def test_the_first_member_with_a_tower_makes_the_embeddings(checkpoint_of, folder, caplog):
    members = [checkpoint_of(name) for name in ("unet_d", "transformers_seg", "clipseg")]
    wanted = vectors_of(predict(folder, make_settings(members[1])))
    settings = make_settings(*members)
    together = predict(folder, settings)
    apart = None
    for number in range(3):  # one pool after the other
        apart = predict(folder, settings, [number], apart)
    for found in (together, apart):
        assert found.embedding_width == 32
        for one, other in zip(vectors_of(found)[:3], wanted[:3], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-3)
    with caplog.at_level(logging.INFO):
        check_embedding(settings, list(map(read_settings, members)))
    assert f"embeddings are those of member 2, transformers_seg ({members[1]})" in caplog.text


@pytest.mark.parametrize("name", each_model(sorted({*BLIND, "stack"})))
def test_models_without_towers_have_no_embedding(checkpoint_of, name):
    checkpoint = checkpoint_of(name)
    assert vlsm.load_checkpoint(checkpoint).model.embedding_width == 0
    with pytest.raises(ConfigError, match=f"{name} has no pretrained image tower.*set it to false"):
        check_embedding(make_settings(checkpoint), [read_settings(checkpoint)])
    check_embedding(make_settings(checkpoint, embedding=False), [read_settings(checkpoint)])
    with pytest.raises(ValueError, match=f"{name} has no pretrained image tower"):
        vlsm.segment(random_images(1)[0], checkpoint, embedding=True)


def make_row(image_id, **more):
    row = {"image_id": image_id, "image_uri": f"/{image_id}", "prompt": "polyp", "kind": "mask", "model": "m"}
    return row | {"status": "ok"} | more


def test_a_part_holds_half_precision_vectors_of_one_width(tmp_path):
    output, vector = str(tmp_path), np.array([0.6, -0.8, 0], np.float16)
    rows = [make_row("a", embedding=vector), make_row("a", prompt="lesion"), make_row("b", status="failed")]
    write_part(output, 0, rows, "r", 0, embedding_width=3)
    write_part(output, 1, [make_row("c", status="failed", error="corrupt: it is")], "r", 0, embedding_width=3)
    for number in range(2):
        stored = pq.read_schema(tmp_path / "masks" / f"part-{number:08d}.parquet").field("embedding")
        assert stored.type == pa.list_(pa.float16(), 3) and b"of length 1" in stored.metadata[b"description"]
    found = [row["embedding"] for row in read_masks(output)]
    assert [value is None for value in found] == [False, True, True, True]
    assert found[0].dtype == np.float16 and np.array_equal(found[0], vector)
    write_part(output, 0, read_part(output, 0, "r").to_pylist(), "r", 0, embedding_width=3)  # a repair keeps old rows
    assert np.array_equal(next(read_masks(output))["embedding"], vector)


def test_a_run_that_asks_for_none_has_no_such_column(tmp_path):
    write_part(str(tmp_path), 0, [make_row("a")], "r", 0)
    assert "embedding" not in pq.read_schema(tmp_path / "masks" / "part-00000000.parquet").names
    assert next(read_masks(str(tmp_path)))["embedding"] is None
