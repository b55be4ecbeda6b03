"""Words of a report: how columns and metrics are called there, and what they mean."""

from collections.abc import Iterable
from typing import Any

from vlsm.datasets.records import LABELS

OF_LIST = "list "  # begins the names of columns of the user's list, which may be names of ours too
_LABELS = {
    "agreement": "Agreement",
    "area_fraction": "Area fraction",
    "asd_median": "median surface distance",
    "asd_n": "masks with surface distance",
    "bad_found": "bad masks marked for review",
    "bad_n": "bad masks",
    "components_n": "components of the masks",
    "confidence": "Confidence",
    "dataset": "Dataset",
    "dice": "Dice",
    "dice_high": "Dice, upper end",
    "dice_low": "Dice, lower end",
    "dice_mean": "mean Dice",
    "dice_median": "median Dice",
    "dice_sd": "Dice, deviation",
    "difference": "Dice less baseline",
    "difference_n": "masks in this difference",
    "false_area_mean": "false area",
    "hd95_median": "median Hausdorff distance",
    "hd95_n": "masks with Hausdorff distance",
    "iou_mean": "mean IoU",
    "lesion_dice_mean": "mean Dice per lesion",
    "lesion_f1": "lesion F1",
    "lesion_precision": "lesion precision",
    "lesion_recall": "lesion recall",
    "lesions_n": "lesions",
    "mask": "Mask",
    "n": "scored masks",
    "n_failed": "failed",
    "negatives_n": "images without the finding",
    "nsd_mean": "normalised surface distance",
    "nsd_mm_mean": "normalised surface distance, mm",
    "nsd_mm_n": "masks with distance in mm",
    "p": "p value",
    "panoptic_quality": "panoptic quality",
    "patients_n": "patients",
    "positive_dice_mean": "mean Dice with finding",
    "precision_mean": "mean precision",
    "presence_auroc": "AUROC",
    "presence_threshold": "threshold of presence",
    "prompt": "Prompt",
    "prompt_class": "kind of prompt",
    "prompt_name": "Prompt's name",
    "recall_mean": "mean recall",
    "reference_dice_mean": "Dice with the reference prompt's mask",
    "review": "Review",
    "review_n": "masks marked for review",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "split": "Split",
    "status": "Status",
    "system": "System",
    "touch_f1": "touching F1",
    "touch_precision": "touching precision",
    "touch_recall": "touching recall",
}
_NOTES = {
    "agreement": "mean Dice between the masks of an ensemble's members, from 0 to 1; one model has none",
    "area_fraction": "foreground pixels as a share of the image; 0 is an empty mask",
    "asd_median": "mean distance between the two outlines, in pixels; median over the masks that have one",
    "bad_n": "masks with a Dice below 0.7",
    "components_n": "connected components of the masks, of all images together",
    "confidence": "mean probability of the pixels inside a mask, from 0 to 1; an empty mask has none. A probability "
    "belongs to one pixel: a pixel at or above the threshold is foreground. Without calibration, a high confidence "
    "does not mean that the mask is good",
    "dice": "overlap of prediction and target: 1 if they are equal, 0 if they share no pixel",
    "dice_high": "upper end of the 95 % interval of the mean",
    "dice_low": "lower end of the 95 % interval of the mean",
    "dice_sd": "standard deviation over the masks",
    "difference": "mean Dice minus the mean Dice of the first system, on the masks that both have",
    "false_area_mean": "share of an image without the finding that is marked, as a mean",
    "hd95_median": "95th percentile of the distances between the two outlines, in pixels; median over the masks",
    "iou_mean": "intersection over union, another measure of overlap; never above Dice",
    "mask": "empty: it has no foreground; whole image: it covers 98 % of the image or more",
    "lesion_dice_mean": "Dice of each lesion with all components that touch it; a missed lesion has 0",
    "lesion_f1": "harmonic mean of lesion precision and lesion recall",
    "lesion_precision": "share of the components that match a lesion: intersection over union above 0.5",
    "lesion_recall": "share of the lesions that a component matches",
    "lesions_n": "connected components of the labels, of all images together",
    "negatives_n": "labels that are empty; their Dice is 1 if the mask is empty, else 0",
    "nsd_mean": "share of both outlines that are near each other: within nsd_tolerance_px pixels",
    "nsd_mm_mean": "the same within nsd_tolerance_mm millimetres, over the masks whose files state the size of a pixel",
    "p": "probability of such a difference by chance (Wilcoxon's signed-rank test), not corrected for many comparisons",
    "patients_n": "patients of these images: intervals and p count them, not images",
    "panoptic_quality": "lesion F1 times the mean intersection over union of the matches",
    "positive_dice_mean": "mean Dice over the labels that are not empty",
    "precision_mean": "share of the predicted pixels that are right",
    "presence_auroc": "area under the ROC curve of the highest probability of an image; 0.5 is chance",
    "presence_threshold": "highest probability from which an image counts as showing the finding; none: any foreground",
    "prompt_class": "known beforehand: the text does not depend on the mask (in files: honest). Reveals the answer: "
    "it describes the mask, or differs where it is empty (upper_bound). Other words: texts that test how much a model "
    "reads (robustness)",
    "recall_mean": "share of the target's pixels that are found",
    "review": "why a person should look at a mask: low confidence, low agreement, odd area",
    "sensitivity": "share of the images with the finding that the system says show it",
    "specificity": "share of the images without the finding that it does not say show it",
    "split": "train: the model learned from it; val: it chose the best epoch; test: neither",
    "status": "ok, failed (the image could not be read) or vanished (it is no longer in the archive)",
    "error before": "expected calibration error without the temperature: mean gap of probability and true share",
    "error after": "expected calibration error with the temperature",
    "temperature": "the model's raw values are divided by it before they become probabilities",
    "threshold": "lowest probability of a foreground pixel",
    "touch_f1": "harmonic mean of touching precision and recall",
    "touch_precision": "share of the components that touch any lesion",
    "touch_recall": "share of the lesions that any component touches",
}


_VALUES = {
    "prompt_class": {"honest": "known beforehand", "upper_bound": "reveals the answer", "robustness": "other words"},
    "prompt_name": LABELS,
}


def name_value(column: str, value: Any) -> Any:
    """Return what people call a stored value, such as "known beforehand" for the prompt_class "honest"."""
    return _VALUES.get(column, {}).get(value, value) if isinstance(value, str) else value


def label(name: str) -> str:
    """Return what people call a column. An unknown name stays, without underscores; that of a list as it is."""
    if name.startswith(OF_LIST):
        return name.removeprefix(OF_LIST)
    return _LABELS.get(name, name.replace("_", " "))


def title(name: str) -> str:
    """Return the label with a capital at its start."""
    text = label(name)
    if name.startswith(OF_LIST):
        return text
    return text[:1].upper() + text[1:]


def explain(name: str) -> str:
    """Return what a column means, or "" if its name says it."""
    return _NOTES.get(name.removeprefix("median ").replace(" ", "_"), _NOTES.get(name, ""))


def explain_all(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return label and meaning of the columns that need words, in their order, each once."""
    known = {explain(name): title(name.removeprefix("median ").replace(" ", "_")) for name in names if explain(name)}
    return [(word, meaning) for meaning, word in known.items()]
