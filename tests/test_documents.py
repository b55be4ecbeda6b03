"""YAML and JSON of other people: one sentence within bounds, and ordinary documents as they are."""

import json
import tracemalloc

import pytest
import yaml

from vlsm.config import SegmentSettings, load_settings
from vlsm.documents import MAX_YAML_BYTES, parse_json, parse_yaml, read_json, read_yaml
from vlsm.errors import ConfigError, DamageError, ResultError, VlsmError
from vlsm.runs.record import read_record, read_summary
from vlsm.training.state import read_state

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 3000))
HOSTILE_YAML = {
    "bomb": (BOMB, "more than 500,000 values with its aliases written out"),
    "merge keys": (MERGES, "more than 500,000 values"),
    "chain": (CHAIN, "nested more than 100 times"),
    "inside itself": ("a: &a [*a]", "inside of its own anchor"),
    "brackets": ("[" * 3000 + "]" * 3000, "nesting"),
    "fewer brackets": ("[" * 150 + "]" * 150, "nested more than 100 times"),
    "twice": ("a: 1\nb: 2\na: 3", "a key stands twice in an object: 'a'"),
    "twice in a set": ("? a\n? a", "a key stands twice"),
    "number": ("a: " + "9" * 5000, "a number of 5,000 digits"),
    "hexadecimal": ("a: 0x" + "f" * 5000, "a number of 5,002 digits"),
    "sexagesimal": ("a: 1" + ":1" * 9000, "a number of 18,001 digits"),
    "length": ("#" * (MAX_YAML_BYTES + 1), "is longer than"),
    "code": ("a: !!python/object/apply:os.system [touch x]", "could not determine a constructor"),
    "date": ("a: 2001-13-45", "month must be in 1..12"),
    "bool": ("a: !!bool x", "a value is not of the type that stands before it"),
    "int": ("a: !!int ''", "a value is not of the type"),
    "key": ("{[1]: 2}", "unhashable key"),
    "escape": ("a: \x1b[2J", "control characters"),
    "bytes": (b"\xff\xfe\x00", "is not YAML"),
}
HOSTILE_JSON = {
    "brackets": ("[" * 3000, "nested more than 100 times"),
    "a million brackets": ("[" * 10**6 + "]" * 10**6, "nested more than 100 times"),
    "objects": ('{"a":' * 101 + "1" + "}" * 101, "nested more than 100 times"),
    "twice": ('{"a": 1, "\\u0061": 2}', "a key stands twice in an object: 'a'"),
    "number": ("9" * 5000, "a number of 5,000 digits"),
    "bytes": (b"\xff\xff\xff", "can't decode"),
    "second line": ('{"a":\nx}', "Expecting value at line 2, column 1"),
}


@pytest.mark.parametrize("kind", HOSTILE_YAML)
def test_hostile_yaml_is_one_sentence_and_takes_little_memory(kind):
    data, reason = HOSTILE_YAML[kind]
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="^x.yaml is ") as caught:
            parse_yaml(data, "x.yaml", ConfigError)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
    assert reason in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", HOSTILE_JSON)
def test_hostile_json_is_one_sentence(kind):
    data, reason = HOSTILE_JSON[kind]
    with pytest.raises(ConfigError, match="^x.json is not JSON: ") as caught:
        parse_json(data, "x.json", ConfigError, "; advice")
    assert reason in str(caught.value) and str(caught.value).endswith("; advice")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: &base {x: 1, z: 2}\nb:\n  <<: *base\n  x: 3\n", {"a": {"x": 1, "z": 2}, "b": {"x": 3, "z": 2}}),
        ("a: &list [1, 2]\nb: *list", {"a": [1, 2], "b": [1, 2]}),
        ("[" * 90 + "]" * 90, json.loads("[" * 90 + "]" * 90)),
        ("a: 1\nb: {a: 2}", {"a": 1, "b": {"a": 2}}),
        ("", None),
        ("2001-01-01", yaml.safe_load("2001-01-01")),
        pytest.param("[" + "polyp, " * 20_000 + "]", ["polyp"] * 20_000, id="long"),
    ],
)
def test_ordinary_yaml_is_read_as_before(text, value):
    assert parse_yaml(text, "x") == parse_yaml(text.encode(), "x") == value


@pytest.mark.parametrize(
    ("data", "value"),
    [
        ('{"a": [1, 2.5, null, true, "b\\n"]}', {"a": [1, 2.5, None, True, "b\n"]}),
        ('["' + "[{" * 500 + '\\"[[", ' + "[[1], {}], " * 300 + "0]", None),  # brackets in a text are no depth
        ('{"limit": 1000000000000000019884624838656}', {"limit": 1000000000000000019884624838656}),
        ("[1e999, Infinity]", [float("inf")] * 2),
        ('[{"a": 1}, {"a": 2}]', [{"a": 1}, {"a": 2}]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_ordinary_json_is_read_in_every_encoding(data, value, encoding):
    assert parse_json(data.encode(encoding), "x") == parse_json(data, "x") == (value or json.loads(data))


def test_of_a_file_without_end_only_the_beginning_is_read(tmp_path):
    with (tmp_path / "x.yaml").open("wb") as file:
        file.truncate(1 << 40)
    for read in (read_yaml, read_json):
        with pytest.raises(VlsmError, match="x is longer than"):
            read(str(tmp_path / "x.yaml"), "x")


def test_a_long_object_of_a_store_is_refused_and_an_empty_one_is_read(s3_folder):
    from vlsm import storage

    for name, data in (("empty", b""), ("long", b"[" + b"1," * 60 + b"1]")):
        storage.write_bytes(f"{s3_folder}/{name}", data)
    assert storage.read_bytes(f"{s3_folder}/empty", max_bytes=100) == b""
    assert len(storage.read_bytes(f"{s3_folder}/long", max_bytes=100)) == 101
    with pytest.raises(ResultError, match="long is longer than 100 bytes"):
        read_json(f"{s3_folder}/long", "long", ResultError, max_bytes=100)


@pytest.mark.parametrize("kind", ["bomb", "brackets", "twice", "number"])
def test_settings_records_and_summaries_of_others_end_in_one_sentence(tmp_path, kind):
    (tmp_path / "config.yaml").write_text(HOSTILE_YAML[kind][0])
    (tmp_path / "summary.json").write_text(HOSTILE_JSON[kind if kind != "bomb" else "objects"][0])
    with pytest.raises(ConfigError, match=r"config.yaml is not YAML: .*; it is not the record of a run: choose"):
        read_record(str(tmp_path))
    with pytest.raises(ResultError, match=r"summary.json is damaged: .* is not JSON"):
        read_summary(str(tmp_path))
    with pytest.raises(ConfigError, match=r"^--config config.yaml is not YAML: "):
        load_settings(SegmentSettings, str(tmp_path / "config.yaml"), [], {})
    with pytest.raises(ConfigError, match=r"^--set prompts=.* is not YAML: "):
        load_settings(SegmentSettings, None, [f"prompts={HOSTILE_YAML[kind][0]}"], {})


def test_a_file_with_many_wrong_keys_is_a_short_message(tmp_path):
    (tmp_path / "x.yaml").write_text("".join(f"key{n}: 1\n" for n in range(2000)) + f"{'y' * 900}: 1\n")
    with pytest.raises(ConfigError, match=r"unknown key 'key0'.*; and 1,99\d more$") as caught:
        load_settings(SegmentSettings, str(tmp_path / "x.yaml"), [], {"input": "a", "output": "b"})
    assert len(str(caught.value)) < 20_000


@pytest.mark.parametrize(
    "progress", ["[" * 3000, '{"epoch": 1}', '{"format": 99}', "[]"], ids=["brackets", "few", "newer", "list"]
)
def test_a_damaged_state_of_a_training_is_one_sentence(tmp_path, progress):
    import safetensors.torch

    path = tmp_path / "last.safetensors"
    path.write_bytes(safetensors.torch.save({}, {"progress": progress}))
    for _ in range(2):  # then only its beginning
        with pytest.raises(
            (ConfigError, DamageError), match=r"last.safetensors( is damaged| is not JSON| has the format|:)"
        ) as caught:
            read_state(str(tmp_path))
        assert "\n" not in str(caught.value)
        path.write_bytes(path.read_bytes()[:20])
