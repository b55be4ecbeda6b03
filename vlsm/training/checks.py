"""Checks of a training before it begins: data and settings that can only fail, or teach something wrong."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlsm.config import parse_range
from vlsm.datasets.inspection import Facts
from vlsm.datasets.mask_checks import find_all_negative, find_useless_masks
from vlsm.datasets.records import Record
from vlsm.errors import ConfigError, ManifestError, VlsmError
from vlsm.training.sampling import ExampleOrder, find_texts, weigh_datasets
from vlsm.training.settings import TrainSettings

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from vlsm.models.contract import SegmentationModel

_PLACES = re.compile(
    r"\b(left|right|upper|lower|top|bottom|above|below|superior|inferior|anterior|posterior"
    r"|cranial|caudal|dorsal|ventral)(most)?\b",
    re.IGNORECASE,
)
_LARGEST_TURN = 45  # degrees; a larger rotation can bring the top of an image to its side
_SHOWN = 3


def check_training(
    settings: TrainSettings, records: Sequence[Record], facts: Sequence[Facts], model: "SegmentationModel"
) -> tuple[list[str], list[VlsmError]]:
    """Return warnings, and the errors that keep the training from beginning. The first error is the most basic one.

    Args:
        settings: settings of the run.
        records: all records.
        facts: the facts of their files.
        model: the model that learns, in training mode.
    """
    usable = [record for record, fact in zip(records, facts, strict=True) if not fact.error]
    errors: list[VlsmError] = []
    if (num_broken := len(records) - len(usable)) and not settings.data.skip_broken:
        errors.append(
            ManifestError(
                f"{num_broken:,} of {len(records):,} records are broken, as listed above; repair them, "
                "or --set data.skip_broken=true to leave them out"
            )
        )
    useless = find_useless_masks(records, facts, settings.data.mask_threshold)
    useless += find_all_negative(records, facts, ("train", "val"))
    if useless and not settings.data.allow_empty_masks:
        errors.append(ConfigError(f"{'; '.join(useless)} (if they are right: --set data.allow_empty_masks=true)"))
    warnings = [*(useless if settings.data.allow_empty_masks else []), *warn_of_places(settings, usable)]
    try:
        require_train_and_val(usable, settings, num_broken)
        warnings += check_sampling(settings, usable)
        warnings += check_negatives(settings, records, facts)
        num_workers = parse_range(settings.run.workers, 1)[1]
        warnings += check_batch_norms(model, ExampleOrder(usable, settings, 0, num_workers))
    except ConfigError as error:
        errors.append(error)
    return warnings, errors


def require_train_and_val(records: Sequence[Record], settings: TrainSettings, num_broken: int = 0) -> None:
    """Raise ConfigError if there are no train records or no val records.

    Args:
        records: the records that can be used.
        settings: settings of the run, for the names of the datasets.
        num_broken: number of broken records beside them.
    """
    for split, purpose in (("train", "train"), ("val", "choose the best epoch")):
        if not any(record.split == split for record in records):
            counts = Counter(record.split for record in records)
            described = ", ".join(f"{count} {name}" for name, count in counts.items()) or "none at all"
            broken = f", {num_broken:,} broken" if num_broken else ""
            advice = ": --set data.split.val=0.1 takes them from train" if split == "val" and counts["train"] else ""
            raise ConfigError(
                f"no {split} records in {', '.join(settings.datasets)} (there are {described}{broken}); "
                f"they are needed to {purpose}{advice}"
            )


def check_sampling(settings: TrainSettings, records: Sequence[Record]) -> list[str]:
    """Return a warning for each dataset whose weight or train records data.sampling leaves unused.

    Raises:
        ConfigError: the weights of the datasets with train records add to nothing.
    """
    sampling = settings.data.sampling
    if not isinstance(sampling, dict):
        return []
    weights = weigh_datasets((record.dataset for record in records if record.split == "train"), sampling)
    unused = [
        f"dataset {name} has train records but no weight in data.sampling" for name in weights if not weights[name]
    ]
    empty = [name for name, weight in sampling.items() if weight and name not in weights]
    return [
        *(f"{sentence}: it is not learned" for sentence in unused),
        *(f"dataset {name} has a weight in data.sampling but no train records" for name in empty),
    ]


def check_negatives(settings: TrainSettings, records: Sequence[Record], facts: Sequence[Facts]) -> list[str]:
    """Return a line with the number of negative examples for train and for val, or none where there are none.

    Raises:
        ConfigError: data.negatives asks for a share of negative examples, but there are none, or nothing else.
    """
    pairs = [(one.split, fact.area_fraction == 0) for one, fact in zip(records, facts, strict=True) if not fact.error]
    total, negative = (
        Counter(split for split, _ in pairs),
        Counter(split for split, is_negative in pairs if is_negative),
    )
    share = settings.data.negatives
    if share and negative["train"] in (0, total["train"]):
        kind = "all" if negative["train"] else "none"
        raise ConfigError(
            f"data.negatives is {share:g}, but {kind} of the {total['train']:,} train examples are negative (an empty "
            "mask); leave it out, or add examples of the other kind"
        )
    drawn = "" if share is None else f"; data.negatives makes them {share:.0%} of an epoch"
    ends = {"train": f"their mask is empty{drawn}", "val": "their Dice is 1 if the model marks nothing, else 0"}
    return [
        f"{negative[split]:,} of {total[split]:,} {split} examples are negative: {end}"
        for split, end in ends.items()
        if negative[split]
    ]


def warn_of_places(settings: TrainSettings, records: Sequence[Record]) -> list[str]:
    """Return a warning if images are flipped or turned while prompts of train records name places in them."""
    augment, choice = settings.data.augment, settings.data.prompt
    changes = []
    if augment.flip:
        changes.append("data.augment.flip mirrors images")
    if augment.rotate_degrees > _LARGEST_TURN:
        changes.append(f"data.augment.rotate_degrees={augment.rotate_degrees:g} turns images")
    if not changes:
        return []
    texts = {
        text: None
        for record in records
        if record.split == "train"
        for text in find_texts(
            record, choice if isinstance(choice, str) else choice.get(record.dataset, "p1"), "data.prompt"
        )
    }
    placed = [text for text in texts if _PLACES.search(text)]
    if not placed:
        return []
    shown = ", ".join(map(repr, placed[:_SHOWN])) + (" and others" if len(placed) > _SHOWN else "")
    return [
        f"{' and '.join(changes)}, but {len(placed):,} of {len(texts):,} prompts name places: {shown}; they are wrong "
        "for a changed image: switch it off, or choose other prompts"
    ]


def check_batch_norms(model: "SegmentationModel", order: ExampleOrder) -> list[str]:
    """Return a warning if batch norms learn from the statistics of single examples.

    Args:
        model: a model in training mode, on its device.
        order: the order of the examples of a worker.

    Raises:
        ConfigError: a batch norm would have one value per channel, for which there are no statistics.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = [name for name, part in model.named_modules() if isinstance(part, _BatchNorm) and part.training]
    settings, num_workers = order.settings, order.num_workers
    is_synchronised = settings.optim.sync_batch_norm and num_workers > 1
    if not norms or is_synchronised or order.fewest_examples > 1:
        return []
    sizes = f"optim.batch_size={settings.optim.batch_size}, run.micro_batch_size={settings.run.micro_batch_size}"
    found = f"{sizes} and {num_workers} workers make batches of one example for the model's {len(norms)} batch norms"
    advice = "set sizes that give each worker two examples or more at once"
    if starving := _find_starving(model, norms):
        raise ConfigError(f"{found}; {starving} then has one value per channel and cannot learn; {advice}")
    return [f"{found}: they learn the statistics of single images, which rarely fit others; {advice}"]


def _find_starving(model: "SegmentationModel", norms: Sequence[str]) -> str | None:
    """Return the first of the batch norms that gets one value per channel from one example, or None."""
    import torch

    starving: list[str] = []

    def watch(name: str) -> "RemovableHandle":
        def look(module: "nn.Module", inputs: "tuple[Tensor, ...]") -> None:  # inputs: (B, C, ...)
            if inputs[0].numel() == inputs[0].shape[1]:
                starving.append(name)

        return model.get_submodule(name).register_forward_pre_hook(look)

    handles = [watch(name) for name in norms]
    spec = model.image_spec
    model.eval()  # the statistics of the norms stay as they are
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, spec.size, spec.size, device=model.device), [""])
    finally:
        model.train()
        for handle in handles:
            handle.remove()
    return starving[0] if starving else None
