"""A value that the shell has cut at blanks gets a hint, by every command, and values that are whole do not."""

import pytest

from jobs.segment import main as segment
from jobs.train import main as train
from vlsm.config import parse_assignments
from vlsm.datasets.__main__ import main as datasets
from vlsm.errors import ConfigError
from vlsm.quotes import hint_at_quotes


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("in out --set prompts=[polyp, flat polyp]", "--set 'prompts=[polyp, flat polyp]'"),
        ("out --set data.classes={1: polyp, 2: fold} --dry-run", "--set 'data.classes={1: polyp, 2: fold}'"),
        ("out --set seeds=[0, 1, 2]", "--set 'seeds=[0, 1, 2]'"),
        ("out --set threshold = 0.5", "without blanks: --set threshold=0.5"),
        ("out --set threshold= 0.5", "without blanks: --set threshold=0.5"),
        ("out --set threshold =0.5", "without blanks: --set threshold=0.5"),
    ],
)
def test_what_the_shell_has_cut_is_joined_again(line, hint):
    assert hint in hint_at_quotes(line.split())


@pytest.mark.parametrize(
    "words",
    [
        ["in", "out", "--set", "prompts=[polyp, flat polyp]"],
        ["--set", "threshold=0.5", "in", "out"],
        ["--set", "threshold=", "--dry-run"],
        ["in", "out"],
    ],
)
def test_whole_values_get_no_hint(words):
    assert hint_at_quotes(words) == ""


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (segment, "in out --checkpoint c --set prompts=[polyp, flat polyp]"),
        (train, "out --dataset a=b --set data.sampling = uniform"),
        (datasets, "--set data.columns={image_uri: path} x --sheet"),
    ],
)
def test_every_command_ends_with_the_hint(command, line, capsys):
    with pytest.raises(SystemExit) as end:
        command(line.split())
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert "needs quotes: --set '" in err or "without blanks: --set " in err


def test_a_cut_value_that_reaches_the_settings_gets_it_too():
    """`segment in --set prompts=[polyp, out`: the rest of the value is taken for OUTPUT."""
    with pytest.raises(ConfigError, match=r"is not YAML.*needs quotes, as in --set 'prompts=\[polyp \.\.\.'"):
        parse_assignments(["prompts=[polyp,"])


@pytest.mark.parametrize(
    "word", ['prompts=5" lesion', "prompts='a [b'", 'prompts="x {y"', "prompts=[it's]", "prompts=it's"]
)
def test_brackets_and_quotes_inside_of_texts_are_texts(word):
    assert parse_assignments([word])["prompts"]
