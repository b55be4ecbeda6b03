"""The command `vlsm`: `vlsm segment ...` is the same as `python -m jobs.segment ...`."""

import sys
from importlib import import_module
from types import ModuleType

from vlsm.commands import COMMANDS
from vlsm.shown import say_error
from vlsm.version import __version__

_COMPLETION = {
    "bash": "source <(vlsm completion bash)",
    "zsh": "vlsm completion zsh > ~/.zsh/_vlsm, in a folder of $fpath",
    "tcsh": "vlsm completion tcsh",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first word names, and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    name = words[0] if words else "--help"
    if name in COMMANDS:
        sys.argv[0] = "vlsm"  # help and messages name commands in the form that the user typed
        return int(load(name).main(words[1:]))
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"vlsm {__version__}")
        return 0
    if name == "completion" and len(words) == 2 and words[1] in _COMPLETION:
        print(completion(words[1]))
        return 0
    if name == "completion":
        say_error(f"vlsm completion needs the name of a shell: {', '.join(_COMPLETION)}")
        return 2
    from difflib import get_close_matches

    near = get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}"
    say_error(f"unknown command {name!r}; {hint}")
    return 2


def load(name: str) -> ModuleType:
    """Return the module of a command, with `main` and `make_parser`. That of a package is its __main__."""
    module = import_module(COMMANDS[name][0])
    return import_module(f"{module.__name__}.__main__") if hasattr(module, "__path__") else module


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vlsm COMMAND ...",
            "",
            "Segment image archives with vision-language models, and train these models.",
            "",
            *lines,
            f"  {'completion':{width}}  completes commands in a shell: {_COMPLETION['bash']}",
            "",
            "`vlsm COMMAND --help` explains a command; `vlsm --version` prints the version.",
        ]
    )


def completion(shell: str) -> str:
    """Return a script that completes all commands and their arguments in a shell.

    Args:
        shell: bash, zsh or tcsh.
    """
    import argparse

    import shtab

    sys.argv[0] = "vlsm"
    parser = argparse.ArgumentParser(prog="vlsm")
    commands = parser.add_subparsers()
    for name, (_, about) in COMMANDS.items():
        own = load(name).make_parser()
        commands.add_parser(name, parents=[own], add_help=False, help=about, description=about)
    return str(shtab.complete(parser, shell))


if __name__ == "__main__":
    sys.exit(main())
