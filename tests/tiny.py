"""Tiny pretrained weights in their libraries' own formats, made on the spot."""

import json

import torch
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPTokenizer

_WORDS = ["a", "polyp", "lesion", "round", "bright", "of", "the", "left", "small", "flat"]


def save_tiny_clipseg(folder, image_size=64):
    """A CLIPSeg folder as from_pretrained takes it: configuration, safetensors, and a real byte-pair tokenizer."""
    letters = [*(chr(code) for code in range(33, 127))]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in _WORDS:  # each word is built letter by letter, as byte-pair encoding does
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append(f"{pieces[0]} {pieces[1]}")
            pieces[:2] = [pieces[0] + pieces[1]]
            vocabulary.append(pieces[0])
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    end = tokenizer.eos_token_id
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4}
    config = CLIPSegConfig(
        text_config={**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": end},
        vision_config={**sizes, "image_size": image_size, "patch_size": 16},
        projection_dim=24,
        reduce_dim=16,
        extract_layers=[0, 1, 3],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        use_complex_transposed_convolution=True,
    )
    torch.manual_seed(7)
    network = CLIPSegForImageSegmentation(config)
    with torch.no_grad():  # larger than the usual initialisation, so that images and prompts matter
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    network.save_pretrained(folder)
    return folder
