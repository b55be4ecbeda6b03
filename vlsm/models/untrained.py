"""Writes model folders in the formats of their libraries, with the published architectures and random weights.

The folders replace hub ids on machines without a network: to count parameters and operations, to measure speed, or to
try a job.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import processors
from transformers import (
    BertConfig,
    BertTokenizerFast,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPTokenizer,
    Sam3Config,
    Sam3ImageProcessor,
    Sam3Model,
    Sam3Processor,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from vlsm.models.decoder import initialize_decoder

_WORDS = (
    "a an the of and with in on one two left right top bottom polyp lesion tumor mass round flat small large bright"
)


def write_clipseg(folder: Path, weights: bool = True, **config: Any) -> Path:
    """Write a CLIPSeg for transformers' from_pretrained, by default with the sizes of `CIDAS/clipseg-rd64-refined`.

    Args:
        folder: created if it does not exist.
        weights: True writes random weights; False writes only the configuration and the tokenizer.
        config: fields of CLIPSegConfig that differ from the published ones.

    Returns:
        The folder.
    """
    tokenizer = byte_pair_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = CLIPSegConfig(
        text_config=special | config.pop("text_config", {}),
        vision_config={"image_size": 352, "patch_size": 16} | config.pop("vision_config", {}),
        **{"use_complex_transposed_convolution": True, "extract_layers": [3, 6, 9]} | config,
    )
    settings.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if weights:
        network = CLIPSegForImageSegmentation(settings)
        initialize_decoder(network.decoder)
        network.save_pretrained(folder)
    return folder


def write_biomedclip(
    folder: Path, weights: bool = True, image_tower: tuple[str, int] = ("vit_base_patch16_224", 224), **bert: Any
) -> Path:
    """Write a BiomedCLIP for open_clip's local-dir: a timm vision transformer and a BERT.

    Args:
        folder: created if it does not exist.
        weights: True writes random weights; False writes only the configuration and the tokenizer.
        image_tower: the name of the image tower in timm, and the side of its input in pixels.
        bert: fields of BertConfig that differ from the published ones; the published ones are BERT's defaults.

    Returns:
        The folder.
    """
    tokenizer = _word_piece_tokenizer()
    tokenizer.save_pretrained(folder)
    BertConfig(**bert).save_pretrained(folder)
    text = {
        "hf_model_name": str(folder),
        "hf_tokenizer_name": str(folder),
        "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "context_length": 256,
    }
    vision = {"timm_model_name": image_tower[0], "timm_pool": "", "timm_proj": "linear", "image_size": image_tower[1]}
    return write_open_clip(folder, {"embed_dim": 512, "vision_cfg": vision, "text_cfg": text}, weights)


def write_clip_resnet(folder: Path, weights: bool = True, **config: Any) -> Path:
    """Write CLIP's RN50 with QuickGELU, the initial towers of CRIS.

    Args:
        folder: created if it does not exist.
        weights: True writes random weights; False writes only the configuration.
        config: keys of open_clip's model_cfg that differ from the published ones.

    Returns:
        The folder.
    """
    import open_clip

    return write_open_clip(folder, open_clip.get_model_config("RN50-quickgelu") | config, weights)


def write_siglip(folder: Path, weights: bool = True, **config: Any) -> Path:
    """Write a SigLIP for transformers' from_pretrained, by default with the sizes of `google/medsiglip-448`.

    Args:
        folder: created if it does not exist.
        weights: True writes random weights; False writes all other files.
        config: `text_config` and `vision_config`, with the fields of SiglipConfig's parts that differ from the
            published ones.

    Returns:
        The folder.
    """
    tokenizer = lower_case_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    settings = SiglipConfig(
        text_config=sizes | special | config.pop("text_config", {}),
        vision_config=sizes | {"image_size": 448, "patch_size": 14} | config.pop("vision_config", {}),
    )
    settings.save_pretrained(folder)
    SiglipProcessor(SiglipImageProcessor(), tokenizer).save_pretrained(folder)
    if weights:
        SiglipModel(settings).save_pretrained(folder)
    return folder


def write_sam3(folder: Path, weights: bool = True, **config: Any) -> Path:
    """Write a SAM 3 for transformers' from_pretrained, by default with the sizes of `facebook/sam3`.

    Args:
        folder: created if it does not exist.
        weights: True writes random weights; False writes all other files.
        config: fields of Sam3Config that differ from the published ones.

    Returns:
        The folder.
    """
    tokenizer = byte_pair_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = Sam3Config(**config)
    for name, token in special.items():
        setattr(settings.text_config, name, token)
    settings.save_pretrained(folder)
    Sam3Processor(Sam3ImageProcessor(), tokenizer).save_pretrained(folder)
    if weights:
        Sam3Model(settings).save_pretrained(folder)
    return folder


def write_open_clip(folder: Path, model_config: dict[str, Any], weights: bool = True) -> Path:
    """Write any open_clip architecture for local-dir, with CLIP's mean and std, and return the folder."""
    import open_clip  # late import: it takes seconds, and write_clipseg does not need it

    from vlsm.models.openclip_source import CONFIG_NAME, build_architecture

    folder.mkdir(parents=True, exist_ok=True)
    statistics = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    config = {"model_cfg": model_config, "preprocess_cfg": statistics}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")
    if weights:
        state = {key: value.contiguous() for key, value in build_architecture(model_config).state_dict().items()}
        save_file(state, folder / "open_clip_model.safetensors")
    return folder


def byte_pair_tokenizer() -> CLIPTokenizer:
    """Return a real byte-pair tokenizer of a few words; it splits other words into letters."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in _WORDS.split():  # each word is built letter by letter, as in byte-pair encoding
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            vocabulary.append(pieces[0])
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    numbered = {token: number for number, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=numbered, merges=[*dict.fromkeys(merges)])


def _word_piece_tokenizer() -> BertTokenizerFast:
    """Return a real word-piece tokenizer of a few words; it splits other words into letters."""
    letters = [chr(code) for code in range(33, 127)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *letters, *("##" + letter for letter in letters), *_WORDS.split()]
    return BertTokenizerFast(vocab={token: number for number, token in enumerate(dict.fromkeys(vocabulary))})


def lower_case_tokenizer() -> Siglip2Tokenizer:
    """Return a real tokenizer of SigLIP 2 with a few words; it splits other words into letters or bytes."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = ["\u2581", *(chr(code) for code in range(33, 127))]
    vocabulary = [*special, *(f"<0x{code:02X}>" for code in range(256)), *letters]
    merges = []
    for word in _WORDS.split():  # each word is built letter by letter, as in byte-pair encoding
        for count in range(1, len(word)):
            merges.append((word[:count], word[count]))
            vocabulary.append(word[: count + 1])
    numbered = {token: number for number, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Siglip2Tokenizer(
        vocab=numbered, merges=[*dict.fromkeys(merges)], padding_side="right", model_input_names=["input_ids"]
    )
    end = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", numbered["<eos>"])])
    tokenizer.backend_tokenizer.post_processor = end
    return tokenizer
