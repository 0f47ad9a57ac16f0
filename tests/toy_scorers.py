"""Scorers for the tests, found as `toy_scorers:NAME`: with `type: python`, or (`Tokens`) as a plug-in."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

from opentao.types import Group, Prompt


def letters(prompt: Prompt, text: str) -> float:
    """Share of lower-case letters; an empty answer has none."""
    return sum("a" <= c <= "z" for c in text) / max(1, len(text))


def readable(prompt: Prompt, text: str) -> float:
    """Share of letters, of either case, and of spaces."""
    return sum(c.isalpha() or c == " " for c in text) / max(1, len(text))


def chance(prompt: Prompt, text: str) -> float:
    """A number in [0, 1) that has nothing to do with the answer's quality, but is the same every time."""
    return int(hashlib.sha256((prompt.text + text).encode()).hexdigest()[:8], 16) / 16**8


def broken(prompt: Prompt, text: str) -> float:
    raise RuntimeError("the judge is down")


def chatty(prompt: Prompt, text: str) -> float:
    print("debug!")  # noqa: T201
    return letters(prompt, text)


def slow(prompt: Prompt, text: str) -> float:
    time.sleep(0.1)
    return letters(prompt, text)


def constant(prompt: Prompt, text: str) -> float:
    return 0.5


def letters_or_nothing(prompt: Prompt, text: str) -> float | None:
    """No score for prompts that say so."""
    return None if "unscorable" in prompt.text else letters(prompt, text)


def longer(prompt: Prompt, text: str) -> float:
    """Hackable on purpose: the longer, the better."""
    return float(len(text))


def shorter(prompt: Prompt, text: str) -> float:
    """What was really wanted: few characters."""
    return -float(len(text))


@dataclass(kw_only=True)
class Flaky:
    """Plug-in: scores nothing while there is the folder `down`, else as `letters`."""

    name: str
    down: str

    def score(self, group: Group) -> list[float | None]:
        if Path(self.down).is_dir():
            raise ConnectionError("nobody answers")
        return [letters(group.prompt, r.text) for r in group.responses]


@dataclass(kw_only=True)
class Once:
    """Plug-in: fails if it is asked of the same response twice, in this process or another."""

    name: str
    seen: str  # folder of what it has scored

    def score(self, group: Group) -> list[float | None]:
        for response in group.responses:
            key = hashlib.sha256((group.prompt.id + response.policy + response.id + response.text).encode()).hexdigest()
            (Path(self.seen) / key).mkdir(parents=True)
        return [len(r.text) / 1000 for r in group.responses]


@dataclass(kw_only=True)
class EvenTokens:
    """Plug-in: share of even token ids among all tokens of a response."""

    name: str

    def score(self, group: Group) -> list[float | None]:
        return [sum(t % 2 == 0 for t in r.tokens_R) / len(r.tokens_R) for r in group.responses]
