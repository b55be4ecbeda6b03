import pytest
import torch

from vlsm.training.losses import segmentation_losses


@pytest.mark.parametrize(("dice_weight", "ce_weight"), [(1.0, 0.2), (1.0, 1.0), (0.5, 0.0), (0.0, 2.0)])
def test_the_mean_is_monais(dice_weight, ce_weight):
    monai = pytest.importorskip("monai.losses", reason="monai is installed for tests only")
    logits = torch.randn(4, 1, 24, 24) * 3
    targets = (torch.rand(4, 1, 24, 24) > 0.6).float()
    targets[1] = 0
    expected = monai.DiceCELoss(sigmoid=True, lambda_dice=dice_weight, lambda_ce=ce_weight)(logits, targets)
    losses = segmentation_losses(logits, targets, dice_weight, ce_weight)
    assert losses.shape == (4,)
    assert losses.mean().item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("logits", "target", "expected"),
    [
        ([40.0, -40.0], [1, 0], 0.0),  # right
        ([-40.0, -40.0], [0, 0], 0.0),  # empty and right
        ([40.0, 40.0], [1, 0], 1 - 2 / 3),  # one pixel too many
        ([-40.0, -40.0], [1, 0], 1.0),  # missed
    ],
)
def test_dice_loss_by_hand(logits, target, expected):
    losses = segmentation_losses(
        torch.tensor(logits).reshape(1, 1, 1, 2), torch.tensor(target).reshape(1, 1, 1, 2), 1, 0
    )
    assert losses.item() == pytest.approx(expected, abs=1e-4)


def test_an_examples_loss_does_not_depend_on_the_others():
    logits, targets = torch.randn(3, 1, 8, 8), (torch.rand(3, 1, 8, 8) > 0.5).float()
    together = segmentation_losses(logits, targets, 1, 1)
    alone = torch.cat([segmentation_losses(logits[i : i + 1], targets[i : i + 1], 1, 1) for i in range(3)])
    assert torch.allclose(together, alone)


def test_half_precision_logits_are_computed_in_full():
    logits, targets = torch.randn(2, 1, 200, 200).half(), torch.ones(2, 1, 200, 200)
    assert segmentation_losses(logits, targets, 1, 1).dtype == torch.float32
