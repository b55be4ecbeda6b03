import logging
import os
import py_compile
import socket
import subprocess
import sys
import threading
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from jobs.command import RaySession, check_address, job_parser, locate, run_command, start_patiently
from tests.conftest import LONG_S
from vlsm.config import load_settings
from vlsm.errors import ConfigError, VlsmError
from vlsm.training.settings import TrainSettings


@pytest.mark.parametrize("name", ["strong/unet", "strong/unet.yaml", "jobs/configs/strong/unet.yaml"])
def test_a_recipe_of_the_package_is_found_anywhere_but_a_file_comes_first(tmp_path, monkeypatch, name):
    """An installed package has no clone beside it."""
    monkeypatch.chdir(tmp_path)
    parser = job_parser("jobs.train", "train", (), TrainSettings, ())
    found = parser.parse_args(["--config", name]).config
    assert load_settings(TrainSettings, found, [], {"output": "x", "datasets": {"a": "b"}}).optim.schedule == "cosine"
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("")
    assert parser.parse_args(["--config", name]).config == name
    assert parser.parse_args(["--config", "strong/unett"]).config == "strong/unett"


@pytest.mark.parametrize(("is_forbidden", "is_compiled"), [(True, False), (True, True), (False, False)])
def test_libraries_that_every_process_compiles_anew_are_told(tmp_path, monkeypatch, caplog, is_forbidden, is_compiled):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("")
    if is_compiled:
        py_compile.compile(tmp_path / "ray" / "__init__.py")
    monkeypatch.setattr("jobs.command.find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    monkeypatch.setattr(sys, "dont_write_bytecode", is_forbidden)
    monkeypatch.setattr(RaySession, "_run_ray", lambda session: session._is_imported.set())
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    RaySession().start()
    told = [record.message for record in caplog.records if "compiles its libraries anew" in record.message]
    assert len(told) == (is_forbidden and not is_compiled)
    assert all(text.endswith(f"python -m compileall -q {tmp_path} writes these") for text in told)


@pytest.mark.ray
def test_what_an_interrupted_run_holds_is_released_before_its_session_ends(ray_cluster):
    """A stream of Ray Data that outlives Ray would start it anew, only to cancel its tasks."""
    released = []

    class Stream:
        def __del__(self):
            released.append(True)

    def work():
        stream = Stream()
        try:
            raise KeyboardInterrupt
        finally:
            assert stream and not released

    def run():
        with RaySession() as session:
            session.wait()
            try:
                work()
            except KeyboardInterrupt as error:
                raise ValueError from error

    with pytest.raises(ValueError) as caught:  # which keeps the traceback
        run()
    assert caught and released


@pytest.mark.parametrize(
    ("is_terminal", "as_json", "out"),
    [(True, False, "one\ntwo\n"), (True, True, '{"ok": 1}\n'), (False, False, '{"ok": 1}\n')],
)
def test_a_result_is_for_people_on_a_terminal_and_for_programs_elsewhere(
    is_terminal, as_json, out, monkeypatch, capsys, caplog
):
    caplog.set_level("INFO", "vlsm")
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    assert run_command(lambda: {"ok": 1}, lambda result: ["one", "two"], as_json) == 0
    assert capsys.readouterr().out == out
    assert caplog.messages == ([] if out.startswith("one") else ["one", "two"])


def test_an_interrupt_while_ray_starts_says_at_once_what_is_waited_for(monkeypatch, caplog):
    caplog.set_level("INFO", "vlsm")
    is_starting, may_start = threading.Event(), threading.Event()

    def open_slowly(session):
        session._is_imported.set()
        is_starting.set()
        assert may_start.wait(LONG_S)  # else the line is missing, and the error is raised in the end
        return False

    class Records(logging.Handler):
        def emit(self, record):
            if "waiting until Ray" in record.getMessage():
                may_start.set()  # the start ends only after the line

    monkeypatch.setattr(RaySession, "_open", open_slowly)
    monkeypatch.setattr("jobs.command.cluster_address", lambda: "")
    handler = Records()
    logging.getLogger("vlsm").addHandler(handler)
    try:
        with pytest.raises(KeyboardInterrupt), RaySession() as session:
            session.start()
            is_starting.wait(LONG_S)
            raise KeyboardInterrupt
    finally:
        logging.getLogger("vlsm").removeHandler(handler)
    assert "interrupted: waiting until Ray has started and can be ended, so that no process stays" in caplog.messages


def test_a_start_that_nobody_needs_any_more_is_not_tried_again():
    tries = []

    def start():
        tries.append(True)
        raise TimeoutError("the node timed out")

    for is_needed, expected in ((False, 1), (True, 5)):
        tries.clear()
        with pytest.raises(TimeoutError):
            start_patiently(start, is_needed=lambda is_needed=is_needed: is_needed)
        assert len(tries) == expected


NICENESS = """
import os
import socket
from jobs.command import RaySession, check_address, job_parser, locate, run_command
with RaySession() as session:
    session.wait()
    import ray
    found = ray.get(ray.remote(num_cpus=0)(lambda: os.nice(0)).remote())
print(os.nice(0), found)
"""


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.parametrize(("given", "found"), [(None, "3 3"), pytest.param("4", "3 7", marks=pytest.mark.nightly)])
def test_workers_of_a_cluster_that_a_job_starts_have_its_niceness(given, found):
    """Unless the user has set another one, which Ray adds."""
    environment = {name: os.environ[name] for name in os.environ if name not in ("RAY_worker_niceness", "RAY_ADDRESS")}
    done = subprocess.run(
        ["nice", "-n", "3", sys.executable, "-c", NICENESS],
        cwd=Path(__file__).parents[2], env=environment | ({"RAY_worker_niceness": given} if given else {}),
        capture_output=True, text=True, timeout=LONG_S,
    )  # fmt: skip
    assert done.stdout.split() == found.split(), done.stderr[-2000:]


def test_a_submitted_job_refuses_paths_that_other_nodes_cannot_reach(tmp_path, monkeypatch):
    copy = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("data/scans") == str(tmp_path / "data" / "scans")
    monkeypatch.chdir(copy)
    with pytest.raises(ConfigError, match="'data/scans' is a relative path; a submitted job .* s3://bucket/data/scans"):
        locate("data/scans")
    assert locate("/data/scans") == "/data/scans" and locate("s3://bucket/x") == "s3://bucket/x"


def test_a_cluster_that_nothing_listens_for_is_one_sentence():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for named in (address, f"ray://{address}"):
        with pytest.raises(VlsmError, match=f"RAY_ADDRESS={named} cannot be reached"):
            check_address(named)
    for named in ("", "auto"):
        check_address(named)
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_address(f"127.0.0.1:{server.getsockname()[1]}")
