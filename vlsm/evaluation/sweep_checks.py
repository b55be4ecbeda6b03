"""What would end the trainings of a sweep, found before them: missing models, folders, splits and prompts."""

from collections import Counter
from collections.abc import Sequence

from vlsm import storage
from vlsm.datasets.records import Record
from vlsm.datasets.settings import SplitSettings
from vlsm.errors import ConfigError, ManifestError
from vlsm.evaluation.sweep import POOLED, SweepSettings, Trial, TrialGroup, has_lists
from vlsm.evaluation.systems import read_test_records
from vlsm.training.run import check_model, read_all_records
from vlsm.training.settings import TrainSettings
from vlsm.training.state import CHECKPOINT_NAME


def check_sweep(settings: SweepSettings, groups: Sequence[TrialGroup]) -> list[str]:
    """Read the lists of all datasets as trainings and evaluations will, and return a line for each dataset.

    No image is opened. Trials with equal data settings are read once.

    Raises:
        ConfigError: a model, a folder, splits or prompts are missing; the message has the settings of a sweep to add.
        CheckpointError, ManifestError: as for a training.
    """
    lines: dict[str, str] = {}
    checked = set[str]()
    makes_lists = has_lists(settings, groups[0].trials[0].settings.data.split)
    for group in groups:
        for trial in group.trials:
            source = _with_sources(trial, settings)
            key = f"{trial.dataset} {source.data.model_dump_json(exclude={'augment'})}"
            if trial.seed == settings.seeds[0] and group is groups[0]:
                planned = [storage.absolute(storage.join(output, CHECKPOINT_NAME)) for output in trial.needs]
                check_model(trial.settings, planned)
            if key in checked:
                continue
            checked.add(key)
            try:
                lines |= _describe(read_all_records(source))
                if not makes_lists:
                    read_test_records(group.settings)
            except (ConfigError, ManifestError) as error:
                message = (
                    str(error)
                    .replace("--set data.", "--set train.data.")
                    .replace("--set split", "--set evaluate.split")
                )
                raise type(error)(message) from error
    return list(lines.values())


def _with_sources(trial: Trial, settings: SweepSettings) -> TrainSettings:
    """Return the settings of a trial that reads the datasets themselves, not the lists that the sweep will make."""
    names = settings.datasets if trial.dataset == POOLED else (trial.dataset,)
    data = trial.settings.data
    if settings.folds is not None and data.split.is_off:  # folds need no splits
        data = data.model_copy(update={"split": SplitSettings(val=1 / settings.folds)}).allowing(data.allow)
    datasets = {name: settings.datasets[name] for name in names}
    data = data.model_copy(update={"learn_from": "train"})  # the lists have val, if any
    return trial.settings.model_copy(update={"datasets": datasets, "external": settings.external, "data": data})


def _describe(records: Sequence[Record]) -> dict[str, str]:
    counts: dict[str, Counter[str]] = {}
    for record in records:
        counts.setdefault(record.dataset, Counter())[record.split or "without a split"] += 1
    return {
        name: f"dataset {name}: {', '.join(f'{number:,} {split}' for split, number in splits.items())}"
        for name, splits in counts.items()
    }
