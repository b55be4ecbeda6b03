"""Usual ways to run CLIPSeg over a folder of images without this package, each written as its documentation shows.

python -m jobs.benchmarks.baselines WAY IMAGES OUTPUT CLIPSEG PROMPT [PROMPT ...]
"""

import io
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

BATCH_SIZE = 4


def main(way: str, images: str, output: str, clipseg: str, *prompts: str) -> None:
    """Write the masks of a folder of JPEGs: one mask per image and prompt, at the size of the image.

    Args:
        way: one of WAYS.
        images: folder of JPEG files.
        output: folder for the masks.
        clipseg: folder with the model and the processor, as from_pretrained of transformers reads it.
        prompts: one text per mask.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    WAYS[way](sorted(Path(images).iterdir()), Path(output), clipseg, list(prompts))


def run_card(files: list[Path], output: Path, clipseg: str, prompts: list[str]) -> None:
    """Run the processor and the model of transformers in a plain loop, as the model card shows it; write PNG files."""
    predict = _Card(clipseg, prompts)
    for file in files:
        with Image.open(file) as image:
            masks = predict(image.convert("RGB"))
        for number, mask in enumerate(masks):
            _write_mask(mask, output, file, number)


def run_loader(files: list[Path], output: Path, clipseg: str, prompts: list[str]) -> None:
    """Run the model per batch and prompt behind a DataLoader with two workers; write PNG files."""
    processor, model = _load(clipseg)
    texts = processor.tokenizer(prompts, padding="max_length", return_tensors="pt")
    for chosen, sizes, pixel_values in DataLoader(
        _Files(files, processor.image_processor), BATCH_SIZE, num_workers=2, collate_fn=_collate
    ):
        for number in range(len(prompts)):
            tokens = {key: value[number].expand(len(chosen), -1) for key, value in texts.items()}
            with torch.inference_mode():
                logits = model(pixel_values=pixel_values, **tokens).logits.reshape(len(chosen), *pixel_values.shape[2:])
            for file, size, image_logits in zip(chosen, sizes, logits, strict=True):
                _write_mask(_mask(image_logits, size), output, file, number)


def run_ray_data(files: list[Path], output: Path, clipseg: str, prompts: list[str]) -> None:
    """Run Ray Data: read_images, map_batches with one actor, and write_parquet.

    The reading and the writing tasks each request a quarter of a CPU. With a whole CPU each, a machine of two cores
    writes nothing until it has read all images.
    """
    import ray

    quarter_cpu = {"num_cpus": 0.25}
    ray.init(include_dashboard=False)
    images = ray.data.read_images(
        [str(file) for file in files],
        mode="RGB",
        include_paths=True,
        override_num_blocks=len(files) // images_per_block(prompts),
        ray_remote_args=quarter_cpu,
    )
    size = images_per_block(prompts)  # otherwise one file holds several blocks
    masks = images.map_batches(_CardActor, fn_constructor_args=(clipseg, prompts), batch_size=size, concurrency=1)
    masks.write_parquet(str(output), ray_remote_args=quarter_cpu)


def images_per_block(prompts: list[str]) -> int:
    """Return the images in a block of Ray Data.

    Ray Data writes one file per block. With ten prompts one image takes many seconds, so a block is one image then.
    """
    return BATCH_SIZE if len(prompts) == 1 else 1


WAYS: dict[str, Callable[[list[Path], Path, str, list[str]], None]] = {
    "card": run_card,
    "loader": run_loader,
    "ray data": run_ray_data,
}


class _Card:
    """A callable from an image to its masks: one array (H, W) bool per prompt."""

    def __init__(self, clipseg: str, prompts: list[str]) -> None:
        self.processor, self.model = _load(clipseg)
        self.prompts = prompts

    def __call__(self, image: Image.Image) -> list[np.ndarray]:
        inputs = self.processor(
            text=self.prompts, images=[image] * len(self.prompts), padding="max_length", return_tensors="pt"
        )
        with torch.no_grad():
            logits = self.model(**inputs).logits
        logits = logits.reshape(len(self.prompts), *inputs["pixel_values"].shape[2:])
        return [_mask(prompt_logits, (image.height, image.width)) for prompt_logits in logits]


class _CardActor(_Card):
    """The same callable for batches of Ray Data."""

    def __init__(self, clipseg: str, prompts: list[str]) -> None:
        torch.set_num_threads(os.cpu_count() or 1)  # Ray sets one thread in an actor with one CPU
        super().__init__(clipseg, prompts)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """Return the masks as PNG bytes, one row per image and prompt."""
        image_masks = [
            list(map(_encode, super(_CardActor, self).__call__(Image.fromarray(image)))) for image in batch["image"]
        ]
        return {
            "path": np.repeat(batch["path"], len(self.prompts)),
            "prompt": self.prompts * len(image_masks),
            "mask": list(itertools.chain(*image_masks)),
        }


class _Files(Dataset[Any]):
    def __init__(self, files: list[Path], processor: Any) -> None:
        self.files, self.processor = files, processor

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        with Image.open(self.files[index]) as opened:
            image = opened.convert("RGB")
        pixel_values = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return self.files[index], (image.height, image.width), pixel_values


def _collate(rows: list[Any]) -> Any:
    files, sizes, pixel_values = zip(*rows, strict=True)
    return files, sizes, torch.stack(pixel_values)


def _load(clipseg: str) -> tuple[Any, Any]:
    return CLIPSegProcessor.from_pretrained(clipseg), CLIPSegForImageSegmentation.from_pretrained(clipseg).eval()


def _mask(logits: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    resized = functional.interpolate(logits[None, None], size, mode="bilinear", antialias=True)
    return (torch.sigmoid(resized)[0, 0] >= 0.5).numpy()


def _encode(mask: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(mask).save(stream, "PNG")
    return stream.getvalue()


def _write_mask(mask: np.ndarray, output: Path, file: Path, number: int) -> None:
    output.mkdir(parents=True, exist_ok=True)
    unfinished, path = output / f".{file.stem}_{number}", output / f"{file.stem}_{number}.png"
    unfinished.write_bytes(_encode(mask))
    unfinished.rename(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
