"""The command that shows what datasets are taken for.

`python -m vlsm.datasets URI`
"""

import argparse
import io
import re
import sys
from pathlib import PurePosixPath

from PIL import Image

from vlsm import storage
from vlsm.commands import new_parser
from vlsm.config import PlaceSettings, Settings, load_settings
from vlsm.datasets.contact_sheet import draw_contact_sheet
from vlsm.datasets.overview import describe_overview, inspect_dataset
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ConfigError, ManifestError, VlsmError
from vlsm.images.preprocess import Square
from vlsm.shown import public_uri, say, say_error, set_up_logging
from vlsm.words import count


class OverviewSettings(Settings):
    """The settings of the command; they have the same names in a training."""

    data: DatasetSettings = DatasetSettings()
    run: PlaceSettings = PlaceSettings()


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(
        "vlsm.datasets",
        str(main.__doc__),
        ("data/kvasir --sheet kvasir.png", "own=s3://bucket/own --limit 0", "labels.csv --set data.mask_threshold=0"),
        OverviewSettings,
        (
            "data.mask_threshold",
            "data.classes",
            "data.prompts",
            "data.columns",
            "data.join_masks",
            "data.skip_unpaired",
        ),
        "exit codes: 0 done, 1 files cannot be read, 2 no dataset there, or usage wrong",
    )
    parser.add_argument(
        "datasets", nargs="+", metavar="[NAME=]URI", help="a folder, prefix or list, as --dataset of jobs.train"
    )
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="one setting; may be repeated")
    parser.add_argument(
        "--sheet", metavar="FILE", help="write a picture (PNG) of examples with outlines of their masks"
    )
    parser.add_argument(
        "--limit", type=int, default=300, help="most images to inspect per dataset, 0 for all (default: %(default)s)"
    )
    parser.add_argument("--size", type=int, metavar="PIXELS", help="count lesions that vanish at this size of a model")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Show what labelled datasets are taken for: splits, prompts, masks, sizes and problems. Nothing is trained."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.size is not None and args.size < 1:
        parser.error(f"--size is {args.size}; it must be 1 or more")
    if args.limit < 0:
        parser.error(f"--limit is {args.limit}; it must be 0 or more")
    if args.sheet and not args.sheet.lower().endswith(".png"):
        parser.error(f"--sheet is {args.sheet!r}; its name must end with .png")
    set_up_logging()
    failures: tuple[type[Exception], ...] = (VlsmError, OSError, *storage.store_errors())
    try:
        show_datasets(args.datasets, args.set, args.sheet, args.limit, args.size)
    except failures as error:
        say_error(error)
        return 2 if isinstance(error, ConfigError | ManifestError) else 1
    return 0


def show_datasets(words: list[str], assignments: list[str], sheet: str | None, limit: int, size: int | None) -> None:
    """Print what datasets are taken for, and write the contact sheet.

    Args:
        words: the datasets, each as URI or NAME=URI.
        assignments: settings as key=value.
        sheet: location of the PNG; None for none.
        limit: most records to inspect per dataset; 0 for all.
        size: side of a model's input in pixels, to find lesions that vanish; None for none.
    """
    overview = load_settings(OverviewSettings, None, assignments, {})
    settings = overview.data.allowing(overview.run.allow)
    square = None if size is None else Square(size)
    overviews = []
    for name, uri in _name_datasets(words).items():
        overviews.append(inspect_dataset(name, uri, settings, limit, square))
        say("\n".join(describe_overview(overviews[-1])), end="\n\n")
    names = [name for each in overviews for name in (each.name, *(record.dataset for record in each.records))]
    settings.refuse_unknown(names)
    if sheet is not None:
        buffer = io.BytesIO()
        picture, shown = draw_contact_sheet(overviews)
        Image.fromarray(picture).save(buffer, "PNG")
        storage.write_bytes(storage.absolute(sheet), buffer.getvalue())
        total = sum(len(each.records) for each in overviews)
        spread = "" if shown == total else ", spread evenly, those with problems last"
        say(f"{sheet}: {shown:,} of {count(total, 'example')}{spread}, with outlines of their masks")


def _name_datasets(words: list[str]) -> dict[str, str]:
    """Return the datasets by name. The name of a URI without one is its last part, without the ending of a list.

    Raises:
        ConfigError: two datasets have the same name.
    """
    datasets: dict[str, str] = {}
    for word in words:
        match = re.fullmatch(r"([^/=:]+)=(.+)", word)
        uri = storage.absolute(match[2] if match else word)
        name = match[1] if match else PurePosixPath(public_uri(uri).partition("?")[0].rstrip("/")).stem
        if name in datasets:
            raise ConfigError(f"two datasets have the name {name}; give one of them another name, as NAME={word}")
        datasets[name] = uri
    return datasets


if __name__ == "__main__":
    sys.exit(main())
