"""The segment job under deliberate faults, with a check of every row after each scenario.

Every scenario runs the job as a user does, disturbs it, runs it again until it is done, and then checks the output:
each planned row exists once, each mask matches its row, and all rows equal those of an undisturbed run.
"""

import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.benchmarks import torture_jobs as jobs
from jobs.benchmarks import torture_nodes as nodes
from jobs.benchmarks import torture_stores as stores
from jobs.benchmarks.figures import write_json
from jobs.benchmarks.torture_setup import Arena, CannotTortureError
from vlsm.errors import VlsmError

SCENARIOS: dict[str, Callable[[Arena], dict[str, int]]] = {
    scenario.__name__: scenario
    for scenario in (
        jobs.kill_driver,
        jobs.kill_actor,
        jobs.stop_actor,
        jobs.run_twice,
        jobs.two_versions,
        nodes.kill_node,
        nodes.restart_nodes,
        nodes.skew_clocks,
        stores.restart_store,
        stores.faulty_store,
        stores.slow_network,
        stores.stale_listing,
        stores.fill_disk,
        stores.kill_at_random,
    )
}

_NO_DISTURBANCES = ("scenario", "images", "seconds", "outcome")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `python -m jobs.benchmark torture`."""
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, help="may be repeated (default: all)")
    parser.add_argument("--images", type=int, default=1000, metavar="N", help="images in the archive (1000)")
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="of kill_at_random, at most (100)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed of images and times (0)")


def measure(args: Namespace) -> int:
    """Disturb the segment job in several scenarios, and check after each that no row is missing, duplicate or wrong."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        arena = Arena(Path(folder), args.images, seed=args.seed, num_kills=args.kills)
        arena.prepare()
        print(f"{len(arena.expected):,} rows, undisturbed: proved")
        for scenario in args.scenario or SCENARIOS:
            started_s = time.monotonic()
            try:
                disturbances = SCENARIOS[scenario](arena)
                outcome = "proved" if sum(disturbances.values()) else "proved, but nothing was disturbed"
            except CannotTortureError as error:
                disturbances, outcome = {}, f"left out: {error}"
            except VlsmError as error:
                disturbances, outcome = {}, f"FAILED: {error}"
                arena.stop()
            seconds = time.monotonic() - started_s
            counts = ", ".join(f"{count} {name}" for name, count in disturbances.items())
            print(f"{scenario:15} {seconds:7.0f} s  {counts}: {outcome}", flush=True)
            row = {"scenario": scenario, "images": args.images, "seconds": round(seconds, 1)}
            results.append(row | disturbances | {"outcome": outcome})
            write_json(args.json, "torture", {"images": args.images, "seed": args.seed, "runs": results})
    return int(any(str(result["outcome"]).startswith("FAILED") for result in results))


def tell(figures: dict[str, Any]) -> list[str]:
    """Return the measured figures as lines of Markdown for the documentation."""
    lines = [
        "The rows of each disturbed run are compared with those of an undisturbed one. The seconds are no claim.",
        "",
        "| scenario | images | seconds | disturbances | outcome |",
        "|---|---|---|---|---|",
    ]
    for result in figures["runs"]:
        images = result.get("images", figures["images"])  # earlier files have one number for all
        faults = {key: value for key, value in result.items() if key not in _NO_DISTURBANCES}
        counts = ", ".join(f"{count} {name}" for name, count in faults.items())
        words = f"{images:,} | {result['seconds']:.0f} | {counts} | {result['outcome']}"
        lines.append(f"| {result['scenario']} | {words} |")
    return lines
