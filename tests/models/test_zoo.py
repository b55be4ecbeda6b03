"""What holds for every model of the table, on tiny pretrained weights in the libraries' own formats."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vlsm
from tests.conftest import LONG_S, each_model
from tests.tiny import save_tiny_sources, tiny_options
from vlsm.errors import CheckpointError
from vlsm.models import MODELS
from vlsm.models.folding import fold_batch_norms
from vlsm.models.towers import Towers

PROMPTS = ["polyp", "a round lesion of the left", "!", "polyp", "small, flat: bright!"]
UNETS = ["openclip_seg+unet", "transformers_seg+unet", "sam3+unet", "cris+unet"]
CASES = [*MODELS, *UNETS, "sam3+presence"]
TOWERS = [name for name in CASES if name not in ("unet_d", "unet", "unetplusplus", "deeplabv3plus", "pixel", "stack")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return save_tiny_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def build(sources):
    options = tiny_options(sources)

    def build(case, trainable="decoder"):
        torch.manual_seed(5)
        model = vlsm.build_model(case.partition("+")[0], trainable, **options[case])
        with torch.no_grad():  # statistics as if learned
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.5, 1.5)
        return model

    return build


@pytest.fixture(scope="module")
def pixel_values():
    return torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def difference(logits, expected):
    assert expected.std() > 0
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def test_the_table_is_covered(sources):
    assert {case.partition("+")[0] for case in tiny_options(sources)} == set(MODELS)


@pytest.mark.parametrize("case", each_model(CASES))
@torch.no_grad()
def test_a_prediction_never_depends_on_its_batch_mates(build, pixel_values, case):
    model = build(case).eval()
    together = model(pixel_values, PROMPTS)
    assert together.shape == (5, 1, 64, 64)
    alone = torch.cat([model(pixel_values[index, None], [PROMPTS[index]]) for index in range(5)])
    assert difference(alone, together) < 1e-4
    order = [3, 0, 4, 2, 1]
    permuted = model(pixel_values[order], [PROMPTS[index] for index in order])
    assert difference(permuted, together[order]) < 1e-4
    others = model(pixel_values, ["a large mass", *PROMPTS[1:]])
    assert difference(others[1:], together[1:]) < 1e-4


@pytest.mark.parametrize("case", each_model(CASES))
@torch.no_grad()
def test_the_numbers_of_features_are_stated(build, pixel_values, case):
    model = build(case).eval()
    counts = len(model.encode_images(pixel_values[:1])), len(model.encode_prompts(["polyp"]))
    assert counts == (model.num_features, model.num_text_features)


@pytest.mark.parametrize("case", each_model(TOWERS))
@torch.no_grad()
def test_the_prompt_decides(build, pixel_values, case):
    one, two = build(case).eval()(pixel_values[[0, 0]], ["polyp", "a large mass"])
    assert difference(one, two) > 1e-4


@pytest.mark.parametrize("case", each_model(CASES))
@torch.no_grad()
def test_text_features_stand_for_their_prompts(build, pixel_values, case):
    model = build(case).eval()
    assert difference(model(pixel_values, model.encode_prompts(PROMPTS)), model(pixel_values, PROMPTS)) < 1e-5


@pytest.mark.parametrize("case", each_model(TOWERS))
@torch.no_grad()
def test_kept_activations_stand_for_the_towers(build, pixel_values, case):
    model = build(case).eval()
    activations = model.encode_towers(pixel_values)
    assert model.has_frozen_towers and activations
    expected = model(pixel_values, PROMPTS)
    for part in (part for part in model.modules() if isinstance(part, Towers)):
        part.image_tower.requires_grad_(False).apply(lambda module: module.register_forward_pre_hook(_forbid))
    assert difference(model(pixel_values, PROMPTS, activations), expected) == 0
    assert not model.set_trainable("lora").has_frozen_towers


def _forbid(module, args):
    raise AssertionError(f"{type(module).__name__} ran again")


@pytest.fixture(scope="module")
def segmenter(build, tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("saved"), {}

    def make(case):
        if case not in made:
            vlsm.save_checkpoint(build(case), folder / case)
            made[case] = vlsm.Segmenter(vlsm.load_checkpoint(folder / case), device="cpu", batch_size=3)
        return made[case]

    return make


@pytest.mark.parametrize("case", each_model(TOWERS))
def test_attention_maps_are_never_made(segmenter, case):
    """Fused attention needs no softmax of its own."""
    ready, called = segmenter(case), set()

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.add(str(function))
            return function(*args, **(kwargs or {}))

    images = np.zeros((2, 64, 64, 3), np.uint8)
    with Note():
        ready.predict_logits(images, [["polyp"], ["a flat lesion", "polyp"]])
    assert any("scaled_dot_product" in name for name in called)
    assert not {name for name in called if "softmax" in name or "_native_multi_head_attention" in name}


@pytest.mark.parametrize("case", each_model(CASES))
def test_a_segmenters_logits_never_depend_on_batch_mates(segmenter, case):
    ready = segmenter(case)
    images = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    prompts = [["polyp"], ["a flat lesion", "polyp", "!"], ["polyp"], ["a large mass", "polyp"]]
    together = ready.predict_logits(images, prompts)
    for index in range(4):
        (alone,) = ready.predict_logits(images[index : index + 1], prompts[index : index + 1])
        assert difference(torch.from_numpy(alone), torch.from_numpy(together[index])) < 1e-4
    with pytest.raises(CheckpointError, match="has folded the model's batch norms"):
        ready.model.train()


@pytest.mark.parametrize("case", each_model(CASES))
def test_the_probe_of_a_checkpoint_passes_where_it_was_written(segmenter, case):
    ready = segmenter(case)
    exact = ready.check_probe()
    assert exact.difference < 0.1 * exact.tolerance
    ready.precision = "bf16"
    try:
        assert ready.check_probe().difference > exact.difference
    finally:
        ready.precision = "fp32"


@pytest.mark.parametrize("case", ["clipseg", "unet_d"])
@pytest.mark.parametrize("prompts", ["ab", [], ["polyp"], ["a", "b", "c"]])
def test_there_is_one_prompt_per_image(build, pixel_values, case, prompts):
    with pytest.raises(ValueError, match="2 images but . prompts"):
        build(case)(pixel_values[:2], prompts)


@pytest.mark.parametrize("encoder", ["tu-ghostnet_050", "tu-repvit_m0_9"])
@torch.no_grad()
def test_norms_that_do_not_belong_to_one_convolution_stay(encoder):
    """timm's GhostNet taps its stem before the norm, and its RepVit sums convolutions before one."""
    model = vlsm.build_model("unet", encoder=encoder, encoder_weights=None, image_size=64).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    pixel_values = torch.randn(2, 3, 64, 64)
    expected = model(pixel_values, ["", ""])
    fold_batch_norms(model)
    assert difference(model(pixel_values, ["", ""]), expected) < 1e-4


def test_the_published_threshold_of_cris(build, tmp_path):
    for case, threshold in (("cris", 0.35), ("clipseg", 0.5)):
        vlsm.save_checkpoint(build(case), tmp_path / case)
        assert vlsm.load_checkpoint(tmp_path / case).settings.threshold == threshold


@pytest.mark.parametrize("case", each_model(CASES))
@torch.no_grad()
def test_folded_batch_norms_change_nothing(build, pixel_values, case):
    model = build(case).eval()
    expected = model(pixel_values, PROMPTS)
    fold_batch_norms(model)
    assert difference(model(pixel_values, PROMPTS), expected) < 1e-4
    left = [name for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    if case == "deeplabv3plus":  # its separable convolutions are modules of their own
        assert len(left) == 5
    else:
        # that one follows a product with the sentence
        assert left == (["neck.norm5.0"] if case.startswith("cris") else [])


@pytest.mark.parametrize("trainable", ["decoder", "lora", "all"])
@pytest.mark.parametrize("case", each_model(TOWERS))
def test_gradients_reach_what_learns_and_nothing_else(build, pixel_values, case, trainable):
    model = build(case, trainable).train()
    model(pixel_values, PROMPTS).sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    towers = {name for name, _ in model.named_parameters() if ".towers." in f".{name}"}
    adapters = {name for name in towers if "lora_" in name}
    learning = {"decoder": set(), "lora": adapters, "all": towers}[trainable]
    fixed = {name for name, _ in model.named_parameters() if name.startswith("detr_decoder.")}  # of the presence
    assert reached == {name for name, _ in model.named_parameters()} - towers - fixed | learning
    assert bool(fixed) == ("+presence" in case)
    assert bool(adapters) == (trainable == "lora")
    for part in (part for part in model.modules() if isinstance(part, Towers)):
        assert part.training == (trainable == "all")
        blocks = {re.search(r"(blocks|layers)\.\d+", name) for name, _ in part.named_parameters() if "lora_" in name}
        if trainable == "lora" and not case.startswith("cris"):  # whose attention is one pool
            assert len({found.group() for found in blocks}) == max(part.taps) + 1


@pytest.mark.parametrize("case", ["unet_d", "unet", "unetplusplus", "deeplabv3plus"])
def test_all_of_a_cnn_learns(build, pixel_values, case):
    model = build(case)
    model(pixel_values, PROMPTS).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "case", each_model(["clipseg", "biomedclipseg", "openclip_seg", "transformers_seg", "cris", "sam3", "vlsm_c"])
)
def test_lora_is_merged_in_a_checkpoint(build, pixel_values, tmp_path, case):
    model = build(case, "lora")
    with torch.no_grad():
        before = model.eval()(pixel_values, PROMPTS)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, so that training begins with the published tower
                parameter.normal_(0, 0.2)
        expected = model(pixel_values, PROMPTS)
        assert difference(expected, before) > 1e-4
        vlsm.save_checkpoint(model, tmp_path)
        restored = vlsm.load_checkpoint(tmp_path).model
        assert difference(restored(pixel_values, PROMPTS), expected) < 1e-4
        assert not any("lora" in name for name in restored.state_dict())
        assert difference(model(pixel_values, PROMPTS), expected) == 0  # the model itself goes on learning


def test_trainable_can_be_chosen_anew(build, pixel_values):
    model = build("vlsm_c", "lora").eval()
    plain = {name for name, _ in build("vlsm_c").named_parameters()}
    with torch.no_grad():
        expected = model(pixel_values, PROMPTS)
        model.set_trainable("all")
        assert difference(model(pixel_values, PROMPTS), expected) < 1e-4
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == plain
    model.set_trainable("decoder")
    assert not any(parameter.requires_grad for parameter in model.a.towers.parameters())


@pytest.mark.parametrize("case", each_model(UNETS))
@torch.no_grad()
def test_a_cnn_that_the_join_leaves_out_changes_nothing(build, pixel_values, case):
    model, plain = build(case).eval(), build(case.partition("+")[0]).eval()
    unknown = plain.load_state_dict(model.state_dict(), strict=False).unexpected_keys
    assert unknown and all(name.startswith("fusion.") for name in unknown)
    expected, joined = plain(pixel_values, PROMPTS), model(pixel_values, PROMPTS)
    assert difference(joined, expected) > 1e-4
    model.fusion.join.weight.copy_(torch.tensor([1.0, 0.0])[None, :, None, None])
    model.fusion.join.bias.zero_()
    assert torch.equal(model(pixel_values, PROMPTS), expected)
    model.fusion.join.weight[0, 1] = 1  # and all that is left out is the CNN's, which sees image and text
    (one, two), cnn = model(pixel_values[[0, 0]], PROMPTS[:2]), model(pixel_values, PROMPTS) - expected
    assert difference(cnn[:1], cnn[1:2]) > 1e-4
    assert difference(one - plain(pixel_values[:1], PROMPTS[:1]), two - plain(pixel_values[:1], PROMPTS[1:2])) > 1e-6


@pytest.mark.parametrize("case", each_model(UNETS))
@torch.no_grad()
def test_a_checkpoint_has_the_cnn(build, pixel_values, tmp_path, case):
    model = build(case).eval()
    vlsm.save_checkpoint(model, tmp_path)
    restored = vlsm.load_checkpoint(tmp_path).model
    assert torch.equal(restored(pixel_values, PROMPTS), model(pixel_values, PROMPTS))
    assert restored.options == model.options and restored.options.unet


@pytest.mark.parametrize("case", ["sam3+unet", "cris+unet"])
def test_a_side_that_the_cnn_cannot_halve_is_refused(sources, case):
    options = tiny_options(sources)[case] | {"image_size": 72}
    with pytest.raises(CheckpointError, match="UNet-D needs a multiple of 16|multiple of 32"):
        vlsm.build_model(case.partition("+")[0], **options)


LOAD = """
import sys, torch, vlsm
folder = sys.argv[1]
inputs = torch.load(f"{folder}/inputs.pt", weights_only=True)
with torch.no_grad():
    for case in inputs["cases"]:
        model = vlsm.load_checkpoint(f"{folder}/{case}").model
        torch.save(model(inputs["pixel_values"], inputs["prompts"]), f"{folder}/{case}.pt")
"""


@pytest.mark.nightly
def test_checkpoints_need_nothing_but_themselves(sources, build, pixel_values, tmp_path):
    """Saved here, moved, loaded in a new process that knows no source folder and has no network."""
    expected = {}
    for case in CASES:
        model = build(case).eval()
        vlsm.save_checkpoint(model, tmp_path / "here" / case, prompt="polyp")
        with torch.no_grad():
            expected[case] = model(pixel_values, PROMPTS)
    (tmp_path / "here").rename(tmp_path / "there")
    torch.save({"cases": CASES, "pixel_values": pixel_values, "prompts": PROMPTS}, tmp_path / "there" / "inputs.pt")
    hidden = sources.rename(sources.with_name("hidden"))
    try:
        subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "there")], check=True, timeout=LONG_S)
    finally:
        hidden.rename(sources)
    for case, logits in expected.items():
        found = torch.load(tmp_path / "there" / f"{case}.pt", weights_only=True)
        assert difference(found, logits) < 1e-5, case


def _train_in_parallel(rank, folder, options):
    torch.set_num_threads(1)
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    pixel_values = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(rank))
    for case in CASES:
        for trainable in ("decoder", "lora", "all") if case in TOWERS else ("decoder",):
            torch.manual_seed(5)
            model = vlsm.build_model(case.partition("+")[0], trainable, **options[case])
            parallel = torch.nn.parallel.DistributedDataParallel(model.train())
            learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.SGD(learning, lr=0.01)
            for step in range(2):  # parameters without a gradient fail the second forward
                parallel(pixel_values, PROMPTS[2 * step : 2 * step + 2]).mean().backward()
                assert all(parameter.grad is not None for parameter in learning), (case, trainable)
                optimizer.step()
                optimizer.zero_grad()
            total = sum(parameter.double().sum() for parameter in learning).reshape(1).detach()
            totals = [torch.zeros_like(total) for _ in range(2)]
            distributed.all_gather(totals, total)
            assert totals[0] == totals[1], (case, trainable)
    distributed.destroy_process_group()


@pytest.mark.nightly
def test_every_model_learns_in_two_processes(sources, tmp_path):
    torch.multiprocessing.spawn(_train_in_parallel, (str(tmp_path), tiny_options(sources)), nprocs=2)
