"""The command that makes a proved segment run a table of another engine.

`python -m vlsm.publish OUTPUT --to delta`
"""

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Iterator

from vlsm import storage
from vlsm.commands import new_parser
from vlsm.errors import ConfigError, VlsmError
from vlsm.runs.links import refuse_inside
from vlsm.shown import say, say_error, set_up_logging
from vlsm.words import count

_EXAMPLES = (
    "masks --to delta",
    "s3://bucket/masks --to iceberg --catalog prod --name vision.polyps",
    "masks by_site --to parquet --partition-by site",
)
_PACKAGES = {"delta": "deltalake", "iceberg": "pyiceberg", "lance": "pylance", "duckdb": "duckdb"}
_OPTIONS = {"partition-by": ("parquet", "delta"), "catalog": ("iceberg",), "name": ("iceberg", "duckdb")}
_NAME = "vlsm.masks"
ENGINES = ("delta", "iceberg", "lance", "duckdb", "parquet")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser("vlsm.publish", str(main.__doc__), _EXAMPLES)
    parser.add_argument("output", metavar="OUTPUT", help="OUTPUT of a finished segment run; local or s3://")
    parser.add_argument(
        "place",
        metavar="DEST",
        nargs="?",
        help="iceberg: folder of a catalog; lance, parquet, and delta with DEST: of a copy; duckdb: a file",
    )
    parser.add_argument("--to", required=True, choices=ENGINES, help="the engine; parquet: folders by --partition-by")
    parser.add_argument("--catalog", metavar="NAME", help="a catalog in the settings of pyiceberg, instead of DEST")
    parser.add_argument("--name", help=f"table of iceberg, view of duckdb. Default: {_NAME}")
    parser.add_argument(
        "--partition-by", action="append", default=[], metavar="COLUMN", help="of a copy: a folder for each value"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Publish a proved segment run as a table of another engine, without a copy where it can be."""
    args = make_parser().parse_args(argv)
    set_up_logging()
    try:
        place, is_there, number = publish(args.output, args.place, args.to, args.catalog, args.name, args.partition_by)
    except (VlsmError, OSError, ValueError) as error:
        say_error(error)
        return 2 if isinstance(error, ConfigError) else 1
    state = "already there, with" if is_there else "published, with"
    say(f"{state} {count(number, 'row')}: {place}")
    return 0


def publish(  # noqa: PLR0913 - the arguments of the command
    output: str,
    place: str | None,
    engine: str,
    catalog: str | None = None,
    name: str | None = None,
    partition_by: list[str] | None = None,
) -> tuple[str, bool, int]:
    """Publish a run, and return its place, whether it was there already, and its number of rows.

    Raises:
        ConfigError: an argument is wrong, or a package is missing.
        ResultError: the run is not proved, or the table does not have its rows.
    """
    _require(engine)
    for option, value in {"partition-by": partition_by, "catalog": catalog, "name": name}.items():
        if value and engine not in _OPTIONS[option]:
            engines = " and ".join(f"--to {each}" for each in _OPTIONS[option])
            raise ConfigError(f"--{option} is for {engines}, not for --to {engine}")
    name, columns = name or _NAME, partition_by or []
    from vlsm.publish import copies, delta, duckdb_view, iceberg
    from vlsm.publish.proved import prove

    if place is not None:
        place = storage.absolute(place)
        refuse_inside("DEST", place, storage.absolute(output))
    run = prove(storage.absolute(output))
    with _name_engine(engine):
        if engine == "delta":
            found = delta.publish_delta(run, place, columns)
        elif engine == "iceberg":
            found = iceberg.publish_iceberg(run, place, catalog, name if "." in name else f"vlsm.{name}")
        elif engine == "lance":
            found = copies.publish_lance(run, place)
        elif engine == "duckdb":
            found = duckdb_view.publish_duckdb(run, place, name.rpartition(".")[2])
        else:
            found = copies.publish_folders(run, place, columns)
    return *found, run.rows.number


def _require(engine: str) -> None:
    package = _PACKAGES.get(engine)
    if package is not None and importlib.util.find_spec("lance" if engine == "lance" else package) is None:
        raise ConfigError(f"--to {engine} needs the package {package}: pip install 'vlsm[publish]'")


@contextlib.contextmanager
def _name_engine(engine: str) -> Iterator[None]:
    """Turn the errors of the engines' libraries, which have no class in common, into one sentence."""
    try:
        yield
    except VlsmError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"--to {engine} failed: {reason}") from error


if __name__ == "__main__":
    sys.exit(main())
