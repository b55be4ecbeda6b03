"""Random changes of a training image together with its mask, made by torchvision."""

import numpy as np

from vlsm.training.settings import AugmentSettings


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
