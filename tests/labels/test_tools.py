"""Round trips through the libraries of Label Studio and CVAT (label-studio-sdk, datumaro) and of GeoJSON.

They need other versions of our dependencies, so they live in another environment, whose Python VLSM_TOOLS_PYTHON names:
`uv venv tools && uv pip install --python tools/bin/python label-studio-sdk datumaro geojson shapely pycocotools`.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import LONG_S
from vlsm.segmentation.masks import encode_mask

TOOLS = os.environ.get("VLSM_TOOLS_PYTHON")


@pytest.mark.nightly
@pytest.mark.skipif(not TOOLS, reason="VLSM_TOOLS_PYTHON names no Python with label-studio-sdk and datumaro")
def test_the_tools_read_our_files_and_we_read_theirs(run, capsys):
    rows = [
        {"image_id": image_id, "prompt": prompt, "size": list(mask.shape), "counts": encode_mask(mask)}
        for (image_id, prompt), mask in run.masks.items()
    ]
    (run.folder / "masks.json").write_text(json.dumps(rows))
    run.export("label-studio", "--polygons").rename(run.folder / "polygons")
    for format_name in ("label-studio", "cvat", "voc", "qupath"):
        run.export(format_name)
    words = [str(TOOLS), str(Path(__file__).with_name("tools.py")), str(run.folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == 0 and done.stdout.endswith("checked\n"), done.stderr[-3000:]
    for source, format_name in (("project.json", "label-studio"), ("exported/annotations", "cvat")):
        capsys.readouterr()
        run.read(run.folder / source, format_name, "--json", name=f"{format_name} tool/corrected.csv")
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (found["accepted"], found["corrected"], found["refused"]) == (len(rows), 0, 0)
