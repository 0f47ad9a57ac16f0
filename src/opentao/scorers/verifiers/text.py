"""Text as the verifiers compare it, code fences, and regular expressions that cannot run for ever."""

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


def find_last(pattern: regex.Pattern[str], text: str) -> str | None:
    """The last match of the pattern (its first group, if it has one), or None.

    Raises:
        Unscored: no answer after `TIMEOUT` seconds.
    """
    found = None
    try:
        for found in pattern.finditer(text, timeout=TIMEOUT):  # noqa: B007  # the last one is wanted
            pass
    except TimeoutError as error:
        raise Unscored("timeout", f"pattern {pattern.pattern!r} took over {TIMEOUT:g} s") from error
    return None if found is None else found[1 if pattern.groups else 0]


def last_fence(text: str) -> str:
    """What the last Markdown code fence holds; without a fence, the text itself. An open fence ends with the text.

    A fence may stand at the end of the last line of code, and code on one line between two fences counts. Lines of an
    indented fence (of a list) are less indented by as much.

    >>> last_fence("```sql\\nSELECT 1;```"), last_fence("```SELECT 2```"), last_fence("- so:\\n  ```\\n  a = 3\\n  ```")
    ('SELECT 1;', 'SELECT 2', 'a = 3')
    """
    blocks: list[list[str]] = []
    inside, indent = False, 0
    for line in text.split("\n"):
        start = line.lstrip()
        if not inside and start.startswith("```"):
            one_line, closed, _ = start[3:].rpartition("```")
            blocks.append([one_line] if closed else [])
            inside, indent = not closed, len(line) - len(start)
        elif inside:
            code, closed, after = line.rpartition("```")
            inside = not closed or (bool(after.strip()) and not start.startswith("```"))
            if inside or code.strip():
                kept = line if inside else code
                blocks[-1].append(kept[min(indent, len(kept) - len(kept.lstrip())) :])
    return "\n".join(blocks[-1]) if blocks else text
