"""The fuzz job: its readers at a few tries each, and the faults that it must find."""

import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from jobs.benchmark import main
from jobs.benchmarks import fuzz, fuzz_readers, fuzz_worker
from jobs.benchmarks.fuzz_mutations import mutate
from jobs.benchmarks.fuzz_seeds import SEEDS, read_folder
from vlsm.errors import ImageError

SEED = "0"  # one that does not choose the checkpoint of CLIPSeg, whose library takes seconds to import


@pytest.mark.nightly
def test_every_reader_accepts_its_seeds_and_survives_some_damage(tmp_path, capsys):
    path = tmp_path / "fuzz.json"
    code = main(["fuzz", "--tries", "2", "--seed", SEED, "--json", str(path)])
    told = capsys.readouterr().out
    assert code == 0, told
    figures = json.loads(path.read_text())
    assert {row["reader"] for row in figures["runs"]} == set(SEEDS) == set(fuzz_readers.READERS)
    assert all(row["accepted"] + row["rejected"] == 2 for row in figures["runs"])
    assert f"| image | 2 | {figures['runs'][0]['tries_per_s']:,.0f} |" in "\n".join(fuzz.tell(figures))


@pytest.mark.parametrize("name", ["image", "archive", "list", "dataset", "settings"])
def test_equal_seeds_give_equal_files_and_others_differ(name):
    seeds = SEEDS[name]()
    files = [mutate(seeds[0], random.Random(f"{number}")) for number in range(40)]
    assert files == [mutate(seeds[0], random.Random(f"{number}")) for number in range(40)]
    changed = [made for made in files if made != seeds[0]]
    assert len(changed) > 30 and len({repr(sorted(made.items())) for made in changed}) > 25


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def spin():
    while True:
        pass


def sleep():
    time.sleep(600)


def swell():
    np.ones(1 << 24, np.uint64)  # 128 MiB
    return 1


def leave():
    with open("../left", "w") as file:
        file.write("x")
    return 1


def refuse():
    raise ImageError("corrupt", "it is")


def fail():
    raise KeyError("foreign")


def nothing():
    return 0


FAULTS = {
    crash: "crash (SIGSEGV)",
    spin: "hang of",
    sleep: "hang of",
    swell: "accepted with too much memory",
    leave: "a file outside of the folder",
    fail: "KeyError",
}


def serve_with(connection, folder, seed):
    """The process of a fuzz job with the readers of this file, and smaller limits."""
    fuzz_worker.CPU_S, fuzz_worker.MEMORY_BYTES = 1.0, 1 << 26
    fuzz_worker.READERS = {read.__name__: read for read in (*FAULTS, refuse, nothing)}
    fuzz_worker.serve(connection, folder, seed)


def test_each_kind_of_fault_is_found_and_what_is_none_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "serve", serve_with)
    (tmp_path / "a.png").write_bytes(b"x")
    with fuzz._Child(0) as child:
        for read, cause in FAULTS.items():
            monkeypatch.setattr(fuzz, "_LONGEST_S", 1.0 if read is sleep else 300.0)
            outcome = child.read(read.__name__, 0, str(tmp_path))
            assert outcome.kind == "fault" and cause in outcome.cause, f"{read.__name__}: {outcome}"
        assert {child.read(name, 0, str(tmp_path)).kind for name in ("refuse", "nothing")} == {"rejected"}


def test_the_files_of_a_fault_are_kept_and_can_be_read_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(fuzz, "serve", serve_failing)
    assert main(["fuzz", "--reader", "list", "--tries", "2"]) == 1
    told = capsys.readouterr().out
    assert "list: 2 x KeyError" in told
    (kept,) = tmp_path.glob("vlsm-fuzz-*/list-0")
    assert list(kept.glob("list.*")) and "KeyError: 'foreign'" in kept.with_suffix(".txt").read_text()
    assert main(["fuzz", "--reader", "list", "--again", str(kept)]) == 1
    assert "KeyError: 'foreign'" in capsys.readouterr().out


def fail_if_damaged():
    if read_folder(Path()) not in SEEDS["list"]():
        raise KeyError("foreign")
    return 1


def serve_failing(connection, folder, seed):
    """The process of a fuzz job whose reader of lists fails."""
    fuzz_worker.READERS = {"list": fail_if_damaged}
    fuzz_worker.serve(connection, folder, seed)
