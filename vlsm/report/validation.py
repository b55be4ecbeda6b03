"""Predictions of a trained checkpoint for some validation images."""

from collections.abc import Sequence
from typing import Any

from vlsm import storage
from vlsm.checkpoints import SETTINGS_NAME, build_checkpoint, read_checkpoint
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.overview import spread
from vlsm.datasets.records import RECORD, Record
from vlsm.errors import VlsmError
from vlsm.report.page import Case, Section, format_number
from vlsm.report.pictures import describe_error, draw_outlined, shorten
from vlsm.shown import public_uri
from vlsm.training.sampling import find_prompt

_MOST_IMAGES = 12  # about a second each for a large model on a CPU
_MOST_PIXELS = 25_000_000
_TITLE = "Validation predictions"


def predict_examples(
    checkpoint: str, records: Sequence[Record], reader: ExampleReader, choice: Any, is_begun: bool
) -> Section:
    """Return a section with predictions for a few validation images, the worst first, or with the reason for none.

    Args:
        checkpoint: location of the run's best checkpoint.
        records: the readable examples of the run, of all splits.
        reader: reads their images and masks.
        choice: the prompt of the training, `data.prompt`.
        is_begun: whether an epoch has ended, so that there is a checkpoint.
    """
    chosen = spread([record for record in records if record.split == "val"], _MOST_IMAGES)[:_MOST_IMAGES]
    if not chosen or not is_begun:
        reason = "no epoch has ended yet" if chosen else "there are no validation images"
        return Section("predictions", _TITLE, f"None: {reason}.")
    unusable: tuple[type[Exception], ...] = (VlsmError, OSError, RuntimeError, ValueError, TypeError, LookupError)
    unusable += storage.store_errors()
    unbuildable: tuple[type[Exception], ...] = (*unusable, ImportError)
    try:
        files = read_checkpoint(checkpoint)
        from vlsm.segmentation.segmenter import Segmenter  # here: a report without a checkpoint does not wait for torch

        segmenter = Segmenter(build_checkpoint(files, checkpoint), "cpu")
    except unbuildable as error:
        reason = describe_error({"error": str(error), "image_uri": storage.join(checkpoint, SETTINGS_NAME)})
        return Section("predictions", _TITLE, f"None: the checkpoint cannot be used. {reason}")
    stored = segmenter.settings.prompt
    cases, problems = [], []
    for record in chosen:
        try:
            cases.append(_predict(segmenter, record, reader, _prompt(record, choice, stored)))
        except unusable as error:
            problems.append(describe_error({"error": str(error), "image_uri": record.image_uri}))
    cases.sort(key=lambda case: case.numbers["dice"])
    total = sum(record.split == "val" for record in records)
    intro = (
        f"{len(cases)} of {total:,} validation images, segmented with the best checkpoint when this page was made; "
        f"the lowest Dice first. Dice is that of the image's size, the curves' is that of the model's."
    )
    if problems:
        intro += f" {len(problems)} more cannot be shown: {problems[0]}"
    return Section("predictions", _TITLE, intro, groups=[("", "", cases)], outlines=["prediction", "target"])


def _prompt(record: Record, choice: Any, stored: str) -> str:
    """Return the prompt of the training for a record; its own one if the training's was drawn or is unknown."""
    choice = choice.get(record.dataset) if isinstance(choice, dict) else choice
    try:
        return find_prompt(record, choice if isinstance(choice, str) else RECORD, stored, "data.prompt")
    except VlsmError:
        return find_prompt(record, RECORD, stored, "data.prompt")


def _predict(segmenter: Any, record: Record, reader: ExampleReader, prompt: str) -> Case:
    """Return the case of one image.

    Raises:
        VlsmError: its files cannot be read.
        ValueError: it is too large.
    """
    from vlsm.segmentation.metrics import dice_score

    example = reader.read(record)
    if example.image.size > 3 * _MOST_PIXELS:
        raise ValueError(f"{record.image_uri} has more than {_MOST_PIXELS:,} pixels")
    target, mask = example.target.mask, segmenter.segment([example.image], prompt, allow_equal_masks=True)[0]
    dice = dice_score(mask, target)
    picture = draw_outlined(example.image, (mask, target), is_case=False)
    name = public_uri(record.image_uri).rpartition("/")[2] + (f" {record.image_selector}" * bool(record.image_selector))
    facts = [("Dice", format_number(dice)), ("Prompt", shorten(prompt, 60)), ("Dataset", shorten(record.dataset, 40))]
    return Case(shorten(name, 200), (picture.card,), picture.problem, facts, {}, {"dice": dice})
