"""One way to read the datasets for several trainings and the evaluation that compares them."""

from collections.abc import Mapping
from typing import Any

from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ConfigError


def share_settings(trainings: Mapping[str, DatasetSettings], evaluation: DatasetSettings) -> DatasetSettings:
    """Return the settings with which all trainings read their datasets.

    Args:
        trainings: settings of the trainings, by their names in messages, at least one.
        evaluation: settings of the evaluation; those that it states must be the same.

    Raises:
        ConfigError: two trainings, or a training and the evaluation, read the datasets in different ways.
    """
    shared: dict[str, Any] = {}
    for name in DatasetSettings.model_fields:
        values = {key: getattr(data, name) for key, data in trainings.items()}
        if name in evaluation.model_fields_set:
            values["evaluate"] = getattr(evaluation, name)
        first, *others = values
        shared[name] = values[first]
        if different := [key for key in others if values[key] != values[first]]:
            raise ConfigError(
                f"data.{name} is {values[first]!r} in {first} and {values[different[0]]!r} in {different[0]}; all "
                f"models are trained and scored on the same data: set train.data.{name} only"
            )
    return DatasetSettings(**shared)
