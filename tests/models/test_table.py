import pytest

import vlsm
from vlsm.errors import CheckpointError
from vlsm.models import MODELS
from vlsm.models.options import OPTIONS


def test_every_model_has_options():
    assert OPTIONS.keys() == MODELS.keys()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unet_e", {}, "unknown model 'unet_e'; did you mean 'unet_d'? known models: clipseg, biomedclipseg, "),
        ("unet_d", {"widht": 3}, "unknown key 'widht'; did you mean 'width'?"),
        ("unet_d", {"image_size": 100}, "image_size is 100"),
        ("unet_d", {"trainable": "lora"}, "UNetD has no pretrained towers that lora could adapt"),
        ("unet_d", {"trainable": "towers"}, "trainable is 'towers'; it must be decoder, lora, dora, adapters or all"),
    ],
)
def test_an_unknown_model_or_option_names_the_nearest(name, options, message):
    with pytest.raises(CheckpointError) as caught:
        vlsm.build_model(name, **options)
    assert message in str(caught.value)
