"""Words of a command line that the shell has cut at blanks, because nobody quoted them."""

import shlex
from collections.abc import Sequence

_PAIRS = {"[": "]", "{": "}", "(": ")"}
_FLAGS = ("--set",)


def hint_at_quotes(words: Sequence[str]) -> str:
    """Return what was probably meant by a `--set` whose value has blanks, with "; " before it, or "".

    `--set prompts=[polyp, flat polyp]` reaches a program as four words, and `--set a = b` as four, too.

    Args:
        words: the words of a command line.
    """
    for position, (flag, value) in enumerate(zip(words, words[1:], strict=False)):
        if flag not in _FLAGS:
            continue
        rest = list(words[position + 2 :])
        if not is_closed(value):
            closing = next(
                (number for number in range(1, len(rest) + 1) if is_closed(" ".join([value, *rest[:number]]))), 0
            )
            whole = " ".join([value, *rest[:closing]]) if closing else f"{value} ..."
            return f"; a value with blanks needs quotes: {flag} {shlex.quote(whole)}"
        if "=" not in value and rest[:1] and rest[0].startswith("="):
            after = rest[1:2] if rest[0] == "=" else []
            return f"; write it without blanks: {flag} {shlex.quote(''.join([value, rest[0], *after]))}"
        if value.endswith("=") and rest[:1] and not rest[0].startswith("-"):
            return f"; write it without blanks: {flag} {shlex.quote(value + rest[0])}"
    return ""


def is_closed(text: str) -> bool:
    """Return whether each bracket and quote of a text is closed."""
    waiting: list[str] = []
    for letter in text:
        if waiting and waiting[-1] in "'\"":
            if letter == waiting[-1]:
                waiting.pop()
        elif letter in _PAIRS:
            waiting.append(_PAIRS[letter])
        elif letter == '"':
            waiting.append(letter)
        elif waiting and letter == waiting[-1]:
            waiting.pop()
    return not waiting
