import os

import pytest
import yaml

from vlsm.config import SegmentSettings, dump_yaml, load_settings
from vlsm.errors import ConfigError

PATHS = {"input": "in", "output": "out", "members": [{"checkpoint": "ck"}]}


def load(*assignments, config=None):
    return load_settings(SegmentSettings, config, list(assignments), PATHS)


def test_defaults_stand_where_nothing_is_set():
    assert load().shard_rows == 256
    assert load().run.batch_size == "auto"


def test_words_override_the_file_and_reach_into_groups(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("threshold: 0.3\nrun:\n  batch_size: 2\n  fetch_threads: 3\n")
    settings = load("run.batch_size=5", config=str(config))
    assert (settings.threshold, settings.run.batch_size, settings.run.fetch_threads) == (0.3, 5, 3)


def test_a_number_that_yaml_takes_for_text_is_a_number():
    assert load("threshold=1e-3").threshold == 0.001


def test_one_prompt_is_a_list_of_one():
    assert load("prompts=polyp").prompts == ("polyp",)
    assert load("prompts=[polyp, flat polyp]").prompts == ("polyp", "flat polyp")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("run.batchsize=3", "unknown key 'run.batchsize'; did you mean 'run.batch_size'?"),
        ("treshold=0.4", "unknown key 'treshold'; did you mean 'threshold'?"),
        ("threshold=7", "threshold is 7: it must be a probability between 0 and 1, such as 0.5"),
        ("threshold=0", "threshold is 0: it must be a probability between 0 and 1, such as 0.5"),
        ("threshold=50%", "threshold is '50%': it must be a probability between 0 and 1, such as 0.5"),
        ("threshold=high", "threshold is 'high': it must be a probability between 0 and 1, such as 0.5"),
        ("threshold=[0.5]", "it must be a probability between 0 and 1, such as 0.5"),
        ("run.batch_size=0", "run.batch_size is 0"),
        ("run.batch_size=fast", "it must be 1 or more, or auto"),
        ("run.batch_size=2.5", "run.batch_size"),
        ("run.compile=maybe", "run.compile"),
        ("shard_rows", "not of the form key=value"),
        ("prompts=[a, a]", "the same prompt stands there twice"),
        ("threshold.x=1", "threshold"),
        ("prompts=[a", "is not YAML"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(word, message):
    with pytest.raises(ConfigError) as caught:
        load(word)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_shapeless_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        load(config=str(tmp_path / "nowhere.yaml"))
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="must hold keys and values"):
        load(config=str(tmp_path / "list.yaml"))


@pytest.mark.parametrize("word", ["run.allow=s3://data/", "run.allow=[s3://data/]"])
def test_one_place_is_a_list_of_places(word):
    settings = load_settings(
        SegmentSettings, None, [word], {"input": "i", "output": "o", "members": [{"checkpoint": "c"}]}
    )
    assert settings.run.allow == ("s3://data/",)


def test_an_empty_place_would_be_every_file():
    with pytest.raises(ConfigError, match="a place is empty"):
        load_settings(SegmentSettings, None, ["run.allow=['']"], {"input": "i", "output": "o", "members": []})


def test_settings_may_come_from_an_open_pipe():
    """As from a shell: --config <(echo "threshold: 0.3")."""
    reading, writing = os.pipe()
    os.write(writing, b"threshold: 0.3\n")
    os.close(writing)
    try:
        assert load(config=f"/dev/fd/{reading}").threshold == 0.3
    finally:
        os.close(reading)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/fd/999999999", "PIPE"])
def test_a_device_or_a_named_pipe_is_no_file_of_settings(tmp_path, path):
    os.mkfifo(tmp_path / "PIPE")  # without a writer, to open it would block for ever
    with pytest.raises(ConfigError, match="cannot be read"):
        load(config=path.replace("PIPE", str(tmp_path / "PIPE")))


@pytest.mark.parametrize(("word", "value"), [("on", "on"), ("off", "off"), ("true", "on"), ("auto", "auto")])
def test_a_switch_is_what_yaml_makes_of_it(word, value):
    settings = load(f"run.compile={word}")
    assert settings.run.compile == value
    tree = yaml.safe_load(dump_yaml(settings.model_dump(mode="json")))
    assert SegmentSettings.model_validate(tree) == settings
