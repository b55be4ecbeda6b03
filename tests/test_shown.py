"""What people see: no password, no signature, no character that a terminal obeys; ordinary text stays as it is."""

import io
import logging
import pickle
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import LONG_S
from vlsm import storage
from vlsm.errors import ConfigError, ImageError, VlsmError
from vlsm.shown import Lines, Parser, escape, hide_secrets, hide_secrets_in, public_uri, show, show_lines, show_records

S = "S3cr3t"
SECRETS = {
    f"https://user:{S}@host/a.png": "https://host/a.png",
    f"https://user:{S}/more+of@it@host/a.png": "https://host/a.png",
    f"https://{S}@host/a.png": "https://host/a.png",
    f"https://user:{S}%40x@host:9000/a@b.png": "https://host:9000/a@b.png",
    f"HTTPS://USER:{S}@HOST/A": "HTTPS://HOST/A",
    f"s3://AKIA:{S}/x@bucket/key": "s3://bucket/key",
    f"ftp://user:{S}?w@host/a": "ftp://host/a",
    f"abfs://user:{S}@account/a": "abfs://account/a",
    f"https://host/a.png?X-Amz-Credential={S}&X-Amz-Signature={S}&x-id=GetObject": "https://host/a.png",
    f"https://host/a.png?X-Goog-Signature={S}": "https://host/a.png",
    f"https://a.blob.core.windows.net/c/a.png?sv=1&se=2&sp=r&sig={S}%3D": "https://a.blob.core.windows.net/c/a.png",
    f"https://d.cloudfront.net/a.png?Expires=1&Signature={S}&Key-Pair-Id={S}": "https://d.cloudfront.net/a.png",
    f"https://host/a.zip?token={S}#a/b.png": "https://host/a.zip#a/b.png",
    f"https://host/a.zip?token={S}#page=2": "https://host/a.zip#page=2",
    f"https://host/a.png#access_token={S}": "https://host/a.png",
    f"https://host/a b'c.png?sig={S}": "https://host/a b'c.png",
    f"s3://bucket/a.png?X-Amz-Signature={S}": "s3://bucket/a.png",
    f"abfs://c@account.dfs/a.png?sv=1&sig={S}": "abfs://c@account.dfs/a.png",
    f"simplecache::https://user:{S}@host/a.png": "simplecache::https://host/a.png",
}
PLAIN = [
    "/data/what?.png",
    "/data/a?sig=b.png",
    "C:/a@b",
    "s3://bucket/a@b.png",
    "s3://bucket/what?.png",
    "s3://bucket/a?b=c#d=e.png",
    "abfs://container@account.dfs.core.windows.net/a.png",
    "http://localhost:9000/a@b.png",
    "http://[::1]:9000/a@b.png",
    "https://host/a.zip#site=a/b.png",
    "https://host/ct.nii.gz#volume=1,slice=17",
    "http://localhost:9000: refused, ask a@b",
    "https://host/a could not be read. Is it right? No.",
]


@pytest.mark.parametrize("uri", SECRETS, ids=range(len(SECRETS)))
def test_a_location_is_shown_without_its_secrets_alone_and_in_a_message(uri):
    shown = SECRETS[uri]
    assert public_uri(uri) == public_uri(shown) == hide_secrets(shown) == shown
    for before, after in (
        ("no permission for '", "': 403"),
        ("url=URL('", "')"),
        ('{"a": "', '", "b": 2}'),
        ("", ": no"),
    ):
        assert hide_secrets(before + uri + after) == before + shown + after


@pytest.mark.parametrize("text", PLAIN)
def test_what_has_no_secret_stays(text):
    assert public_uri(text) == text or " " in text
    assert text.startswith("/") or hide_secrets(text) == text


def test_a_digest_tells_images_apart_that_differ_in_their_query_and_not_in_their_signature():
    first, other = (public_uri(f"https://host/image?id={number}&sig={S}&sv=1") for number in (1, 2))
    assert first != other and S not in first
    assert first.startswith("https://host/image?~") and len(first) == len("https://host/image?~") + 16
    signed = f"https://host/image?X-Amz-Date=9&id=1&X-Amz-Signature={S}"
    assert (
        first == public_uri(first) == hide_secrets(first) == public_uri(signed) == public_uri("https://host/image?id=1")
    )
    assert public_uri(f"https://host/image?{S}") != public_uri(
        "https://host/image"
    )  # an unknown name is no secret kept
    assert public_uri("https://host/i?st=1") != public_uri("https://host/i?st=2")  # no SAS without a signature
    assert hide_secrets("see (https://host/image?id=1), or not.") == f"see ({first}), or not."


def test_headers_and_parameters_that_stand_alone_are_hidden():
    escaped = f"https:\\/\\/u:{S}@host\\/a?sig={S}"
    encoded = f"/proxy/https%3A%2F%2Fu%3A{S}%40host%2Fa%3Fsig%3D{S}"
    for text in (escaped, encoded, f"AWS_SECRET_ACCESS_KEY={S}"):
        assert S not in hide_secrets(text)
    for text in (f"{{'Authorization': 'Basic {S}'}}", f"authorization: Bearer {S}", f"host/x?X-Amz-Signature={S}&a=1"):
        assert S not in hide_secrets(text)
    assert hide_secrets("signature=(int, str) -> x=1, token=3") == "signature=(int, str) -> x=1, token=3"


@pytest.mark.parametrize("unit", ["https://", "#a=a", "?", "x=&", "a://b:c"])
def test_a_long_text_of_repetitions_is_worked_through(unit):
    """A pattern that tries all pairs of places, or all ways to part a text, would not come to an end here."""
    text = f"{unit * (4_000 if unit.startswith('a:') else 40_000)}?https://host/#"
    assert hide_secrets(text).startswith(unit[:2])


BAD = {
    "\x1b[31mred": r"\x1b[31mred",
    "a\rb\nc\td": r"a\rb\nc\td",
    "abc\u202egnp.exe": r"abc\u202egnp.exe",
    "a\u200bb\ufeffc\u2066": r"a\u200bb\ufeffc\u2066",
    "\x9b31m\x85\u2028": r"\x9b31m\x85\u2028",
    "caf\udce9.png": r"caf\udce9.png",
    "pol\u200dyp": r"pol\u200dyp",
    "\x00\x07\x7f": r"\x00\x07\x7f",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_characters_that_a_terminal_obeys_are_escaped(text):
    assert escape(text) == show(text) == BAD[text]
    BAD[text].encode()  # any terminal can show it


@pytest.mark.parametrize(
    "text", ["日本\u3000語.png", "Übergröße é", "👩‍⚕️ ❤️ 🇯🇵", "می‌خواهم", "क्‍ष", "葛\U000e0100", "a\xa0b", "C:\\x1b"]
)
def test_ordinary_text_of_any_script_stays(text):
    assert show(text) == text


def test_line_breaks_of_our_own_stay():
    assert show_lines("a\n\tb\x1b") == "a\n\tb\\x1b"


ATTACK = f"https://user:{S}@host/\x1b[2J\u202ea\nb.png?sig={S}"


@pytest.mark.parametrize("kind", [VlsmError, ConfigError, lambda text: ImageError("missing", text)], ids="VCI")
def test_every_error_of_ours_is_one_line_without_secrets(kind):
    error = kind(f"cannot read {ATTACK}")
    for text in (str(error), repr(error), str(error.args)):
        assert S not in text and "\x1b" not in text and "\n" not in text and "\u202e" not in text
    assert str(VlsmError("日本: a b")) == "日本: a b"
    copied = pickle.loads(pickle.dumps(ConfigError(ATTACK)))
    assert str(copied) == str(ConfigError(ATTACK))


@pytest.fixture
def logged():
    """A logger as that of vlsm, and what its handler has written."""
    logger, stream = logging.getLogger("vlsm.of.a.test"), io.StringIO()
    handler = logging.StreamHandler(stream)
    show_records(handler)
    logger.addHandler(handler)
    logger.propagate = False
    yield logger, stream
    logger.removeHandler(handler)


def test_log_records_show_their_values_and_tracebacks_without_secrets(logged):
    logger, stream = logged
    logger.warning("%s and %r and %s", ATTACK, ATTACK, [ATTACK])
    logger.warning(f"made before: {ATTACK.replace(chr(10), '')}")  # noqa: G004 - as a library may do
    try:
        try:
            raise OSError(f"cannot connect to {ATTACK}")
        except OSError as error:
            raise ValueError(ATTACK) from error
    except ValueError:
        logger.exception("failed")
    text = stream.getvalue()
    assert S not in text and "\x1b" not in text and "\u202e" not in text and "host/" in text
    assert text.splitlines()[0].startswith("https://host/") and "Traceback" in text


def test_numbers_tables_and_wrong_formats_are_logged_as_before(logged):
    logger, stream = logged
    logger.warning("%d, %.2f, %d", 3, 0.5, np.int64(7))
    logger.warning("%(a)s %(b)d", {"a": "x\ny", "b": 2})
    logger.warning("%s:\n%s", "table\n.md", Lines("| a |\n| b |"))
    logger.warning("100 %")
    assert stream.getvalue() == "3, 0.50, 7\nx\\ny 2\ntable\\n.md:\n| a |\n| b |\n100 %\n"


def test_the_logger_of_the_package_shows_its_records_in_every_process():
    code = f"import logging, vlsm; logging.getLogger('vlsm').warning('%s', {ATTACK!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG_S, check=True)
    assert done.stderr.count("\n") == 1 and S not in done.stderr and "\x1b" not in done.stderr


def test_wrong_arguments_are_shown_without_control_characters(capsys):
    parser = Parser(prog="python -m x")
    with pytest.raises(SystemExit) as caught:
        parser.parse_args([ATTACK])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and "unrecognized arguments: https://host/\\x1b[2J" in error
    assert S not in error and "\x1b" not in error


def test_the_traceback_of_a_crash_has_no_secrets_in_any_of_its_causes():
    code = f"""
from vlsm.shown import Parser
Parser().parse_args([])
try:
    raise OSError({ATTACK!r})
except OSError as error:
    raise RuntimeError({ATTACK!r}) from error
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG_S, check=False)
    assert done.returncode == 1 and "RuntimeError: https://host/" in done.stderr and "OSError: https://" in done.stderr
    assert S not in done.stderr.replace(f"{S!r}", "") and "\x1b" not in done.stderr


def test_trees_of_settings_lose_their_secrets_and_nothing_else():
    tree = {"input": f"https://host/a?sig={S}", "n": [1, 2.5, None, True, "/a?b=c"], "d": {f"x://u:{S}@h": "polyp"}}
    assert hide_secrets_in(tree) == {
        "input": "https://host/a",
        "n": [1, 2.5, None, True, "/a?b=c"],
        "d": {"x://h": "polyp"},
    }


def test_credentials_in_a_bucket_and_shown_locations_are_refused_in_a_sentence():
    with pytest.raises(ConfigError, match=r"cannot open 's3://bucket/key': its user and password are not used"):
        storage.open_uri(f"s3://AKIA:{S}@bucket/key")
    with pytest.raises(ConfigError, match="give the URL with its query"):
        storage.open_uri(public_uri("https://host/image?id=1"))
    assert storage.open_uri("https://user:x@host/image?id=1")[1] == "https://user:x@host/image?id=1"


def test_a_reader_that_has_enough_ends_nothing():
    code = "from vlsm.shown import say\nfor _ in range(9): say('x' * 100_000)\nprint('y' * 100_000)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(1) == b"x"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
