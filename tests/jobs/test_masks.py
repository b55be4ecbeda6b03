"""Masks of a run lie at the right place of every kind of picture, and each prompt has its own."""

import numpy as np
import pytest
from PIL import Image

from tests.conftest import read_mask_rows, save_square
from tests.jobs.conftest import run

pytestmark = pytest.mark.usefixtures("in_process")


def save_readable_oddities(folder):
    """Files that need care, each with its bright square in a corner of the upright picture, and where that is."""
    folder.mkdir()
    corners = {
        "two words (1) [a].png": "top left",
        "100% %20 ü ☃.png": "top right",
        "a::b#c?d&e.png": "bottom left",
        "same/name.png": "bottom right",
        "other/name.png": "top left",
    }
    for name, corner in corners.items():
        (folder / name).parent.mkdir(exist_ok=True)
        save_square(folder / name, corner=corner)
    pixels = save_square(folder / "plain.jpg", corner="top right", quality=95)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    image.rotate(90, expand=True).save(folder / "rotated.jpg", exif=exif, quality=95)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "sixteen.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "sixteen.tif")
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "palette.png")
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    transparent = np.dstack([pixels, np.zeros(pixels.shape[:2], np.uint8)])
    Image.fromarray(transparent).save(folder / "rgba.png")
    image.save(folder / "x.webp", lossless=True)
    image.save(folder / "x.bmp")
    names = "plain.jpg rotated.jpg sixteen.png sixteen.tif palette.png cmyk.jpg rgba.png x.webp x.bmp"
    return corners | dict.fromkeys(names.split(), "top right")


def test_readable_oddities_get_their_mask_in_the_right_place(bright_checkpoint, tmp_path, capfd):
    corners = save_readable_oddities(tmp_path / "odd")
    Image.new("RGB", (1, 1), "white").save(tmp_path / "odd" / "pixel.png")
    code, summary, _ = run(capfd, tmp_path / "odd", tmp_path / "out", "--checkpoint", bright_checkpoint)
    assert (code, summary["failed"], summary["ok"]) == (0, 0, len(corners) + 1)
    rows = {image_id: row for (image_id, _), row in read_mask_rows(tmp_path / "out").items()}
    assert set(rows) == {*corners, "pixel.png"}
    assert rows["pixel.png"]["mask"].tolist() == [[1]]
    for name, corner in corners.items():
        mask = rows[name]["mask"]
        assert mask.shape == (60, 90), name
        expected = save_square(tmp_path / "expected.png", corner=corner)[..., 0] > 128
        overlap = ((mask == 1) & expected).sum() / ((mask == 1) | expected).sum()
        assert overlap > 0.6, (name, overlap)


def test_clipseg_gives_each_prompt_a_mask_of_its_own(archive, tmp_path, capfd):
    import vlsm
    from tests.tiny import save_tiny_clipseg
    from vlsm.images.decode import decode_image

    model = vlsm.build_model("clipseg", source=str(save_tiny_clipseg(tmp_path / "hub")), image_size=64)
    vlsm.save_checkpoint(model, tmp_path / "ck", prompt="polyp")
    prompts = ["polyp", "a round lesion of the left"]
    words = [archive, tmp_path / "out", "--checkpoint", tmp_path / "ck", "--set", f"prompts={prompts}"]
    code, summary, err = run(capfd, *words, "--set", "threshold=0.45")
    assert (code, summary["ok"], summary["rows"]) == (0, 6, 12), err
    segmenter = vlsm.Segmenter(vlsm.load_checkpoint(tmp_path / "ck"))
    rows = read_mask_rows(tmp_path / "out")
    for path in archive.iterdir():
        expected = segmenter.segment([decode_image(path.read_bytes(), "x")], prompts, threshold=0.45)[0]
        for prompt, mask in zip(prompts, expected, strict=True):
            assert (rows[path.name, prompt]["mask"] != mask).mean() < 0.01  # logits travel as float16
    assert any(
        (rows[path.name, prompts[0]]["mask"] != rows[path.name, prompts[1]]["mask"]).any() for path in archive.iterdir()
    )
