"""Text as the verifiers compare it, and regular expressions that cannot run for ever."""

from __future__ import annotations

import unicodedata

import regex

from opentao.scorers.verifiers.base import Unscored

TIMEOUT = 1.0  # seconds for one search; an honest pattern takes microseconds


def normalise(text: str, *, casefold: bool = False) -> str:
    """NFC, so that the two encodings of an "é" are one; folding can leave NFC, hence the second pass."""
    text = unicodedata.normalize("NFC", text)
    return unicodedata.normalize("NFC", text.casefold()) if casefold else text


def search(pattern: regex.Pattern[str], text: str, *, full: bool = False) -> bool:
    """True if the pattern is found in the text (`full`: matches all of it).

    Raises:
        Unscored: no answer after `TIMEOUT` seconds. `re` could not be stopped, which is why this uses `regex`.
    """
    find = pattern.fullmatch if full else pattern.search
    try:
        return find(text, timeout=TIMEOUT) is not None
    except TimeoutError as error:
        raise Unscored("timeout", f"pattern {pattern.pattern!r} took over {TIMEOUT:g} s") from error
