"""Groups on the terminal, for people.

What a model wrote is hostile until shown otherwise: it may hold terminal escape codes, rich markup, or characters that
turn the reading direction round. `visible` makes all of these harmless and readable; it is used wherever text from
outside meets a terminal or a page.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from opentao.types import Group, Score

UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, escape among them; newline and tab stay
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # reading direction: text that shows in another order than it is
    "\u2028\u2029"  # line separators
    "\ud800-\udfff"  # halves of a character: cannot be written as UTF-8
    "\U000e0000-\U000e007f]"  # invisible tags
)


def visible(text: str) -> str:
    r"""The text with every unsafe character spelled out: an escape character becomes the four characters ``\x1b``."""
    return UNSAFE.sub(lambda match: _spelled(ord(match.group())), text.replace("\r\n", "\n"))


def _spelled(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def show_groups(groups: Sequence[Group], limit: int | None, console: Console) -> None:
    """Print the first `limit` groups (None: all), the responses of each from best to worst reward."""
    shown = groups if limit is None else groups[:limit]
    for number, group in enumerate(shown, 1):
        _show_group(number, group, console)
    if len(shown) < len(groups):
        console.print(Text(f"{len(shown)} of {len(groups)} groups shown", style="dim"))


def _show_group(number: int, group: Group, console: Console) -> None:
    console.print(Rule(Text.assemble(f"{number}  ", (group.prompt.id, "dim")), align="left", style="dim"))
    console.print(Padding(Text(visible(group.prompt.text) or "(no user turn)", style="bold"), (0, 0, 1, 2)))
    if group.failure is not None:
        message = f"failed: {group.failure.kind}: {group.failure.message}"
        console.print(Padding(Text(visible(message), style="red"), (0, 0, 1, 2)))
    for place, index in enumerate(_ranked(group), 1):
        console.print(Padding(_heading(place, index, group), (0, 0, 0, 2)))
        console.print(Padding(Text(visible(group.responses[index].text) or "(empty)"), (0, 0, 1, 5)))


def _ranked(group: Group) -> list[int]:
    """Indices of the responses, best reward first, unscored last; equal ones in the order they were sampled."""
    rewards = group.rewards_N or (math.nan,) * len(group.responses)
    return sorted(range(len(rewards)), key=lambda i: math.inf if math.isnan(rewards[i]) else -rewards[i])


def _heading(place: int, index: int, group: Group) -> Text:
    """One line: place, reward, each scorer's number, strategy, how it ended, length."""
    response = group.responses[index]
    reward = group.rewards_N[index] if group.rewards_N else math.nan
    facts = [response.strategy, _finish(response.finish), f"{len(response.tokens_R)} tokens"]
    parts: list[str | tuple[str, str]] = [(f"#{place} ", "cyan"), _number("reward", reward)]
    parts += [_score(name, scores[index]) for name, scores in group.scores.items()]
    return Text("  ").join(Text.assemble(p) for p in [*parts, (visible(" · ".join(facts)), "dim")])


def _finish(finish: str) -> str:
    return "cut at the length limit" if finish == "length" else finish


def _number(name: str, value: float) -> tuple[str, str]:
    return (f"{name} unscored", "yellow") if math.isnan(value) else (f"{name} {value:.3g}", "bold")


def _score(name: str, score: Score) -> tuple[str, str]:
    if score.scored:
        return f"{visible(name)} {score.value:.3g}", ""
    return visible(f"{name} unscored ({score.error or 'no reason given'})"), "yellow"
