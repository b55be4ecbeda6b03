import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import LONG_S

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "vlsm").rglob("*.py"))
# what vlsm/ holds, floor by floor: each imports from lower floors only
FLOORS = (
    {"allocator", "quotes", "words"},
    {"shown"},
    {"cells", "errors", "events", "limits", "temporary", "version"},
    {"locations"},
    {"http_files", "s3_clients"},
    {"redirects", "s3_files"},
    {"stores"},
    {"storage"},
    {"documents", "hints"},
    {"config"},
    {"commands"},
    {"images"},
    {"archive", "models"},
    {"checkpoints", "datasets"},
    {"segmentation"},
    {"runs"},
    {"export", "publish", "select", "training"},
    {"calibration", "evaluation", "labels"},
    {"report"},
)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "vlsm")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_imports_no_ray_and_no_job(path):
    assert not [name for name in imported(path) if name.split(".")[0] in ("ray", "jobs")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_networks_come_in_through_the_models_only(path):
    if "models" not in path.parts:
        assert not [name for name in imported(path) if name.split(".")[0] in ("transformers", "open_clip", "timm")]


def room_of(path):
    return path.relative_to(ROOT / "vlsm").parts[0].removesuffix(".py")


def test_the_top_floor_has_the_rooms_that_are_known():
    assert {room_of(path) for path in MODULES} == {"__init__"}.union(*FLOORS)


@pytest.mark.parametrize(
    "path", [path for path in MODULES if room_of(path) != "__init__"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_imports_lead_down(path):
    """Late imports inside of functions count as well: nothing imports upwards, and there is no cycle."""
    floor = next(number for number, rooms in enumerate(FLOORS) if room_of(path) in rooms)
    allowed = {room_of(path)}.union(*FLOORS[:floor])
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("vlsm.")}
    assert rooms <= allowed, f"{sorted(rooms - allowed)} stand beside {room_of(path)} or above it"


def test_everything_but_the_jobs_works_where_ray_cannot_be_imported():
    code = """
import sys
sys.modules["ray"] = None
import vlsm, vlsm.segmentation.segmenter, vlsm.training.learner, vlsm.runs.lifecycle, vlsm.export, vlsm.models.unet_d
import vlsm.evaluation.planning
assert not [name for name in sys.modules if name.startswith("ray.")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LONG_S)
