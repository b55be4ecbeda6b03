"""CRIS: CLIP's ResNet, a neck that adds the sentence, a decoder over the words, a projector with text-made kernels."""

import math
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlsm.errors import CheckpointError
from vlsm.images.preprocess import ImageSpec
from vlsm.models.contract import Features, SegmentationModel
from vlsm.models.cris_weights import load_published
from vlsm.models.fusion import build_unet_d
from vlsm.models.openclip import OpenCLIPTowers
from vlsm.models.options import CRISOptions, UNetDSettings
from vlsm.models.towers import encode_by_length


class ResNetTowers(OpenCLIPTowers):
    """CLIP's modified ResNet and its text transformer.

    Attributes:
        image_width: channels of the finest map.
        grid: side of the finest map; the model sets it, because the ResNet takes images of any size.
    """

    lora_targets = r"attnpool\.(q|k|v|c)_proj|.*\bresblocks\.\d+\.attn"

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """Channels of each map that `encode_images` returns."""
        layers = self.visual.layer2, self.visual.layer3, self.visual.layer4
        third, fourth, last = (layer[-1].bn3.num_features for layer in layers)
        return third, fourth, self.visual.attnpool.c_proj.out_features, last

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return four maps (B, C, H, W): at S / 8, at S / 16, at S / 32 after attention pooling, at S / 32 before it.

        CLIP's attention pool returns one vector: its only query is the mean. Here every position is a query.
        """
        third, fourth, last = self.visual.forward_intermediates(
            pixel_values, indices=[2, 3, 4], intermediates_only=True
        )["image_intermediates"]
        return third, fourth, self._attend(last), last

    @property
    def embedding_width(self) -> int:
        """Width of CLIP's embeddings."""
        return self.text_width

    def pool(self, activations: tuple[Tensor, ...]) -> Tensor:
        """Return CLIP's image embeddings, (B, text_width) float32, in the space of the sentence embeddings.

        As in CLIP, the mean of all positions attends to itself and to them.
        """
        last = activations[-1]
        mean = last.mean(dim=(2, 3)) + self.visual.attnpool.positional_embedding[0]
        tokens = torch.cat([mean[:, None], self._add_positions(last)], dim=1)
        return self._attend_to(tokens[:, :1], tokens)[:, 0].float()

    def _attend(self, x: Tensor) -> Tensor:
        tokens, (height, width) = self._add_positions(x), x.shape[2:]
        attended = self._attend_to(tokens, tokens).transpose(1, 2)
        return attended.unflatten(2, (height, width))  # type: ignore[no-untyped-call]

    def _add_positions(self, x: Tensor) -> Tensor:
        """Return a map (B, C, H, W) as tokens (B, H * W, C) with their positions."""
        learned = self.visual.attnpool.positional_embedding[1:]  # the first position belongs to the mean
        side = math.isqrt(len(learned))
        positions = functional.interpolate(
            learned.T.unflatten(1, (side, side))[None], x.shape[2:], mode="bicubic", align_corners=False
        )
        return (x + positions).flatten(2).transpose(1, 2)

    def _attend_to(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Return what queries (B, N, C) gather from tokens (B, L, C), projected."""
        pool = self.visual.attnpool
        query, key, value = (
            project(x).unflatten(2, (pool.num_heads, -1)).transpose(1, 2)
            for project, x in ((pool.q_proj, queries), (pool.k_proj, tokens), (pool.v_proj, tokens))
        )
        attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return pool.c_proj(attended)

    def _prepare_images(self, taps: tuple[int, ...] | None) -> None:
        if not hasattr(self.visual, "attnpool"):
            raise CheckpointError(f"CRIS needs CLIP's ResNet as image tower, not a {type(self.visual).__name__}")
        if not self.is_causal:
            raise CheckpointError(f"CRIS needs CLIP's own text transformer, not a {type(self.text).__name__}")
        self.taps = (2, 3, 4)
        self.image_width, self.num_prefix_tokens = self.channels[0], 0


def _conv(channels_in: int, channels: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


def _double(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class _Neck(nn.Module):
    """The neck: it multiplies the deepest of three feature levels with the sentence and joins all three at S / 16."""

    def __init__(self, channels: tuple[int, int, int, int], text_width: int, width: int) -> None:
        super().__init__()
        third, fourth, pooled, last = channels
        small, large = width // 2, width * 2
        self.residual = nn.Sequential(nn.Conv2d(last, pooled, 1, bias=False), nn.BatchNorm2d(pooled))
        self.text = nn.Sequential(nn.Linear(text_width, large, bias=False), nn.BatchNorm1d(large), nn.ReLU())
        self.project5 = _conv(pooled, large, 1)
        self.norm5 = nn.Sequential(nn.BatchNorm2d(large), nn.ReLU())
        self.project4, self.project3 = _conv(fourth, width, 3), _conv(third, small, 3)
        self.merge4, self.merge3 = _conv(large + width, width, 1), _conv(small + width, width, 1)
        self.query5, self.query4, self.query3 = _conv(large, width, 3), _conv(width, width, 3), _conv(width, width, 3)
        self.gather = _conv(3 * width, width, 1)
        self.locate = nn.Sequential(_conv(width + 2, width, 3), _conv(width, width, 3))

    def project(self, maps: Features) -> Features:
        """Return the three projected levels, which do not depend on the prompt."""
        third, fourth, pooled, last = maps
        level5 = self.project5(torch.relu(pooled + self.residual(last)))
        return functional.avg_pool2d(self.project3(third), 2), self.project4(fourth), level5

    def forward(self, projected: Features, sentences: Tensor) -> Tensor:
        """Return (B, width, S / 16, S / 16) from the levels of `project` and sentence embeddings (B, text_width)."""
        level3, level4, level5 = projected
        level5 = self.norm5(level5 * self.text(sentences)[:, :, None, None])
        level4 = self.merge4(torch.cat([level4, _double(level5)], dim=1))
        level3 = self.merge3(torch.cat([level3, level4], dim=1))
        queries = [self.query3(level3), self.query4(level4), _double(self.query5(level5))]
        gathered = self.gather(torch.cat(queries, dim=1))
        side = torch.linspace(-1, 1, gathered.shape[-1], device=gathered.device, dtype=gathered.dtype)
        coordinates = torch.stack(torch.meshgrid(side, side, indexing="xy")).expand(len(gathered), -1, -1, -1)
        return self.locate(torch.cat([gathered, coordinates], dim=1))


class _DecoderLayer(nn.Module):
    """Self-attention of pixels, then attention to words; each block has a norm before and after it, as published."""

    def __init__(self, width: int, words_width: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.after = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.self_attention = nn.MultiheadAttention(width, 8, dropout, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(
            width, 8, dropout, kdim=words_width, vdim=words_width, batch_first=True
        )
        hidden = 4 * width
        self.feed_forward = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.LayerNorm(hidden), nn.Linear(hidden, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, pixels: Tensor, pixel_positions: Tensor, words: Tensor, word_positions: Tensor, padding: Tensor
    ) -> Tensor:
        """Return pixels (B, N, width) that have attended to each other and to the words (B, L, D), except padding."""
        normed = self.norms[0](pixels)
        queries = normed + pixel_positions
        attended, _ = self.self_attention(queries, queries, normed, need_weights=False)
        pixels = pixels + self.dropout(self.after[0](attended))
        queries = self.norms[1](pixels) + pixel_positions
        keys = words + word_positions
        attended, _ = self.cross_attention(queries, keys, words, key_padding_mask=padding, need_weights=False)
        pixels = pixels + self.dropout(self.after[1](attended))
        return pixels + self.dropout(self.feed_forward(self.norms[2](pixels)))


class _Projector(nn.Module):
    """A convolution of pixels at S / 4 with one kernel per sentence, which a linear layer computes."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.grow = nn.ModuleList([_conv(width, width, 3), _conv(width, width // 2, 3)])
        self.last = nn.Conv2d(width // 2, width // 2, 1)
        self.text = nn.Linear(text_width, width // 2 * 9 + 1)

    def forward(self, pixels: Tensor, sentences: Tensor) -> Tensor:
        """Return logits (B, 1, S / 4, S / 4)."""
        for grow in self.grow:
            pixels = grow(_double(pixels))
        pixels = self.last(pixels)
        batch, channels = pixels.shape[:2]
        kernels = self.text(sentences)
        weight, bias = kernels[:, :-1].reshape(batch, channels, 3, 3), kernels[:, -1]
        # one group per image, because each image has a different kernel
        logits = functional.conv2d(pixels.reshape(1, -1, *pixels.shape[2:]), weight, bias, padding=1, groups=batch)
        return logits.transpose(0, 1)


class CRIS(SegmentationModel):
    """CLIP's ResNet-50 towers, a multi-modal neck, a vision-language decoder, a text-to-pixel projector, maybe UNet-D.

    The published threshold is 0.35. The decoder does not attend to padding, which the tokenizer determines. The public
    code treats every id 0 as padding, but id 0 is also an exclamation mark.

    Source: CRIS, CVPR 2022, arXiv 2111.15174.
    """

    threshold = 0.35
    options: CRISOptions

    def __init__(self, options: CRISOptions, towers: ResNetTowers) -> None:
        super().__init__()
        self.options = options
        self.image_spec = ImageSpec(options.image_size, towers.image_spec.mean, towers.image_spec.std)
        self.towers = towers
        words_width = towers.text.width
        self.neck = _Neck(towers.channels, towers.text_width, options.width)
        self.layers = nn.ModuleList(_DecoderLayer(options.width, words_width, options.dropout) for _ in range(3))
        self.norm = nn.LayerNorm(options.width)
        self.projector = _Projector(options.width, towers.text_width)
        towers.grid = options.image_size // 8
        unet = UNetDSettings(width=options.unet_width, dropout=options.unet_dropout)
        self.fusion = build_unet_d(towers, unet, options.image_size) if options.unet else None

    @classmethod
    def build(cls, options: CRISOptions) -> Self:
        """Build the model with CLIP's pretrained towers and untrained other parts, or with the weights of a CRIS.

        Raises:
            CheckpointError: the source or the weights cannot be loaded, or its image tower is not CLIP's ResNet.
        """
        if options.weights is None:
            return cls(options, ResNetTowers.build(options.source, None))
        model = cls(options, ResNetTowers.build_untrained(options.source))
        load_published(model, options.weights)
        return model

    @classmethod
    def restore(cls, options: CRISOptions, folder: Path) -> Self:
        """Build the model from the architecture and tokenizer in a checkpoint directory."""
        return cls(options, ResNetTowers.restore(folder, None))

    def save_files(self, folder: Path) -> None:
        """Write open_clip's configuration."""
        self.towers.save_files(folder)

    @property
    def num_features(self) -> int:
        """Number of tensors that `encode_images` returns."""
        return 3 + (0 if self.fusion is None else self.fusion.num_features)

    @property
    def num_text_features(self) -> int:
        """Number of tensors that `encode_prompts` returns."""
        return 3

    def encode_prompts(self, prompts: list[str]) -> Features:
        """Return sentence embeddings (T, D), word features (T, 77, 512), and a bool (T, 77) that is true at padding."""
        context = self.towers.tokenizer.context_length

        def encode(ids: Tensor) -> Features:
            sentences, words = self.towers.encode_words(ids.to(self.device, non_blocking=True))
            lengths = torch.tensor([self.towers.num_tokens(row) for row in ids]).to(self.device, non_blocking=True)
            padding = torch.arange(context, device=self.device) >= lengths[:, None]
            return sentences, functional.pad(words, (0, 0, 0, context - ids.shape[1])), padding

        return encode_by_length(self.towers.tokenize(prompts), encode)

    def encode_towers(self, pixel_values: Tensor) -> Features:
        """Return the maps of the image tower."""
        return self.towers.encode_images(pixel_values)

    def encode_images(self, pixel_values: Tensor, activations: Features | None = None) -> Features:
        """Return the neck's three levels before the sentence is added, then the CNN's features if there is a CNN."""
        maps = self.encode_towers(pixel_values) if activations is None else activations
        levels = self.neck.project(maps)
        if self.fusion is None:
            return levels
        finest = maps[0].flatten(2).transpose(1, 2)  # (B, L, C), as a vision transformer's
        return levels + self.fusion.encode_images((finest,), pixel_values)

    def decode(self, image_features: Features, text_features: Features) -> Tensor:
        """Return logits (B, 1, S, S); the projector's logits are enlarged four times, as options.enlarge says."""
        sentences, words, padding = text_features
        fused = self.neck(image_features[:3], sentences)
        pixels = fused.flatten(2).transpose(1, 2)  # (B, N, width)
        height, width = fused.shape[2:]
        pixel_positions = _plane_encoding(pixels.shape[2], height, width, pixels.device).to(pixels)
        word_positions = _sine_encoding(words.shape[2], words.shape[1], pixels.device).to(pixels)
        for layer in self.layers:
            pixels = layer(pixels, pixel_positions, words, word_positions, padding)
        logits = self.projector(self.norm(pixels).transpose(1, 2).unflatten(2, (height, width)), sentences)
        size, is_published = (self.image_spec.size, self.image_spec.size), self.options.enlarge == "published"
        mode = "bicubic" if is_published else "bilinear"
        logits = functional.interpolate(logits, size, mode=mode, align_corners=is_published)
        return logits if self.fusion is None else self.fusion.decode(image_features[3:], sentences, logits)


def _sine_encoding(width: int, length: int, device: torch.device) -> Tensor:
    """Return a position encoding (length, width) of alternating sines and cosines.

    Source: Attention Is All You Need, arXiv 1706.03762.
    """
    frequencies = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000) / width))
    angles = torch.arange(length, device=device)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def _plane_encoding(width: int, height: int, columns: int, device: torch.device) -> Tensor:
    """Return (height * columns, width): the first half of the channels encodes the column, the second half the row."""
    across = _sine_encoding(width // 2, columns, device)[None].expand(height, -1, -1)
    down = _sine_encoding(width // 2, height, device)[:, None].expand(-1, columns, -1)
    return torch.cat([across, down], dim=2).flatten(0, 1)
