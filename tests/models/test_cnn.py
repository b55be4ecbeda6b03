import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file

import vlsm
from vlsm.errors import CheckpointError
from vlsm.images.preprocess import ImageSpec


@pytest.mark.parametrize("name", ["unet", "unetplusplus", "deeplabv3plus"])
@torch.no_grad()
def test_encoder_weights_come_from_a_local_file(name, tmp_path):
    path = tmp_path / "resnet18.safetensors"
    encoder = smp.encoders.get_encoder("resnet18", weights=None)
    save_file(encoder.state_dict(), path)
    model = vlsm.build_model(name, encoder="resnet18", encoder_weights=str(path), image_size=64)
    assert torch.equal(model.network.encoder.conv1.weight, encoder.conv1.weight)


@torch.no_grad()
def test_timms_encoders_take_local_weights_and_see_images_as_those_did(tmp_path):
    path = tmp_path / "theirs.safetensors"
    theirs = timm.create_model("convnext_atto", pretrained=False)
    save_file(theirs.state_dict(), path)
    model = vlsm.build_model("unet", encoder="tu-convnext_atto", encoder_weights=str(path), image_size=64)
    assert torch.equal(model.network.encoder.model.stem_0.weight, theirs.stem[0].weight)
    save_file(timm.create_model("vit_tiny_patch16_224", pretrained=False).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"theirs.safetensors"):
        vlsm.build_model("unet", encoder="tu-convnext_atto", encoder_weights=str(path), image_size=64)


@torch.no_grad()
def test_an_encoder_learned_with_other_statistics_keeps_them(tmp_path):
    path = tmp_path / "theirs.safetensors"
    name = "tu-tf_efficientnet_lite0.in1k"  # of mean and std 0.5
    save_file(timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict(), path)
    model = vlsm.build_model("unet", encoder=name, encoder_weights=str(path), image_size=64)
    vlsm.save_checkpoint(model, tmp_path / "checkpoint")
    restored = vlsm.load_checkpoint(tmp_path / "checkpoint").model
    assert restored.image_spec.mean == model.image_spec.mean == timm.get_pretrained_cfg(name[3:]).mean
    assert model.image_spec.mean != ImageSpec(64).mean


@torch.no_grad()
def test_logits_equal_the_librarys_own():
    model = vlsm.build_model("unet", encoder="tu-resnet10t", encoder_weights=None, image_size=64).eval()
    theirs = smp.Unet("tu-resnet10t", encoder_weights=None).eval()
    theirs.load_state_dict(model.network.state_dict())
    pixel_values = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(pixel_values, ["polyp", "lesion"]), theirs(pixel_values))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "resnet5"}, "unknown encoder 'resnet5'; did you mean resnet50"),
        ({"encoder_weights": "imagnet"}, "Wrong pretrained weights `imagnet`"),
        (
            {},
            "encoder 'resnet50' with weights 'imagenet' cannot be built: it is not a local folder, and the hub cannot",
        ),
        ({"encoder_weights": "nowhere.safetensors"}, "encoder weights 'nowhere.safetensors' cannot be loaded"),
        ({"encoder": "tu-no_such_net", "encoder_weights": None}, "cannot be built"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(options, message):
    with pytest.raises(CheckpointError) as caught:
        vlsm.build_model("unet", **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_another_encoder_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file(smp.encoders.get_encoder("resnet34", weights=None).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"other.safetensors' cannot be loaded: .*layer1.2.bn1"):
        vlsm.build_model("unet", encoder="resnet18", encoder_weights=str(path), image_size=64)


@torch.no_grad()
def test_unet_d_takes_levels_from_0_to_1_if_asked(tmp_path):
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).repeat(1, 16, 16, 1)[:, :, :, :3]
    model = vlsm.build_model("unet_d", width=4, image_size=16, normalize=False).eval()
    assert model.image_spec.normalize(images)[0, :, 0, 0].tolist() == pytest.approx([0, 0.2, 1])
    vlsm.save_checkpoint(model, tmp_path)
    restored = vlsm.load_checkpoint(tmp_path).model
    assert restored.image_spec == model.image_spec
    assert vlsm.build_model("unet_d", width=4, image_size=16).image_spec.mean == (0.485, 0.456, 0.406)
