"""The CNN baselines: networks of segmentation_models_pytorch with any of its encoders. They ignore the prompt."""

import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import safetensors.torch
import segmentation_models_pytorch as smp

from vlsm.errors import CheckpointError
from vlsm.models.contract import ImageOnlyModel
from vlsm.models.options import CNNOptions
from vlsm.models.towers import LOAD_ERRORS, explain_source


class CNN(ImageOnlyModel):
    """An encoder-decoder network. Its logits do not depend on the prompt.

    Source: MedVLSM, MIDL 2024, arXiv 2308.07706; segmentation_models_pytorch.
    """

    architecture: ClassVar[str]
    has_sizes = False  # and some encoders read values while they are built, which torch's meta device does not have

    @classmethod
    def build(cls, options: CNNOptions) -> Self:
        """Build the network with pretrained encoder weights.

        Raises:
            CheckpointError: the encoder is unknown, or its weights cannot be loaded or do not fit the encoder.
        """
        weights = options.encoder_weights
        if weights is None or not weights.endswith(".safetensors"):
            network = _build_network(cls.architecture, options.encoder, weights)
        elif options.encoder.startswith("tu-"):  # timm itself must load them: it renames layers
            network = _build_network(
                cls.architecture, options.encoder, weights, pretrained_cfg_overlay={"file": weights}
            )
        else:
            network = _build_network(cls.architecture, options.encoder, None)
            try:
                network.encoder.load_state_dict(safetensors.torch.load_file(weights))
            except LOAD_ERRORS as error:
                raise CheckpointError(
                    f"encoder weights {weights!r} cannot be loaded: {explain_source(error)}"
                ) from error
        model = cls(options, network)
        if weights is not None and options.encoder.startswith("tu-"):
            pretraining = network.encoder.model.pretrained_cfg
            model.image_spec = replace(model.image_spec, mean=pretraining["mean"], std=pretraining["std"])
        return model

    @classmethod
    def restore(cls, options: CNNOptions, folder: Path) -> Self:
        """Build the network from the options alone."""
        return cls(options, _build_network(cls.architecture, options.encoder, None))


def _build_network(architecture: str, encoder: str, weights: str | None, **options: Any) -> Any:
    known = smp.encoders.get_encoder_names()
    if encoder not in known and not encoder.startswith("tu-"):
        near = difflib.get_close_matches(encoder, known, n=3) or known
        raise CheckpointError(
            f"unknown encoder {encoder!r}; did you mean {', '.join(near[:3])}? write a timm encoder as tu-NAME"
        )
    # a timm name, tu-NAME.TAG, already selects the weights; here True means pretrained and None untrained
    encoder_weights = bool(weights) or None if encoder.startswith("tu-") else weights
    try:
        return smp.create_model(architecture, encoder, encoder_weights, **options)
    except LOAD_ERRORS as error:
        raise CheckpointError(
            f"encoder {encoder!r} with weights {weights!r} cannot be built: {explain_source(error)}; "
            "encoder_weights may also be null or a local .safetensors file"
        ) from error


class UNet(CNN):
    """U-Net, arXiv 1505.04597."""

    architecture = "unet"


class UNetPlusPlus(CNN):
    """U-Net++, arXiv 1807.10165."""

    architecture = "unetplusplus"


class DeepLabV3Plus(CNN):
    """DeepLabV3+, arXiv 1802.02611."""

    architecture = "deeplabv3plus"
