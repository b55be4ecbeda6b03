"""The command that lists the images of a segment run that a person should label next.

`python -m vlsm.select OUTPUT LIST --count 200 --by uncertainty,diversity`
"""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from vlsm import storage
from vlsm.commands import add_allow, new_parser
from vlsm.errors import ConfigError, VlsmError
from vlsm.runs.links import refuse_inside
from vlsm.runs.reading import open_reader
from vlsm.runs.record import read_record, read_summary
from vlsm.runs.results import check_columns, open_results
from vlsm.runs.tables import Tables, name_damage, open_table
from vlsm.select.candidates import read_candidates
from vlsm.select.choosing import RANDOM, REASONS, Wish, choose
from vlsm.select.labelled import Labelled
from vlsm.select.lists import check_list, make_list, write_list
from vlsm.select.looks import Looks
from vlsm.shown import say, say_error, set_up_logging
from vlsm.words import count

logger = logging.getLogger("vlsm")


@dataclass(frozen=True)
class Scope:
    """Which images of a run may be chosen.

    Attributes:
        prompt: only masks of this prompt; None for all.
        group: column whose values are groups; None for none.
        exclude: lists or folders of images that are labelled already.
        allow: places whose images may be read again, if OUTPUT is in a store and they lie outside of it.
    """

    prompt: str | None = None
    group: str | None = None
    exclude: Sequence[str] = ()
    allow: Sequence[str] = ()


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    examples = (
        "masks next.csv --count 200",
        "masks next.parquet --count 200 --by uncertainty,area,diversity --group patient_id --per-group 2 --random 0.1",
        "masks next.csv --count 50 --exclude trained/examples.parquet",
    )
    parser = new_parser("vlsm.select", str(main.__doc__), examples)
    parser.add_argument("output", metavar="OUTPUT", help="the OUTPUT of a segment run; local or s3://")
    parser.add_argument("list", metavar="LIST", help="the list to write, .csv or .parquet; local or s3://")
    parser.add_argument("--count", type=int, default=100, metavar="N", help="number of images (default: 100)")
    parser.add_argument(
        "--by",
        default="uncertainty,diversity",
        metavar="WORDS",
        help=f"criteria, of {', '.join(REASONS)}, with commas (default: uncertainty,diversity)",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="only masks of this prompt (default: all prompts)")
    parser.add_argument("--group", metavar="COLUMN", help="column of OUTPUT whose values are groups, as patient_id")
    parser.add_argument("--per-group", type=int, metavar="N", help="most images of one group (default with --group: 1)")
    parser.add_argument(
        "--random", type=float, default=0.0, metavar="SHARE", help="share of the images that are chosen at random (0)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random choices (0)")
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="LIST",
        help="list or folder of images that are labelled already; repeatable",
    )
    add_allow(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """List the images of a segment run that a person should label next."""
    parser = make_parser()
    args = parser.parse_args(argv)
    by = tuple(dict.fromkeys(word.strip() for word in args.by.split(",")))
    if unknown := [word for word in by if word not in REASONS]:
        parser.error(f"--by has {unknown[0]!r}; it takes {', '.join(REASONS)}, with commas")
    if args.count < 1:
        parser.error(f"--count is {args.count}; it must be 1 or more")
    if not 0 <= args.random <= 1:
        parser.error(f"--random is {args.random:g}; it must be a share from 0 to 1, such as 0.1")
    if args.per_group is not None and (args.group is None or args.per_group < 1):
        parser.error("--per-group needs --group COLUMN, and must be 1 or more")
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}; it must be 0 or more")
    set_up_logging()
    wish = Wish(args.count, by, (args.per_group or 1) if args.group else None, args.random, args.seed)
    scope = Scope(args.prompt, args.group, args.exclude, args.allow)
    failures: tuple[type[Exception], ...] = (VlsmError, OSError, ValueError, *storage.store_errors())
    try:
        say(select_images(args.output, args.list, wish, scope))
    except failures as error:
        say_error(error)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def select_images(output: str, list_uri: str, wish: Wish, scope: Scope | None = None) -> str:
    """Write the list of the images that a person should label next, and return a sentence about it.

    Args:
        output: OUTPUT of a segment run, finished or not.
        list_uri: the list to write, .csv or .parquet. It must not exist.
        wish: what is to be chosen.
        scope: which images may be chosen; None for all.

    Raises:
        ConfigError: there is no segment run at OUTPUT, it lacks a column, a prompt or enough images, or LIST exists.
        ManifestError: a list of labelled images cannot be read.
        ResultError: a file of OUTPUT is damaged.
    """
    output, list_uri, scope = storage.absolute(output), storage.absolute(list_uri), scope or Scope()
    check_list(list_uri)
    with storage.name_errors("OUTPUT", output):
        tables = open_results(output)
    refuse_inside("LIST", list_uri, output)
    with name_damage(f"OUTPUT {output!r}"):
        if scope.group is not None:
            _check_group(scope.group, tables.schema)
        if read_summary(output) is None:
            logger.warning("%s is not finished: images are chosen among those that are segmented so far", output)
        labelled = Labelled(scope.exclude) if scope.exclude else None
        candidates = read_candidates(tables, scope.prompt, scope.group, labelled)
        if labelled is not None:
            found = candidates.images["labelled"]
            logger.info(
                "%s of OUTPUT are labelled already (--exclude names %s)", count(found, "image"), f"{len(labelled):,}"
            )
        config = (read_record(output) or {}).get("config", {})
        looks = Looks(tables, _has_embeddings(tables), lambda: open_reader(config, output, scope.allow))
        choices = choose(candidates, wish, looks)
        write_list(list_uri, make_list(tables, candidates, choices))
    reasons = Counter(choice.why for choice in choices)
    if 0 < wish.random_share and not reasons[RANDOM]:
        logger.warning("--random %g of %s is no image", wish.random_share, count(wish.number, "image"))
    told = ", ".join(f"{number:,} {why.replace(', ', ' and ')}" for why, number in reasons.items())
    others = [(candidates.images[name], name) for name in ("labelled", "failed", "vanished")]
    left_out = "".join(f"; {number:,} {name}" for number, name in others if number)
    return f"{list_uri}: {len(choices):,} of {count(candidates.num_images, 'image')} ({told}){left_out}"


def _check_group(name: str, schema: pa.Schema) -> None:
    check_columns([name], schema)
    if pa.types.is_nested(schema.field(name).type):
        raise ConfigError(f"--group {name}: the column has lists; groups need texts or numbers")


def _has_embeddings(tables: Tables) -> bool:
    """Return whether the run kept embeddings; its first part file tells it."""
    return "embedding" in open_table(tables.uris[0], tables.schema).parquet.schema_arrow.names


if __name__ == "__main__":
    sys.exit(main())
