"""Towers from open_clip: any text tower, and any image tower that is a vision transformer."""

import json
from pathlib import Path
from typing import Any, Self

import open_clip
import torch
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn

from vlsm.errors import CheckpointError
from vlsm.images.preprocess import ImageSpec
from vlsm.models.openclip_source import (
    CONFIG_NAME,
    build_architecture,
    explain_text_tower,
    load_tokenizer,
    read_config,
    resolve_source,
    text_tower,
)
from vlsm.models.towers import (
    LOAD_ERRORS,
    Towers,
    choose_taps,
    cut_tokens,
    encode_by_length,
    explain_source,
    wrong_side,
)

_FOLDER = "openclip"


class OpenCLIPTowers(Towers):
    """The image tower and the text tower of an open_clip model. The image tower ends at its last tapped block.

    Args:
        model: an open_clip model with a separate text tower (CustomTextCLIP).
        config: content of open_clip_config.json.
        tokenizer: open_clip's tokenizer.
        taps: 0-based indices of the image-tower blocks whose outputs are used. None means the blocks at a quarter, a
            half and three quarters of the depth.
    """

    # names in timm and EVA, then in open_clip's transformer, where the attention is a single module, then in BERT
    lora_targets = (
        r".*\bblocks\.\d+\.attn\.(qkv|proj|q_proj|k_proj|v_proj)|.*\bresblocks\.\d+\.attn|"
        r".*\blayer\.\d+\.attention\.(self\.(query|key|value)|output\.dense)"
    )
    adapter_targets = (
        r".*\b(res)?blocks\.\d+\.(attn|mlp)|"
        r".*\blayer\.\d+\.(attention\.)?output\.dropout"  # what BERT adds to the input of attention and MLP
    )

    def __init__(self, model: Any, config: dict[str, Any], tokenizer: Any, taps: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.visual = model.visual
        self.text = model.text
        self.text_width = config["model_cfg"]["embed_dim"]
        preprocessing = model.visual.preprocess_cfg
        self.image_spec = ImageSpec(
            _side(model.visual.image_size), tuple(preprocessing["mean"]), tuple(preprocessing["std"])
        )
        self._prepare_images(taps)
        self.set_trainable("decoder")

    @classmethod
    def build(cls, source: str, image_size: int | None, taps: tuple[int, ...] | None = None) -> Self:
        """Build towers with pretrained weights.

        Args:
            source: a hub id, a local folder with open_clip_config.json and weights, or open_clip's NAME/TAG.
            image_size: side of the input in pixels, or None for the model's size; another size resamples its position
                embedding.
            taps: see the class.

        Raises:
            CheckpointError: the source cannot be loaded, or its image tower is not a vision transformer.
        """
        name, tag = resolve_source(source)
        try:
            config = read_config(name)
            if tag and not Path(tag).is_file():  # create_model would log a download error and raise it
                open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, tag))
            with text_tower(name, config) as overrides:
                model = open_clip.create_model(
                    name, tag, force_custom_text=True, force_image_size=image_size, require_pretrained=True, **overrides
                )
            tokenizer = load_tokenizer(name, config)
        except LOAD_ERRORS as error:
            raise CheckpointError(
                f"open_clip weights {source!r} cannot be loaded: {explain_source(error)}{explain_text_tower(name)}"
            ) from error
        config["preprocess_cfg"] = {key: model.visual.preprocess_cfg[key] for key in ("mean", "std")}
        return cls(model, config, tokenizer, taps)

    @classmethod
    def build_untrained(cls, source: str) -> Self:
        """Build towers with random weights and CLIP's mean and std. Only the source's architecture is read.

        Raises:
            CheckpointError: the source's configuration cannot be loaded.
        """
        name, _ = resolve_source(source)
        try:
            config = read_config(name)
            with text_tower(name, config) as overrides:
                model = build_architecture(config["model_cfg"] | overrides)
            tokenizer = load_tokenizer(name, config)
        except LOAD_ERRORS as error:
            raise CheckpointError(f"open_clip model {source!r} cannot be built: {explain_source(error)}") from error
        statistics = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
        config["preprocess_cfg"] = model.visual.preprocess_cfg = statistics
        return cls(model, config, tokenizer)

    @classmethod
    def restore(cls, folder: Path, image_size: int | None, taps: tuple[int, ...] | None = None) -> Self:
        """Build the towers and tokenizer of a checkpoint directory. The caller loads their weights afterwards."""
        name = f"local-dir:{folder / _FOLDER}"
        config = read_config(name)
        if "hf_model_name" in config["model_cfg"]["text_cfg"] and not (folder / _FOLDER / "config.json").is_file():
            raise FileNotFoundError(f"{_FOLDER}/config.json, which describes the text tower, is missing")
        with text_tower(name, config) as overrides:
            model = build_architecture(config["model_cfg"] | overrides, image_size)
        model.visual.preprocess_cfg = config["preprocess_cfg"]
        return cls(model, config, load_tokenizer(name, config, local_files_only=True), taps)

    @property
    def image_tower(self) -> nn.Module:
        """The module that open_clip calls `visual`."""
        return self.visual

    @property
    def text_tower(self) -> nn.Module:
        """The module that open_clip calls `text`."""
        return self.text

    def tokenize(self, prompts: list[str]) -> list[Tensor]:
        """Return the ids of each prompt, without padding if the text tower ignores padding, else with padding."""
        context = self.tokenizer.context_length
        for prompt in prompts:
            cut_tokens(prompt, self._uncut_ids(prompt), context, "the text tower")
        padded = self.tokenizer(prompts)
        if not self._ignores_padding:
            return list(padded)
        return [row[: self.num_tokens(row)] for row in padded]

    def encode_tokens(self, tokens: list[Tensor]) -> Tensor:
        """Return the projected text embeddings, (T, text_width)."""
        device = self.text_device
        return encode_by_length(tokens, lambda ids: self.encode_words(ids.to(device, non_blocking=True))[:1])[0]

    def encode_words(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Return sentence embeddings (T, text_width), and word features (T, L, width) if `is_causal`."""
        if not self.is_causal:
            return (self.text(ids),)
        # open_clip's forward adds a causal mask for the full context; shorter rows need only its top left corner
        text, length = self.text, ids.shape[1]
        hidden = text.token_embedding(ids) + text.positional_embedding[:length]
        words = text.ln_final(text.transformer(hidden, attn_mask=text.attn_mask[:length, :length]))
        pooled = text_global_pool(words, ids, pool_type=text.pool_type, eos_token_id=text.eos_id)
        project = text.text_projection
        return (project(pooled) if isinstance(project, nn.Linear) else pooled @ project), words

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the tapped blocks, (B, L, W) each, from open_clip's forward_intermediates."""
        intermediates = self.visual.forward_intermediates(
            pixel_values,
            indices=list(self.taps),
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=self.num_prefix_tokens > 0,
        )
        patches = intermediates["image_intermediates"]
        prefixes = intermediates.get("image_intermediates_prefix")
        return (
            tuple(torch.cat(pair, dim=1) for pair in zip(prefixes, patches, strict=True))
            if prefixes
            else tuple(patches)
        )

    def save_files(self, folder: Path) -> None:
        """Write open_clip's configuration, and for a text tower from transformers its configuration and tokenizer."""
        target = folder / _FOLDER
        target.mkdir(parents=True, exist_ok=True)
        if hasattr(self.text, "config"):
            self.text.config.save_pretrained(target)
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(target)
        (target / CONFIG_NAME).write_text(json.dumps(self.config, indent=2), encoding="utf-8")

    @property
    def text_device(self) -> torch.device:
        """The device of the text tower's weights."""
        return next(self.text.parameters()).device

    @property
    def is_causal(self) -> bool:
        """Whether the text tower is CLIP's transformer, in which a token attends only to itself and earlier tokens."""
        text = self.text
        return isinstance(text, TextTransformer) and text.attn_mask is not None and text.cls_emb is None

    @property
    def _ignores_padding(self) -> bool:
        """Whether text embeddings do not depend on padding.

        A causal tower pools at the end of text, which precedes all padding. Towers from transformers mask the padding.
        Other towers attend to it.
        """
        return not isinstance(self.text, TextTransformer) or (
            self.is_causal and self.text.pool_type in ("argmax", "eos")
        )

    def _prepare_images(self, taps: tuple[int, ...] | None) -> None:
        """Check that the image tower is a vision transformer, and remove the layers above the last tap."""
        tower = getattr(self.visual, "trunk", self.visual)
        blocks = getattr(tower, "blocks", None) or getattr(getattr(tower, "transformer", None), "resblocks", None)
        if blocks is None or not hasattr(tower, "prune_intermediate_layers"):
            raise CheckpointError(
                f"the image tower {type(tower).__name__} is not a vision transformer; choose a source that has one"
            )
        self.taps = choose_taps(taps, len(blocks))
        tower.prune_intermediate_layers(list(self.taps), prune_norm=True, prune_head=True)
        for module in tower.modules():
            if hasattr(module, "qkv_bias_separate"):  # EVA: else it reads the weight without its layer, and skips lora
                module.qkv_bias_separate = True
        if tower is not self.visual:
            self.visual.head = nn.Identity()
            self.image_width, self.num_prefix_tokens = tower.embed_dim, tower.num_prefix_tokens
            self.grid = tower.patch_embed.grid_size[0]
        else:
            self.image_width, self.num_prefix_tokens = tower.transformer.width, 1
            self.grid = tower.grid_size[0]
        patch = _side(tower.patch_size if tower is self.visual else tower.patch_embed.feat_ratio(as_scalar=False))
        size = self.image_spec.size
        if self.grid * patch != size:  # else the last pixels are cut off, and the logits are stretched over them
            raise wrong_side(size, patch)

    def _uncut_ids(self, prompt: str) -> list[int]:
        if hasattr(self.tokenizer, "encode"):  # open_clip's tokenizer: its `encode` adds no start and no end
            return [self.tokenizer.sot_token_id, *self.tokenizer.encode(prompt), self.tokenizer.eot_token_id]
        return list(self.tokenizer.tokenizer(self.tokenizer.clean_fn(prompt), verbose=False)["input_ids"])

    def num_tokens(self, row: Tensor) -> int:
        """Return the number of ids in a padded row that are not padding.

        The id 0 alone does not mark padding: open_clip's tokenizer pads with 0, but 0 is also an exclamation mark. In
        its rows, every id after the end of text is padding.
        """
        inner = getattr(self.tokenizer, "tokenizer", None)
        if inner is None or inner.pad_token_id == inner.eos_token_id:
            end = self.tokenizer.eot_token_id if inner is None else inner.eos_token_id
            return int((row == end).int().argmax()) + 1
        return int((row != inner.pad_token_id).sum())


def _side(size: int | tuple[int, int]) -> int:
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise CheckpointError(f"the image tower takes {height} x {width} pixels; only square images are supported")
    return height
