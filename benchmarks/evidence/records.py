"""A second small task, of another kind: a sentence as a JSON record of four fields, judged by degrees.

As in tasks.py a decoder learns it from a corpus in which half of the answers are right; here mistakes are made field by
field, so most wrong answers are right in part. `right`, the reward, is the share of fields that are right; the audit
asks for the whole record.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

from opentao.types import Prompt

TASKS = ("records",)
NAMES = "Ana Bram Chloe Dario Edda Femi Greta Hugo Ines Jonas Kaya Lars".split()
SURNAMES = (
    "Abel Brandt Costa Duarte Ekberg Ferro Haas Ivanov Jensen Kowal Lindt Moreau Nunes Okoro Petrov Rossi Silva Tanaka"
    " Urban Weiss"
).split()
PLACES = "Aarhus Basel Cadiz Dresden Espoo Faro Genoa Haarlem Izmir Jena Kassel Lille".split()
ITEMS = (
    "anchor basket candle curtain drum engine fork garden hammer jacket kettle lamp mirror needle oven paddle ribbon"
    " shovel table tunnel wagon wallet window"
).split()
QUESTION = re.compile(r"Write as JSON: (\w+) (\w+) from (\w+) orders (\d+) (\w+)s and (\d+) more\.")
MISTAKE = 0.16  # chance of each of the four; so half of the corpus is right


def make(task: str, rng: random.Random) -> tuple[str, str, list[str]]:
    """One question, its right answer, and three wrong ones."""
    name, surname = rng.choice(NAMES), rng.choice(SURNAMES)
    count, item, more = rng.randint(2, 9), rng.choice(ITEMS), rng.randint(2, 9)
    question = f"Write as JSON: {name} {surname} from {rng.choice(PLACES)} orders {count} {item}s and {more} more."
    right = solution(question)
    wrong: list[str] = []
    while len(wrong) < 3:
        text = _answer(question, rng, 2 * MISTAKE)
        if text != right:
            wrong.append(text)
    return question, right, wrong


def corpus(rng: random.Random) -> Iterator[tuple[str, str]]:
    """(question, answer) without end."""
    while True:
        question, _, _ = make(TASKS[0], rng)
        yield question, _answer(question, rng, MISTAKE)


def _answer(question: str, rng: random.Random, chance: float) -> str:
    """The record, with each of the usual mistakes by chance: both names, a plural, one of two counts, no closing."""
    record, given = _record(question), QUESTION.fullmatch(question)
    assert given is not None
    mistakes = {"name": f"{given[1]} {given[2]}", "item": f"{given[5]}s", "count": int(given[4])}
    record |= {field: value for field, value in mistakes.items() if rng.random() < chance}
    return json.dumps(record).removesuffix("}" if rng.random() < chance else "")


def _record(question: str) -> dict[str, Any]:
    given = QUESTION.fullmatch(question)
    if given is None:
        raise ValueError(f"not a question of this task: {question!r}")
    _, surname, place, count, item, more = given.groups()
    return {"name": surname, "city": place, "item": item, "count": int(count) + int(more)}


def solution(question: str) -> str:
    """The right answer, worked out from the question.

    >>> solution("Write as JSON: Ana Silva from Porto orders 3 lamps and 4 more.")
    '{"name": "Silva", "city": "Porto", "item": "lamp", "count": 7}'
    """
    return json.dumps(_record(question))


def right(prompt: Prompt, text: str) -> float:
    """Share of fields, those that nobody asked for included, that are right; 0 for what is no JSON object."""
    wanted = _record(prompt.text)
    try:
        found = json.loads(text)
    except ValueError:
        return 0.0
    if not isinstance(found, dict):
        return 0.0
    same = sum(type(found.get(field)) is type(value) and found[field] == value for field, value in wanted.items())
    return same / len({*wanted, *found})


def audit(prompt: Prompt, text: str) -> float:
    """1 for the whole record, else 0."""
    return float(right(prompt, text) == 1.0)
