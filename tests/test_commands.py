"""The command `vlsm` and the help of all commands."""

import contextlib
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jobs.__main__ import completion, load, main
from vlsm.commands import COMMANDS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def as_vlsm(monkeypatch):
    """The name under which this process was called; the command sets it."""
    monkeypatch.setattr(sys, "argv", ["pytest"])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_examples_that_the_command_takes(name, as_vlsm, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: vlsm {name} ")
    if name in ("demo", "benchmark"):  # they run as they are
        return
    first = lines.index("examples:") + 1
    examples = lines[first : lines.index("", first)]
    assert 1 <= len(examples) <= 3 and first < 12
    for example in examples:
        words = shlex.split(example)
        assert words[:2] == ["vlsm", name]
        load(name).make_parser().parse_args(words[2:])
    heads = [number for number, line in enumerate(lines) if line.startswith("settings that people change")]
    assert all(lines[number:].index("") <= 13 for number in heads)


@pytest.mark.parametrize("words", [["segment", "--help"], ["status", "--help"], ["segment", "--help-settings"], []])
def test_help_fits_a_terminal_and_is_plain_text(words, as_vlsm, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with contextlib.suppress(SystemExit):
        main(words)
    out = capsys.readouterr().out
    assert len(out) > 500 and "\x1b" not in out
    wide = [line for line in out.splitlines() if len(line) > 80]
    assert all(line.startswith("  vlsm ") for line in wide)  # examples are copied


@pytest.mark.parametrize("name", ["segment", "train", "evaluate", "sweep", "datasets", "calibrate"])
def test_all_settings_are_listed_on_demand(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help-settings"])
    assert end.value.code == 0
    listed = {line.split("=")[0].strip() for line in capsys.readouterr().out.splitlines()[1:]}
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = capsys.readouterr().out.partition("settings that people change")[2]
    keys = {line.split("=")[0].strip() for line in shown.splitlines() if line.startswith("  ")}
    assert keys and keys < listed


def test_a_command_is_the_same_under_both_names(as_vlsm, tmp_path, capfd):
    code = main(["status", str(tmp_path / "nowhere")])
    ours = capfd.readouterr()
    done = subprocess.run(
        [sys.executable, "-m", "jobs.status", str(tmp_path / "nowhere")], cwd=ROOT, capture_output=True, text=True
    )
    assert (code, ours.out, ours.err) == (done.returncode, done.stdout, done.stderr)
    assert code == 2 and "nowhere" in ours.err


def test_words_that_are_no_command(capsys):
    assert main(["segmnt"]) == 2
    assert "unknown command 'segmnt'; did you mean 'segment'?" in capsys.readouterr().err
    assert main(["xyz"]) == 2
    assert "the commands are segment, train, " in capsys.readouterr().err
    assert main(["completion", "fish"]) == 2
    assert "needs the name of a shell: bash, zsh, tcsh" in capsys.readouterr().err
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("usage: vlsm COMMAND")
    assert main(["--version"]) == 0
    from vlsm import __version__

    assert capsys.readouterr().out == f"vlsm {__version__}\n"


def test_the_overview_names_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)


def test_a_shell_completes_commands_and_arguments(as_vlsm, tmp_path):
    (tmp_path / "vlsm.sh").write_text(completion("bash"))
    ask = 'source vlsm.sh; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_vlsm; printf "%s\\n" "${COMPREPLY[@]}"'

    def complete(*words):
        command = ["bash", "-c", ask, "bash", "vlsm", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()

    assert complete("seg") == ["segment"]
    assert complete("segment", "--chec") == ["--checkpoint"]
    assert "dicom-seg" in complete("export", "--format", "dic")


def test_the_package_installs_the_command():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"vlsm": "jobs.__main__:main"}
