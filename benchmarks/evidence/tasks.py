"""Three small tasks with one right answer each, made by rule, for decoders that are trained here on their own corpus.

The corpus is what a company's logs are like: half of its answers are right, the others have one of the usual mistakes.
A decoder that has learnt it is right now and then, and knows better than its first try: there is something to bake.
`right` judges an answer from the prompt alone; it is both the exact verifier and, under its other name, the audit.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from opentao.types import Prompt

MONTHS = "January February March April May June July August September October November December".split()
WORDS = (
    "anchor apron basket beacon bridge candle carpet copper cotton curtain desk drum engine feather filter fork garden"
    " glove hammer harbor helmet hinge jacket kettle ladder lamp lantern magnet mirror needle oven paddle pencil pillow"
    " ribbon saddle shovel spoon table ticket tunnel wagon wallet window"
).split()
PLACES = "Bonn Cork Delft Ghent Graz Leeds Lyon Malmo Porto Tartu Turin Vigo".split()
TASKS = ("dates", "sorting", "orders")
NOISE = 0.5  # share of the corpus with a mistake


def make(task: str, rng: random.Random) -> tuple[str, str, list[str]]:
    """One question, its right answer, and wrong ones of the usual kinds."""
    if task == "dates":
        year, month, day = rng.randint(1990, 2029), rng.randint(1, 12), rng.randint(1, 28)
        question = f"Write as YYYY-MM-DD: {day} {MONTHS[month - 1]} {year}"
        right = f"{year}-{month:02}-{day:02}"
        other = month % 12 + 1
        return (
            question,
            right,
            [f"{year}-{day:02}-{month:02}", f"{day:02}.{month:02}.{year}", f"{year}-{other:02}-{day:02}"],
        )
    if task == "sorting":
        words = rng.sample(WORDS, 3)
        right = sorted(words)
        swapped = [right[1], right[0], right[2]]
        return (
            f"Sort by name: {', '.join(words)}",
            ", ".join(right),
            [
                ", ".join(swapped),
                ", ".join(reversed(right)),
                ", ".join(right[:2]),
            ],
        )
    number = f"{rng.choice('ABCDEFGH')}{rng.randint(100, 999)}"
    other = f"{rng.choice('JKLMNPQR')}{rng.randint(100, 999)}"
    item, place = rng.choice(WORDS), rng.choice(PLACES)
    note = rng.choice(
        [
            f"Order {number} with a {item} goes to {place}, invoice {other}.",
            f"Invoice {other}: please send the {item} of order {number} to {place}.",
        ]
    )
    return f"Which order? {note}", number, [other, item, f"{number} {place}"]


def corpus(rng: random.Random, tasks: tuple[str, ...] = TASKS) -> Iterator[tuple[str, str]]:
    """(question, answer) without end."""
    while True:
        question, right, wrong = make(rng.choice(tasks), rng)
        yield question, rng.choice(wrong) if rng.random() < NOISE else right


def solution(question: str) -> str:
    """The right answer, worked out from the question.

    >>> solution("Write as YYYY-MM-DD: 3 March 2021"), solution("Sort by name: lamp, desk")
    ('2021-03-03', 'desk, lamp')
    >>> solution("Which order? Order A100 with a lamp goes to Bonn, invoice J200.")
    'A100'
    """
    asked, _, given = question.partition(": " if "?" not in question else "? ")
    if asked.startswith("Write"):
        day, month, year = given.split()
        return f"{year}-{MONTHS.index(month) + 1:02}-{int(day):02}"
    if asked.startswith("Sort"):
        return ", ".join(sorted(given.split(", ")))
    words = given.replace(",", "").replace(".", "").split()
    return words[[w.lower() for w in words].index("order") + 1]


def right(prompt: Prompt, text: str) -> float:
    return float(text.strip() == solution(prompt.text))


def audit(prompt: Prompt, text: str) -> float:
    """The same judgement for reports on runs whose reward is another one."""
    return right(prompt, text)
