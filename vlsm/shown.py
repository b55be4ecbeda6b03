r"""Text as people may see it: without the secrets of locations, and without characters that a terminal obeys.

**Secrets.** A location may hold a password or a signature. What people see (records, rows, logs, messages, reports)
holds the location without them:

- User and password are left out: `https://user:password@host/a.png` is shown as `https://host/a.png`.
- The query of an HTTP URL is left out. Parameters that sign or log in are left out without a trace, so a URL that is
  signed again is the same image. Other parameters may tell two images apart: a digest stands for them.
  `https://host/image?id=7&X-Amz-Signature=abc` is shown as `https://host/image?~5a1c...` (16 hex digits).
- A fragment with parameters (`#access_token=abc`) is left out.
- In locations of other schemes, a question mark is part of a name, unless parameters that sign follow it.

A secret in the path of a URL cannot be recognised.

**Characters.** Control characters, marks that change the direction of text, invisible characters and halves of
characters are shown as Python writes them: `\x1b`, `\u202e`. All other characters stay.
"""

import argparse
import contextlib
import hashlib
import logging
import os
import re
import sys
import traceback
import unicodedata
from typing import Any, NoReturn, TextIO

from vlsm.quotes import hint_at_quotes

# The lengths are bounded, so that the time grows with the length of a text and not with its square.
_SCHEME = r"(?<![A-Za-z0-9+.\-])[A-Za-z][A-Za-z0-9+.\-]{0,30}://"
_PORT = r"\d{1,5}(?:[\s/?#\"',;:)\]}>]|$)"
# up to the last @ of the authority; or, in a password with a slash, up to the first @ behind a colon without a port
_USER = re.compile(
    rf"({_SCHEME})(?:[^\s/?#]{{0,2048}}@|(?!\[)[^\s/?#@:]{{0,255}}:(?!{_PORT}|[\s/?#]|$)[^\s@]{{0,2048}}@)+",
    re.IGNORECASE,
)
_SUSPICIOUS = re.compile(r"[?@#=]|%3|\\/")
_LOCATION = re.compile(r"[A-Za-z][A-Za-z0-9+.:\-]*://")
_CONTAINERS = re.compile(r"(abfss?|wasbs?|az|adl)://[^:@]+@", re.IGNORECASE)  # container@account: not a user
_END = r"""(?:(?!["'`](?![\w%=&.+/~-])|\\["'])[^\s<>])"""  # a character of a query; a quote behind it ends it
_QUERY = re.compile(rf"\?({_END}+)")
_PARAMETER = r"[\w.-]{1,255}=[^\s&/\"'<>]*"
_FRAGMENT = re.compile(rf"#({_PARAMETER}(?:&{_PARAMETER})*)(?![\w/])")
_PLACE = re.compile(r"(?:volume=\d+,)?(?:page|frame|slice|row|volume)=\d+")  # a selector of an image in a file
_LONGEST_URL = 8192  # characters
_DIGEST = re.compile(r"~[0-9a-f]{16}")
_PUNCTUATION = ".,:;)]}"  # behind a URL in a sentence

_SIGNING = re.compile(r"x-(?:amz|goog|oss|obs|cos|ms)-.*|x-id|q-(?:sign|ak|key|header|url).*", re.IGNORECASE)
_SIGNATURES = {"sig", "signature", "x-amz-signature", "x-goog-signature", "x-oss-signature", "q-signature"}
# parameters of a signature; beside one, or else they may tell images apart
_BESIDE_SIGNATURE = set(
    "sv ss srt sp se st spr sr si sdd sip ses skoid sktid skt ske sks skv saoid suoid scid "
    "expires policy key-pair-id hash-algorithm awsaccesskeyid googleaccessid ossaccesskeyid accesskeyid".split()
)
_LOGINS = set(
    "token access_token id_token refresh_token auth auth_token authtoken authorization api_key apikey api-key jwt hmac "
    "password passwd pwd secret client_secret session_token security-token sas hdnea hdnts hdntl".split()
)
# what stands in texts without its URL
_LOOSE = re.compile(
    r"(?<![\w-])((?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|AWSAccessKeyId|AWS_SECRET_ACCESS_KEY|AWS_SESSION_TOKEN|GoogleAccessId|OSSAccessKeyId"
    r"|access_token|(?<=[?&])(?:sig|signature|token))=)[^\s&\"'<>]+",
    re.IGNORECASE,
)
_ENCODED = re.compile(r"(https?%3A%2F%2F)[^\s&\"'<>]+", re.IGNORECASE)  # a URL as a parameter
_HEADER = re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?(?:basic|bearer|digest|aws4-hmac-sha256)\s+)[^'\"\n]+", re.I)

_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode's categories of characters that no font shows
# joiners belong to letters and emoji; not between the letters of European scripts, where nobody sees them
_JOINED = re.compile(r"(?<=[\u0600-\u1fff\u2100-\ufefe\U00010000-\U000e0000\ufe0f])[\u200c\u200d]"
                     r"(?=[\u0600-\u1fff\u2100-\ufefe\U00010000-\U000e0000])")  # fmt: skip


def hide_secrets(text: str) -> str:
    """Return a text in which no location has a user, a password, a query or a fragment with parameters.

    The text may be a location, or a message with locations in it. A text that was shown before stays the same.
    """
    if ":\\/\\/" in text:  # JSON
        text = text.replace("\\/", "/")
    if "://" in text:
        text = _QUERY.sub(_without_query, _without_user(text))
        text = _FRAGMENT.sub(_without_fragment, text)
    if "%3" in text:
        text = _ENCODED.sub(r"\1hidden", text)
    if "=" in text:
        text = _LOOSE.sub(r"\1hidden", text)
    return _HEADER.sub(r"\1hidden", text) if "uthorization" in text.lower() else text


def hide_secrets_in(tree: Any) -> Any:
    """Return a tree of plain values in which `hide_secrets` has been applied to every text, the keys included."""
    if isinstance(tree, dict):
        return {hide_secrets_in(key): hide_secrets_in(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [hide_secrets_in(value) for value in tree]
    return public_uri(tree) if isinstance(tree, str) else tree


def public_uri(uri: str) -> str:
    """Return a location as rows of results show it. Unlike `hide_secrets`, it may have blanks and quotes anywhere.

    A local path stays as it is: it has no secrets.
    """
    if not _SUSPICIOUS.search(uri):  # nearly every location: this is called for each row of a run
        return uri
    if not _LOCATION.match(uri):
        return hide_secrets(uri) if "://" in uri else uri
    start, mark, end = _without_user(uri).partition("?")
    query, sharp, fragment = end.partition("#")
    if not mark or not (start.lower().startswith(("http://", "https://")) or _is_signed(query)):
        return hide_secrets(uri)
    return hide_secrets(start + sharp + fragment).replace(start, start + _digest_query(query), 1)


def describe_secret(uri: str) -> str | None:
    """Return why a location cannot be opened, if it holds credentials in vain, or is one that was shown."""
    scheme, _, rest = uri.partition("://")
    if scheme.lower() in ("s3", "s3a", "gs", "gcs") and _without_user(uri) != uri:
        return "its user and password are not used; the environment states them, as AWS_ACCESS_KEY_ID"
    if scheme.lower() in ("http", "https") and _DIGEST.fullmatch(rest.partition("?")[2].partition("#")[0]):
        return "a digest stands for its query, as in all records and results; give the URL with its query"
    return None


def _without_user(text: str) -> str:
    return _USER.sub(lambda found: found[0] if _CONTAINERS.fullmatch(found[0]) else found[1], text)


def _is_signed(query: str) -> bool:
    names = {part.partition("=")[0].lower() for part in query.split("&")}
    return bool(names & (_SIGNATURES | _LOGINS)) or any(map(_SIGNING.fullmatch, names))


def _without_query(found: "re.Match[str]") -> str:
    """Return what stands for a question mark and the characters behind it, wherever it may be in a text."""
    before = _line_before(found)
    plain = found[1].rstrip(_PUNCTUATION)
    query, sharp, fragment = plain.partition("#")
    is_http = "http://" in before or "https://" in before  # its path may have blanks
    is_other = "://" in before.rpartition(" ")[2] and _is_signed(query)
    if not query or not (is_http or is_other):
        return found[0]
    return _digest_query(query) + sharp + fragment + found[1][len(plain) :]


def _without_fragment(found: "re.Match[str]") -> str:
    """Return what stands for parameters behind a number sign: nothing in an HTTP URL, unless they select an image."""
    plain = found[1].rstrip(_PUNCTUATION)
    word = _line_before(found).rpartition(" ")[2]
    if _PLACE.fullmatch(plain) or not ("http://" in word or "https://" in word):
        return found[0]
    return found[1][len(plain) :]


def _line_before(found: "re.Match[str]") -> str:
    """Return the text before a match in its line, as far as a URL may be long, in lower case."""
    return found.string[max(0, found.start() - _LONGEST_URL) : found.start()].rpartition("\n")[2].lower()


def _digest_query(query: str) -> str:
    """Return what stands for a query: nothing if it only signs, else a question mark and a digest of the rest."""
    if _DIGEST.fullmatch(query):
        return f"?{query}"
    named = [(part.partition("=")[0].lower(), part) for part in query.split("&") if part]
    beside = _BESIDE_SIGNATURE if any(name in _SIGNATURES for name, _ in named) else set()
    out = _SIGNATURES | _LOGINS | beside
    kept = sorted(part for name, part in named if name not in out and not _SIGNING.fullmatch(name))
    return f"?~{hashlib.sha256('&'.join(kept).encode('utf-8', 'surrogatepass')).hexdigest()[:16]}" if kept else ""


def escape(text: str, keep: str = "") -> str:
    """Return a text with the characters that a terminal obeys, or that nobody sees, as Python writes them.

    Args:
        text: any text, also with surrogates.
        keep: characters that stay, such as line breaks between lines of our own.
    """
    if text.isascii() and text.isprintable():
        return text
    joiners = {found.start() for found in _JOINED.finditer(text)} if "\u200c" in text or "\u200d" in text else ()
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in _HIDDEN and letter not in keep and position not in joiners
        else letter
        for position, letter in enumerate(text)
    )


class Lines(str):
    """A text of several lines of our own; as a value of a log record its line breaks stay."""


def show(value: object) -> str:
    """Return a value as one line of text that may be printed, logged or written where people read it."""
    return hide_secrets(escape(str(value)))  # escaped first: a line break would end a URL


def show_lines(text: str) -> str:
    """Return a text of several lines as `show` does; its line breaks and tabs stay."""
    return hide_secrets(escape(text, keep="\n\t"))


def say(text: str, file: TextIO | None = None, end: str = "\n") -> None:
    """Print lines of text as `show_lines` returns them: every command prints with this function.

    If the reader of a pipe has enough, as `head` has after ten lines, the rest goes nowhere.

    Args:
        text: the lines.
        file: None for stdout.
        end: printed behind the text.
    """
    stream = file or sys.stdout
    try:
        print(show_lines(text), end=end, file=stream, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # for what follows, and for what Python still writes when it ends
        os.close(nowhere)


def say_error(error: object) -> None:
    """Print the one line about an error that ends a command."""
    print(f"error: {show(error)}", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """A parser of arguments whose errors show the words of the command line as `show` returns them.

    Every command has one, so it also sees to the traceback of a command that crashes: with its causes, it may quote
    locations and names.
    """

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        sys.excepthook = _say_crash
        self._words: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse words as argparse does, and remember them for a message."""
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End the command with exit code 2."""
        super().error(show(message + hint_at_quotes(self._words)))


class _ShownRecords(logging.Filter):
    """Shows what log records hold: values in one line each, and the message, which may have several lines."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; it is always logged."""
        with contextlib.suppress(TypeError, ValueError):  # a wrong format: logging reports it
            if isinstance(record.args, tuple):
                record.args = tuple(map(_show_value, record.args))
            elif record.args:
                record.args = {name: _show_value(value) for name, value in record.args.items()}
            record.msg, record.args = show_lines(record.getMessage()), None
        if record.exc_info and not record.exc_text:
            record.exc_text = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
        if record.exc_text:
            record.exc_text = show_lines(record.exc_text)
        return True


def _show_value(value: object) -> object:
    """Return a value of a log record whose text is shown in one line; numbers stay numbers, because %d needs them."""
    if isinstance(value, str):
        return show_lines(value) if isinstance(value, Lines) else show(value)
    return value if hasattr(value, "__float__") or hasattr(value, "__index__") else _Shown(value)


class _Shown:
    """A value with shown texts."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __str__(self) -> str:
        return show(self._value)

    def __repr__(self) -> str:
        return show(repr(self._value))


_RECORDS = _ShownRecords()


def show_records(place: logging.Filterer) -> None:
    """Make a logger or a handler show the values, messages and tracebacks of its records as `show` does."""
    place.addFilter(_RECORDS)  # does nothing if it has it


_NOISY = ("aiobotocore", "botocore", "httpx", "s3fs")  # they tell of credentials and requests at INFO


def set_up_logging(form: str = "%(message)s") -> None:
    """Log to stderr from now on; foreign records are shown as our own are."""
    logging.basicConfig(level=logging.INFO, format=form, datefmt="%H:%M:%S", stream=sys.stderr)
    for handler in logging.root.handlers:
        show_records(handler)
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _say_crash(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    say("".join(traceback.format_exception(kind, error, trace)), sys.stderr, end="")
