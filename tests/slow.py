"""Which tests are slow: `tests/slow.txt` names them, with their seconds, and they are not among the core tests.

Measure anew on two idle cores: pytest -m "not ray and not nightly" --durations=0 > LOG; python -m tests.slow LOG
"""

import re
import sys
from collections import Counter
from pathlib import Path

TABLE = Path(__file__).with_suffix(".txt")
_TEST_S = 0.15  # mean of a function's tests, with what is set up for each
_FIXTURE_S = 2.0  # of one test: it is set up for all tests of the module
_PHASE = re.compile(r"^ *(\d+\.\d+)s (call|setup) +(tests/[^\s\[@]+)", re.MULTILINE)


def read_table() -> frozenset[str]:
    """Return the slow functions and modules, as pytest names them."""
    return frozenset(line.split()[1] for line in TABLE.read_text().splitlines())


def is_slow(nodeid: str, slow: frozenset[str]) -> bool:
    """Return whether a test is slow, by its name in pytest."""
    function = nodeid.partition("[")[0].partition("@")[0]
    return function in slow or function.partition("::")[0] in slow


def find_slow(log: str) -> dict[str, float]:
    """Return seconds by slow function, or by module whose fixtures are slow, of what pytest has printed."""
    phases = [(float(seconds), phase, name) for seconds, phase, name in _PHASE.findall(log)]
    modules = {name.partition("::")[0] for seconds, phase, name in phases if phase == "setup" and seconds >= _FIXTURE_S}
    sums: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for seconds, phase, name in phases:
        module = name.partition("::")[0]
        sums[module if module in modules else name] += seconds
        calls[name] += phase == "call"
    return {name: round(s, 2) for name, s in sums.items() if name in modules or s / max(calls[name], 1) >= _TEST_S}


if __name__ == "__main__":
    found = find_slow(Path(sys.argv[1]).read_text())
    TABLE.write_text("".join(f"{found[name]:7.1f} {name}\n" for name in sorted(found)))
