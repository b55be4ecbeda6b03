"""A stack: trained models whose logits a small convolution joins. Only the convolution learns.

Source: stacked generalization, Wolpert 1992. VLSM-Ensemble C joins two models in this way, but trains them together.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlsm.errors import CheckpointError
from vlsm.images.preprocess import ImageSpec
from vlsm.models import find_model, parse_options
from vlsm.models.contract import Features, SegmentationModel, renormalize
from vlsm.models.options import Adapted, StackOptions, StackPart, Trainable
from vlsm.models.tower_files import MEMBER_FOLDERS

RestoreMember = Callable[[int, StackPart, Path], SegmentationModel]


class Stack(SegmentationModel):
    """Members with frozen weights, and a convolution over their logits.

    The rule of sizes: an image comes at the side S of the stack. A member with another side gets it resized from there,
    bilinearly with antialiasing, with the member's own mean and std. Its logits are resized to S in the same way. All
    members resize images alike, by squeezing or letterboxing. Each member tokenises the prompt itself.

    The convolution starts as the mean of the members' logits; those of a calibrated member are divided by its
    temperature.

    Args:
        options: with parts.
        members: the models.
        temperatures: of the members' calibrations; default: 1 each.
    """

    options: StackOptions

    def __init__(
        self, options: StackOptions, members: Sequence[SegmentationModel], temperatures: Sequence[float] = ()
    ) -> None:
        super().__init__()
        self.options = options
        side = options.image_size or max(member.image_spec.size for member in members)
        self.image_spec = replace(members[0].image_spec, size=side)
        self.members = nn.ModuleList(members)
        kernel, count = options.kernel, len(members)
        # replicated: beyond the border the logits are those at the border, not the 0 that stands for a doubt
        self.head = nn.Conv2d(count, 1, kernel, padding=kernel // 2, padding_mode="replicate")
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.bias.zero_()  # type: ignore[union-attr]
            for number, temperature in enumerate(temperatures or [1.0] * count):
                self.head.weight[0, number, kernel // 2, kernel // 2] = 1 / (count * temperature)
        self.set_trainable("decoder")

    @classmethod
    def build(cls, options: StackOptions) -> Self:
        """Refuse to build: reading checkpoints is the work of `vlsm.build_model`.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError("the members of a stack are checkpoints; vlsm.build_model reads them")

    @classmethod
    def restore(cls, options: StackOptions, folder: Path, restore_member: RestoreMember | None = None) -> Self:
        """Build the members that `options.parts` describes.

        Args:
            options: the options in a checkpoint.
            folder: the folder with the files of the members, as `save_files` writes it.
            restore_member: builds a member from its number, its part and its folder; default: its class does.

        Raises:
            CheckpointError: there are no parts, or they do not fit their models.
        """
        if not options.parts:
            raise CheckpointError(
                "the options of the stack do not describe its members; copy its checkpoint.yaml again"
            )
        build = restore_member or _restore_member
        members = []
        for number, (part, room) in enumerate(zip(options.parts, MEMBER_FOLDERS, strict=False)):
            member = build(number, part, folder / room)
            if member.image_spec.size != part.image.size:
                raise CheckpointError(
                    f"member {number + 1} of the stack has the image size {part.image.size}; its {part.model} takes "
                    f"{member.image_spec.size} pixels"
                )
            member.image_spec = part.image.spec
            members.append(member)
        return cls(options, members)

    def save_files(self, folder: Path) -> None:
        """Write the files of each member to a folder of its own."""
        for member, room in zip(self.models, MEMBER_FOLDERS, strict=False):
            member.save_files(folder / room)

    def set_trainable(
        self,
        trainable: Trainable = "decoder",
        lora_rank: int = 8,
        adapt: Adapted = "image",
        adapter_width: int = 64,
    ) -> Self:
        """Freeze the members, and return the model.

        Raises:
            CheckpointError: trainable is not decoder: the members do not learn.
        """
        if trainable in get_args(Trainable) and trainable != "decoder":
            raise CheckpointError(
                f"trainable is {trainable}; the members of a stack do not learn, so it must be decoder"
            )
        super().set_trainable(trainable)
        self.members.requires_grad_(False)
        return self

    def train(self, mode: bool = True) -> Self:
        """Set training mode or eval mode, and return the model. The members stay in eval mode."""
        super().train(mode)
        self.members.eval()
        return self

    @property
    def has_frozen_towers(self) -> bool:
        """True: all that depends on the image alone is frozen, so that it can be stored."""
        return True

    @property
    def num_features(self) -> int:
        """Number of tensors that `encode_images` returns."""
        return sum(member.num_features for member in self.models)

    @property
    def num_text_features(self) -> int:
        """Number of tensors that `encode_prompts` returns."""
        return sum(member.num_text_features for member in self.models)

    @property
    def models(self) -> list[SegmentationModel]:
        """The members."""
        return cast(list[SegmentationModel], list(self.members))

    def encode_prompts(self, prompts: list[str]) -> Features:
        """Return the text features of all members, in their order."""
        return tuple(part for member in self.models for part in member.encode_prompts(prompts))

    @property
    def embedding_width(self) -> int:
        """0: a stack makes no embeddings, because `encode_towers` returns what the members make of the towers."""
        return 0

    def encode_towers(self, pixel_values: Tensor) -> Features:
        """Return the image features of all members, in their order."""
        inputs: dict[ImageSpec, Tensor] = {}  # members with equal inputs get one tensor: they may share towers
        features: Features = ()
        for member in self.models:
            spec = member.image_spec
            if spec not in inputs:
                inputs[spec] = _resize(renormalize(pixel_values, self.image_spec, spec), spec.size)
            features += member.encode_images(inputs[spec])
        return features

    def encode_images(self, pixel_values: Tensor, activations: Features | None = None) -> Features:
        """Return the image features of all members, as `encode_towers`."""
        return self.encode_towers(pixel_values) if activations is None else activations

    def decode(self, image_features: Features, text_features: Features) -> Tensor:
        """Return the joined logits (B, 1, S, S)."""
        logits = []
        for member in self.models:
            image_split, text_split = member.num_features, member.num_text_features
            own = member.decode(image_features[:image_split], text_features[:text_split])
            image_features, text_features = image_features[image_split:], text_features[text_split:]
            logits.append(_resize(own, self.image_spec.size))
        return cast(Tensor, self.head(torch.cat(logits, dim=1)))


def _restore_member(number: int, part: StackPart, folder: Path) -> SegmentationModel:
    return find_model(part.model).restore(parse_options(part.model, part.options), folder)


def _resize(values: Tensor, size: int) -> Tensor:
    """Return maps (B, C, H, W) with the side `size`, resized bilinearly, with antialiasing if they shrink."""
    if values.shape[-1] == size:
        return values
    shrinks = values.shape[-1] > size
    return functional.interpolate(values, (size, size), mode="bilinear", align_corners=False, antialias=shrinks)
