"""Random changes of a training image together with its mask, made by torchvision."""

import numpy as np

from vlsm.images.windows import Window
from vlsm.training.settings import AugmentSettings

_FOREGROUND_SHARE = 1 / 3  # of the windows that are drawn around a pixel of the foreground


def draw_window(target_mask: np.ndarray, side: int, seed: int) -> Window:
    """Return a random window of an image, of the size that `plan_windows` gives to the windows of a segmentation.

    A third of the windows are drawn around a random pixel of the foreground, if there is any; else small lesions in
    large images would be rare.

    Args:
        target_mask: (H, W) uint8 of 0 and 1.
        side: of the window in pixels; an image that is shorter gives a window of its own length.
        seed: equal seeds give equal windows.

    Source: the share of foreground is that of nnU-Net, Nature Methods 2021, arXiv 1809.10486.
    """
    rng = np.random.default_rng(seed)
    size = [min(length, side) for length in target_mask.shape]
    starts = [int(rng.integers(length - part + 1)) for length, part in zip(target_mask.shape, size, strict=True)]
    if rng.random() < _FOREGROUND_SHARE and target_mask.any():
        pixels = np.flatnonzero(target_mask)
        centre = np.unravel_index(pixels[rng.integers(len(pixels))], target_mask.shape)
        starts = [
            int(np.clip(at - part // 2, 0, length - part))
            for at, part, length in zip(centre, size, target_mask.shape, strict=True)
        ]
    return Window(*starts, *size)


def augment_example(
    image: np.ndarray, target_mask: np.ndarray, settings: AugmentSettings, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return an image and its mask, randomly flipped, rotated, scaled, recoloured, blurred and noisy.

    The mask stays binary.

    Args:
        image: (S, S, 3) uint8.
        target_mask: (S, S) uint8 of 0 and 1.
        settings: kinds and strengths of the changes.
        seed: equal seeds give equal changes.

    Returns:
        The image and the mask, with the shapes and dtypes of the arguments.
    """
    import torch  # here, so that processes that only decode do not load torch
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    steps: list[v2.Transform] = [v2.Identity()]  # a Compose of no steps is an error
    if settings.flip:
        steps += [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    if settings.rotate_degrees or settings.scale:
        scale = (1 - settings.scale, 1 + settings.scale)
        steps.append(v2.RandomAffine(settings.rotate_degrees, scale=scale, interpolation=v2.InterpolationMode.BILINEAR))
    if settings.color or settings.hue:
        steps.append(v2.ColorJitter(settings.color, settings.color, settings.color, settings.hue))
    if settings.blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(kernel_size=7, sigma=(0.5, 1.5))], settings.blur))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changed, mask = v2.Compose(steps)(
            tv_tensors.Image(torch.from_numpy(np.array(image)).permute(2, 0, 1)),
            tv_tensors.Mask(torch.from_numpy(np.array(target_mask))),
        )
        if settings.noise:
            noise = torch.randn(changed.shape) * (255 * settings.noise * torch.rand(()))
            changed = (changed + noise).round().clamp(0, 255).to(torch.uint8)
    return changed.permute(1, 2, 0).contiguous().numpy(), mask.numpy()
