"""The readers of the product, each as a function of the files in the current folder.

A reader returns the number of things that it has read. It raises a VlsmError, or returns 0, if it refuses the files.
Commands are called as a user calls them: their own exit code is the answer, and any exception is a fault.
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from jobs.benchmarks.fuzz_mutations import WAY
from jobs.benchmarks.fuzz_server import AnswerServer
from jobs.benchmarks.stores import free_port
from vlsm.archive.archive import open_archive
from vlsm.archive.carried import Carry
from vlsm.config import MemberSettings, RunSettings, SegmentSettings, TileSettings, load_settings
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.read import read_dataset
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ImageError, VlsmError
from vlsm.images.formats import Look
from vlsm.images.reader import Reader
from vlsm.runs.carried import RESERVED
from vlsm.runs.results import read_masks

# small limits, so that the memory of a try shows whether they hold
MAX_PIXELS, MAX_BYTES = 4_000_000, 1 << 25
_RUN = RunSettings(image_timeout_s=2, outage_patience_s=0)
_MOST_READ = 8  # images of a file that are decoded; all of them are listed


def read_images(uri: str = ".") -> int:
    """List the images at a location as a run's planner does, and decode some of them, as images and as masks."""
    settings = SegmentSettings(
        input=uri,
        output="",
        members=(MemberSettings(checkpoint=""),),
        max_pixels=MAX_PIXELS,
        max_image_bytes=MAX_BYTES,
        run=_RUN,
    )
    look = Look(tile=TileSettings(size=64))  # so that sizes are read while listing
    reader, num_read = Reader(settings), 0
    rows = iter(open_archive(uri, ("polyp",), look=look, carry=Carry("all", RESERVED)).rows)
    for row in itertools.islice(rows, _MOST_READ):
        with contextlib.suppress(ImageError):
            content, frame = reader.open(row)
            content.decode(frame)
            num_read += 1
            content.labels(frame)
    for _ in rows:  # the rest is listed only
        pass
    return num_read


def read_list() -> int:
    """Read the images that a list names."""
    return read_images(str(next(Path().glob("list.*"), "list.csv")))


def read_labelled() -> int:
    """Read a labelled dataset: its records, and the image and the mask of some."""
    lists = [*Path("d").glob("list.*"), *Path("d").glob("coco.json")]
    settings = DatasetSettings(
        max_pixels=MAX_PIXELS, max_image_bytes=MAX_BYTES, classes=_classes(), prompts={"x": ("polyp",)}
    ).grouping(("split", "site"))
    records = read_dataset("x", str(lists[0]) if lists else "d", settings)
    reader, num_read = ExampleReader(settings, _RUN), 0
    for record in records[:_MOST_READ]:
        with contextlib.suppress(ImageError):
            reader.read(record)
            num_read += 1
    return num_read


def _classes() -> dict[int | str, Any]:
    return {1: "polyp"} if Path("d/labels").exists() else {}


def read_settings_file() -> int:
    """Read settings as `--config` of segment, train and sweep."""
    (path,) = Path().glob("*.yaml")
    module, name = {
        "segment": ("vlsm.config", "SegmentSettings"),
        "train": ("vlsm.training.settings", "TrainSettings"),
        "sweep": ("vlsm.evaluation.sweep", "SweepSettings"),
    }[path.stem]
    arguments: dict[str, Any] = {"input": "i"} if path.stem == "segment" else {"datasets": {"x": "d"}}
    load_settings(getattr(import_module(module), name), str(path), [], arguments | {"output": "o"})
    return 1


def read_checkpoint() -> int:
    """Load a checkpoint."""
    import vlsm

    vlsm.load_checkpoint("c")
    return 1


def read_output() -> int:
    """Read the OUTPUT of a segment run in the way that a file names."""
    way = _way()
    if way == "masks":
        return sum(1 for _ in read_masks("o"))
    return _command("vlsm.export", "o", "e", "--format", way[1:]) if way.startswith("=") else _read_run(way)


def read_training() -> int:
    """Read the OUTPUT of a training in the way that a file names."""
    from vlsm.training.run import read_examples
    from vlsm.training.state import read_state

    way = _way()
    if way == "state":
        return int(read_state("o") is not None)
    return len(read_examples("o")) if way == "examples" else _read_run(way)


def _read_run(way: str) -> int:
    if way == "report":
        return _command("vlsm.report", "o", "report.html")
    return _command(f"jobs.{way}", "o")


def _way() -> str:
    return Path(WAY).read_text(encoding="utf-8")


def read_evaluation() -> int:
    """Write the report of an evaluation."""
    return _read_run("report")


def read_http() -> int:
    """Read a file from a web server that sends the damaged answer."""
    (path,) = Path().iterdir()
    with AnswerServer(path.read_bytes(), path.read_bytes()) as address:
        return read_images(f"http://{address}/{path.name}")


def read_s3() -> int:
    """List and read a bucket of a store that sends the damaged answers."""
    listing, content = (path.read_bytes() if path.exists() else b"" for path in (Path("listing"), Path("object")))
    import s3fs

    s3fs.S3FileSystem.retries = 1
    port = _s3_port()
    with AnswerServer(listing, content, port) as address, _environment(AWS_ENDPOINT_URL=f"http://{address}"):
        return read_images("s3://b")


@functools.cache
def _s3_port() -> int:
    """Return one port for all tries: a client of S3 takes long to make, and is kept with its address."""
    return free_port()


READERS: dict[str, Callable[[], int]] = {
    **dict.fromkeys(("image", "tiff", "dicom", "volume", "video", "archive", "parquet"), read_images),
    "list": read_list,
    "dataset": read_labelled,
    "settings": read_settings_file,
    "checkpoint": read_checkpoint,
    "output": read_output,
    "training": read_training,
    "evaluation": read_evaluation,
    "http": read_http,
    "s3": read_s3,
}


def _command(module: str, *words: str) -> int:
    """Run a command in this process; return 1 if it has done its work.

    Raises:
        VlsmError: it has refused its files, with exit code 1 or 2.
        RuntimeError: it has another exit code.
    """
    name = module if module.startswith("jobs") else f"{module}.__main__"
    code = import_module(name).main(list(words))
    if code in (1, 2):
        raise VlsmError(f"{module} ended with exit code {code}")
    if code:
        raise RuntimeError(f"{module} ended with exit code {code}")
    return 1


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    settings = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"} | variables
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
