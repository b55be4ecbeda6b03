"""CPU time of a client for reading an image from S3, over HTTP and over TLS."""

import os
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from jobs.benchmarks.figures import write_json
from jobs.benchmarks.stores import BUCKET, S3Server, make_certificates

CLIENTS = ("obstore", "s3fs")
_NUM_OBJECTS = 64


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `python -m jobs.benchmark s3`."""
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds; the medians count (5)")
    parser.add_argument("--gets", type=int, default=2000, metavar="N", help="images that each round reads (2000)")
    parser.add_argument("--threads", type=int, default=16, metavar="N", help="as run.fetch_threads (16)")
    parser.add_argument("--bytes", type=int, default=96_000, metavar="N", help="size of an image in bytes (96000)")


def measure(args: Namespace) -> int:
    """Measure the CPU time of a process that reads images as the job does, from a server on this machine.

    Each client has a process of its own; they take turns. Without obstore, the job reads with s3fs.
    """
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for scheme in ("http", "https"):
            folder = Path(temporary) / scheme
            certificates = make_certificates(folder / "certificates") if scheme == "https" else None
            server = S3Server(folder / "store", certificates)
            server.start()
            os.environ.update(server.environment())  # the processes inherit it
            try:
                spent = _alternate(args)
            finally:
                server.kill()
            for client, pairs in spent.items():
                core_ms, gets_per_s = (statistics.median(values) for values in zip(*pairs, strict=True))
                rows.append({"client": client, "scheme": scheme, "core_ms": core_ms, "gets_per_s": gets_per_s})
                print(f"{scheme:5} {client:8} {core_ms:.3f} core ms, {gets_per_s:.0f} GETs/s", flush=True)
    keys = ("repeats", "gets", "threads", "bytes")
    write_json(args.json, "s3", {key: getattr(args, key) for key in keys} | {"runs": rows})
    return 0


def tell(figures: dict[str, Any]) -> list[str]:
    """Return the measured figures as lines of Markdown for the documentation."""
    lines = [
        f"CPU time of the client for each GET of {figures['bytes']:,} bytes, by {figures['threads']} threads: medians "
        f"of {figures['repeats']} rounds of {figures['gets']:,} GETs. The server runs on the same cores, which bounds "
        "GETs/s.",
        "",
        "| client | over | core ms per GET | GETs/s |",
        "|---|---|---|---|",
    ]
    for row in figures["runs"]:
        lines.append(f"| {row['client']} | {row['scheme']} | {row['core_ms']:.2f} | {row['gets_per_s']:,.0f} |")
    return lines


def _alternate(args: Namespace) -> dict[str, list[tuple[float, float]]]:
    """Return the core milliseconds of a GET, and GETs per second, of each client and round; the first is a warm-up."""
    uris = [f"s3://{BUCKET}/{number}.jpg" for number in range(_NUM_OBJECTS)]
    spent: dict[str, list[tuple[float, float]]] = {client: [] for client in CLIENTS}
    pools = {client: ProcessPoolExecutor(1, get_context("spawn")) for client in CLIENTS}
    try:
        for client, pool in pools.items():
            pool.submit(_prepare, client, uris, args.bytes).result()
        for repeat in range(args.repeats + 1):
            for client, pool in pools.items():
                pair = pool.submit(_read, uris, args.gets, args.threads, args.bytes).result()
                spent[client] += [pair] if repeat else []
    finally:
        for pool in pools.values():
            pool.shutdown()
    return spent


def _prepare(client: str, uris: list[str], num_bytes: int) -> None:
    if client == "s3fs":
        sys.modules["obstore"] = None  # type: ignore[assignment] # as where it is not installed
    from vlsm import storage

    for uri in uris:
        storage.write_bytes(uri, os.urandom(num_bytes))


def _read(uris: list[str], num_gets: int, num_threads: int, num_bytes: int) -> tuple[float, float]:
    from vlsm.images.fetch import read_image_bytes

    def get(number: int) -> None:
        read_image_bytes(uris[number % len(uris)], num_bytes, num_bytes, timeout_s=120)

    start_s, before_s = time.monotonic(), time.process_time()
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(get, range(num_gets)))
    return 1000 * (time.process_time() - before_s) / num_gets, num_gets / (time.monotonic() - start_s)
