"""Images that the rows of an OUTPUT in a store name: only those of its own place are read again."""

import dataclasses
import io

import numpy as np
import pytest
import yaml
from PIL import Image

from vlsm import storage
from vlsm.errors import ImageError
from vlsm.export.__main__ import main as export
from vlsm.report.__main__ import main as report
from vlsm.runs.locations import Locations
from vlsm.runs.plan import write_plan
from vlsm.runs.results import write_part
from vlsm.segmentation.masks import encode_mask


def write_output(output, uris):
    """Write a finished run over images of 3 x 4 pixels."""
    images = [{"image_id": f"{n}.png", "image_uri": uri, "prompts": ["polyp"]} for n, uri in enumerate(uris)]
    plan = dataclasses.asdict(write_plan(output, images, len(images)))
    config = {"input": "i", "output": output, "members": [{"checkpoint": "/checkpoint"}], "prompts": ["polyp"]}
    storage.write_bytes(
        f"{output}/config.yaml", yaml.safe_dump({"config": config, "plan": plan, "run_id": "r"}).encode()
    )
    mask = np.zeros((3, 4), np.uint8)
    mask[1, 1:3] = 1
    row = {"prompt": "polyp", "kind": "mask", "model": "m", "status": "ok", "height": 3, "width": 4, "confidence": 0.5}
    row |= {"mask_rle": encode_mask(mask), "area_px": 2, "bbox": [1, 1, 2, 1]}
    names = ({name: image[name] for name in ("image_id", "image_uri")} for image in images)
    write_part(output, 0, [row | name for name in names], "r", 0)


def picture():
    sink = io.BytesIO()
    Image.fromarray(np.full((3, 4, 3), 200, np.uint8)).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture
def run(tmp_path):
    """An OUTPUT in a store with an image of its own place, one of this machine, and one of another bucket."""
    (tmp_path / "secret.png").write_bytes(picture())
    uris = ["memory://own/a.png", str(tmp_path / "secret.png"), "memory://other/b.png", "memory://own/../other/b.png"]
    for uri in (uris[0], uris[2]):
        storage.write_bytes(uri, picture())
    write_output("memory://own/o", uris)
    yield "memory://own/o"
    for name in ("own", "other"):
        storage.open_uri(f"memory://{name}")[0].rm(f"/{name}", recursive=True)


def exported(folder):
    return sorted(path.name for path in folder.glob("*.png"))


def test_an_output_in_a_store_leads_nowhere_else(run, tmp_path):
    assert export([run, str(tmp_path / "e"), "--format", "overlays"]) == 1
    assert exported(tmp_path / "e") == ["0.png.polyp.png"]
    assert (tmp_path / "e" / "index.csv").read_text().count("forbidden: ") == 3
    assert report([run, str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").read_text().count("lies outside of the bucket of OUTPUT") >= 3


def test_what_is_allowed_is_read(run, tmp_path):
    allow = ["--allow", str(tmp_path), "--allow", "memory://other/"]
    assert export([run, str(tmp_path / "e"), "--format", "overlays", *allow]) == 1
    assert exported(tmp_path / "e") == [f"{n}.png.polyp.png" for n in range(3)]  # ".." stays refused
    assert report([run, str(tmp_path / "r.html"), *allow]) == 0
    assert "the bucket of OUTPUT" in (tmp_path / "r.html").read_text()


def test_an_output_on_this_machine_may_name_every_place(tmp_path):
    locations = Locations(str(tmp_path))
    for uri in ("/a.png", "s3://bucket/a.png", str(tmp_path / "b.png")):
        assert locations(uri) == uri
    with pytest.raises(ImageError, match="--allow FOLDER lets it be read"):
        Locations("s3://bucket/o")("/a.png")
