"""Everything that the records of a job lack, in one error: whoever adds one thing should not meet the next one then."""

from collections.abc import Callable, Sequence

from vlsm.datasets.records import Record
from vlsm.datasets.splits import MAKE, describe_missing_splits
from vlsm.errors import ConfigError, ManifestError


def require_complete(
    records: Sequence[Record],
    choose: Callable[[Record], object],
    split_advice: str | None = MAKE,
    more: Callable[[], None] = lambda: None,
) -> None:
    """Raise one error if records lack a split or a prompt.

    Args:
        records: of all datasets of the job.
        choose: chooses the prompts of a record; it raises a ManifestError if there is none.
        split_advice: what gives the records splits; None: they need none.
        more: another check; its ConfigError is part of the error.

    Raises:
        ConfigError: something is missing; the message has all settings to add.
        ManifestError: a record has words, but no prompt of the kind that a setting asks for.
    """
    phrases, advice, settings = list[str](), list[str](), list[str]()
    if split_advice is not None and (phrase := describe_missing_splits(records)):
        phrases.append(phrase)
        (settings if split_advice == MAKE else advice).append(split_advice)
    try:
        more()
    except ConfigError as error:
        phrases.append(str(error))
    failed: dict[str, ManifestError] = {}
    for record in records:
        try:
            choose(record)
        except ManifestError as error:
            if record.has_words:
                raise
            failed.setdefault(record.dataset, error)
    if failed:
        one = len(failed) == 1
        names = ", ".join(failed)
        phrases.append(f"{'dataset' if one else 'datasets'} {names} {'has' if one else 'have'} no prompt")
        settings += [f"--set data.prompts.{name}=WORDS" for name in failed]
    if phrases:
        words = f"add {' '.join(settings)}" if settings else ""
        words += " (WORDS: the thing that the masks show, such as polyp)" if failed else ""
        raise ConfigError("; ".join([*phrases, *advice, *([words] if words else [])]))
