"""What each process imports: a budget of packages, since seconds of every start are imports that nobody uses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import LONG_S, rare

ROOT = Path(__file__).parents[1]
NETWORKS = {"transformers", "open_clip", "timm", "torchvision", "segmentation_models_pytorch"}
# of torch's and the networks' libraries: what only they themselves import, where they must
COMPILERS = {"sympy", "torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.tensor"}
TRAINING = {"peft", "tensorboardX", "mlflow", "wandb"}
PICTURES = {"matplotlib", "jinja2"}
SCORES = {"scipy", "scipy.optimize", "scipy.stats"}
READERS = {"pydicom", "nibabel", "highdicom"}
NOTHING_HEAVY = (
    {"torch", "ray", "pandas", "pyarrow.dataset"} | NETWORKS | COMPILERS | TRAINING | PICTURES | SCORES | READERS
)


TELL = "import json, sys; print(json.dumps([name for name in sys.modules if sys.modules[name]]))"


def modules_after(code, **environment):
    """The modules of a new process that has run this code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{TELL}"],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=LONG_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_what_fetches_writes_plans_checks_and_tells_imports_nothing_heavy():
    jobs = "segment segment_pipeline segment_tasks segment_actor train evaluate sweep verify status demo".split()
    parts = "runs.lifecycle training.run datasets.inspection export.files report.forecast models.options".split()
    parts += ["datasets.__main__"]
    parts += [f"evaluation.{name}" for name in ("planning", "parts", "tables")]
    entries = [f"jobs.{name}" for name in jobs] + [f"vlsm.{name}" for name in parts]
    assert not modules_after(f"import {', '.join(entries)}") & NOTHING_HEAVY


def test_the_library_shows_its_public_names_and_imports_nothing_heavy_for_it():
    code = "import vlsm; assert dir(vlsm) == sorted(vlsm.__all__); assert 'segment' in dir(vlsm)"
    assert not modules_after(code) & NOTHING_HEAVY


def test_the_help_of_every_command_imports_nothing_heavy():
    code = """
from jobs.__main__ import load
from vlsm.commands import COMMANDS
for name in COMMANDS:
    load(name).make_parser()
"""
    assert not modules_after(code) & NOTHING_HEAVY


def test_options_of_every_model_are_checked_without_torch():
    code = """
from vlsm.models import MODELS, parse_options
required = {"openclip_seg": {"source": "x"}, "transformers_seg": {"source": "x"}, "stack": {"members": ["a", "b"]}}
for name in MODELS:
    parse_options(name, required.get(name, {}))
"""
    assert not modules_after(code) & NOTHING_HEAVY


def test_scoring_a_mask_imports_what_finds_distances_and_nothing_else():
    code = """
import numpy as np
from vlsm.evaluation.scoring import score_mask
mask = np.eye(40, dtype=np.uint8)
score_mask(mask, mask.T[::-1].copy())
"""
    modules = modules_after(code)
    assert "scipy.ndimage" in modules
    assert not modules & (NOTHING_HEAVY - {"scipy"})


@pytest.mark.nightly
def test_a_training_worker_imports_no_compiler_and_no_tracker():
    """Until it makes an optimiser: then torch imports its compiler, whatever it is for."""
    modules = modules_after("import jobs.train_worker")
    assert not modules & (NETWORKS | COMPILERS | TRAINING | PICTURES | SCORES | READERS)


def test_the_report_imports_what_draws_and_no_network():
    modules = modules_after("import vlsm.report.write")
    assert not modules & ({"torch", "ray", "matplotlib.pyplot"} | NETWORKS | COMPILERS | TRAINING | SCORES | READERS)


SEGMENT = """
import sys
sys.modules["ray"] = None
import numpy as np
import vlsm
vlsm.Segmenter(vlsm.load_checkpoint({folder!r}), device="cpu").segment(
    [np.zeros((40, 50, 3), np.uint8)], "polyp"
)
"""


@pytest.fixture
def tiny(tmp_path):
    """Write a tiny checkpoint of a model, and return its folder."""
    import vlsm
    from tests.tiny import save_tiny_sources, tiny_options

    def write(name):
        options = tiny_options(save_tiny_sources(tmp_path / "sources"))
        vlsm.save_checkpoint(vlsm.build_model(name, **options[name]), tmp_path / name, prompt="polyp")
        shutil.rmtree(tmp_path / "sources")  # a checkpoint needs nothing but itself
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("name", "needs", "may_not"),
    [
        ("unet_d", {"torch"}, NETWORKS | COMPILERS),
        rare("vlsm_b", {"transformers"}, {"open_clip", "timm", "segmentation_models_pytorch"}),
        rare("clipseg", {"transformers"}, {"open_clip", "timm", "segmentation_models_pytorch"}),
        rare("cris", {"open_clip"}, {"transformers.models.clipseg.modeling_clipseg", "segmentation_models_pytorch"}),
        rare("unet", {"segmentation_models_pytorch"}, {"transformers", "open_clip"}),
    ],
)
def test_segmenting_imports_the_libraries_of_its_model_and_no_other(tiny, name, needs, may_not):
    modules = modules_after(SEGMENT.format(folder=str(tiny(name))))
    assert needs <= modules
    found = modules & (may_not | TRAINING | READERS | {"matplotlib", "ray", "pandas", "scipy.stats"})
    assert not found  # transformers imports jinja2, for chats


@pytest.mark.ray
def test_the_processes_of_a_segment_run_import_what_they_do_and_no_more(
    ray_cluster, archive, tiny_checkpoint, tmp_path
):
    """Each stage does its work on one shard in a new process, which then tells what it has imported."""
    import numpy as np
    import ray

    from jobs.crash_watch import CrashBoard, start_board
    from jobs.segment_actor import SegmentActor
    from jobs.segment_tasks import Task, fetch_shard, write_masks
    from vlsm.config import MemberSettings, SegmentSettings
    from vlsm.runs.lifecycle import prepare_run
    from vlsm.runs.results import read_masks

    members = (MemberSettings(checkpoint=str(tiny_checkpoint)),)
    run = prepare_run(SegmentSettings(input=str(archive), output=str(tmp_path / "out"), members=members))
    files = {name: np.frombuffer(data, np.uint8) for name, data in run.members[0].files.items()}
    board = start_board(CrashBoard, {"start": 0.0})
    task = Task(run.settings, run.run_id, run.plan.id, (run.members[0].square,), False, board)
    if not run.plan.is_complete:
        from vlsm.runs.lifecycle import make_planner

        with make_planner(run) as planner:
            planner.result()

    class Process:
        def do(self, stage, batch, *words):
            import sys

            made = stage(task, *words)(batch) if isinstance(stage, type) else stage(batch, task)
            return made, set(sys.modules)

    def do(stage, batch, *words):
        process = ray.remote(num_cpus=0)(Process).remote()
        made, modules = ray.get(process.do.remote(stage, batch, *words))
        ray.kill(process)
        return made, modules

    fetched, modules = do(fetch_shard, {"shard": np.array([0]), "exists": np.array([False])})
    assert not modules & (NOTHING_HEAVY - {"ray", "pandas", "pyarrow.dataset"})  # ray.data imports the last two
    logits, modules = do(SegmentActor, fetched, [ray.put(files)], (0,), 1)
    assert "torch" in modules
    assert not modules & (NETWORKS | COMPILERS | TRAINING | PICTURES | SCORES | READERS)
    _, modules = do(write_masks, logits)
    assert not modules & (NOTHING_HEAVY - {"ray", "pandas", "pyarrow.dataset"})
    assert len(list(read_masks(str(tmp_path / "out")))) == 6


@pytest.mark.parametrize(
    ("packages", "words", "extra"),
    [
        ("matplotlib", ["jobs.train", "OUT", "--dataset", "a=IN", "--set", "model=pixel", "--dry-run"], "train"),
        (
            "peft",
            ["jobs.train", "OUT", "--dataset", "a=IN", "--set", "model=clipseg", "--set", "trainable=lora"],
            "train",
        ),
        ("highdicom", ["vlsm.export", "OUT", "files", "--format", "dicom-seg"], "dicom-seg"),
        ("contourpy", ["vlsm.export", "OUT", "files", "--format", "rtstruct"], "rtstruct"),
    ],
)
def test_a_missing_extra_is_one_sentence_that_names_the_command(tmp_path, packages, words, extra):
    hide = f"""
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *more: None if name.split(".")[0] == {packages!r} else find(name, *more)
import importlib
module, *words = {words!r}
module = importlib.import_module(module + (".__main__" if module.startswith("vlsm") else ""))
sys.exit(module.main(words))
"""
    done = subprocess.run(
        [sys.executable, "-c", hide], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=LONG_S,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    sentence = f"error: the package {packages} is not installed: uv pip install 'vlsm[{extra}]'"
    assert sentence in done.stderr.splitlines()
