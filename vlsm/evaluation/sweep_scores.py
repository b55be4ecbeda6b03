"""The scores of an evaluation as results of the trials of a sweep."""

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vlsm.errors import ResultError
from vlsm.evaluation.sweep import Trial


def average_scores(scores: pa.Table, trials: Iterable[Trial]) -> list[dict[str, Any]]:
    """Return the results of a group of trials, as rows for `tabulate`: one per trial, test dataset and prompt.

    Args:
        scores: rows of an evaluation, with the columns system, dataset, prompt_name, prompt_class, status and dice.
        trials: trials of the group.

    Raises:
        ResultError: the scores are those of other systems.
    """
    keys = ["system", "dataset", "prompt_name", "prompt_class"]
    scores = scores.append_column("is_failed", pc.not_equal(scores["status"], "ok"))
    means = scores.group_by(keys, use_threads=False).aggregate([("dice", "mean"), ("is_failed", "sum")])
    by_system = {trial.system: trial for trial in trials}
    if others := set(means["system"].to_pylist()) - by_system.keys():
        raise ResultError(f"the evaluation has scores of another system, {min(others)!r}; remove its summary.json")
    return [
        {
            "trained_on": by_system[row["system"]].dataset,
            "dataset": row["dataset"],
            "prompt": row["prompt_name"],
            "prompt_class": row["prompt_class"],
            "model": by_system[row["system"]].model,
            "seed": by_system[row["system"]].seed,
            "fold": by_system[row["system"]].fold,
            "num_failed": row["is_failed_sum"],
            "dice": row["dice_mean"],
        }
        for row in means.to_pylist()
    ]
