"""The README states the limits as they are."""

from pathlib import Path

import pytest

from vlsm import limits

SECTION = (Path(__file__).parents[1] / "vlsm" / "README.md").read_text(encoding="utf-8").partition("## Limits\n")[2]


@pytest.mark.parametrize("name", [name for name in vars(limits) if name.isupper()])
def test_the_readme_states_every_limit(name):
    value = getattr(limits, name)
    written = {limits.MAX_UNPACKED_BYTES: "64 GiB", limits.MAX_TAR_ATTRIBUTES: "1,000 attributes"}
    assert written.get(value, f"{value:,}") in SECTION.partition("\n## ")[0]
