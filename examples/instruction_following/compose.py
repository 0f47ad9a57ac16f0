"""Prompts in the manner of IFEval that ask for a sentence or two: a task, a topic, and one or two constraints.

IFEval's own prompts are few (164 of types that are checked and trained on) and ask for long texts, at which a small
model spends minutes; these are as many as are wanted and take at most 48 tokens. Everything is drawn from the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

Constraint = dict[str, Any]
Draw = Callable[[random.Random, str], tuple[Constraint, str]]  # (rng, topic) -> constraint, the sentence that asks

TASKS = (
    "Describe {} briefly.",
    "Explain to a child in few words what {} is.",
    "Write a very short advertisement for {}.",
    "Write a very short note to thank a friend for {}.",
    "Say briefly how {} is made.",
    "Say briefly why people like {}.",
    "Begin a very short story about {}.",
)
NOUNS = (
    "bicycle lighthouse umbrella garden violin ladder kettle lantern sailboat blanket telescope camera suitcase drum"
    " carpet teapot notebook scarf tent candle mirror bridge fountain orchard windmill compass sandwich tractor puzzle"
    " hammock basket accordion wallet balloon kite pillow clock lemonade ferry greenhouse oven island ticket backpack"
    " flute waterfall jacket magnet pancake rocket statue sweater trumpet village"
)
TOPICS = tuple(f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" for noun in NOUNS.split())
KEYWORDS = (
    "river yellow morning music paper winter friend stone market cloud silver journey kitchen window letter forest"
    " quiet golden bread story"
)
WORDS = KEYWORDS.split()
PLAIN = ("people", "great", "perfect", "useful", "beautiful", "make", "used", "time", "good")


def _no_comma(rng: random.Random, topic: str) -> tuple[Constraint, str]:
    return {"type": "no_comma"}, rng.choice(("Do not use any commas.", "Leave out all commas in your answer."))


def _number_words(rng: random.Random, topic: str) -> tuple[Constraint, str]:
    relation, n = rng.choice((("at least", 20), ("at least", 25), ("less than", 12), ("less than", 15)))
    return _type("number_words", relation=relation, num_words=n), f"Answer with {relation} {n} words."


def _number_sentences(rng: random.Random, topic: str) -> tuple[Constraint, str]:
    relation, n = rng.choice((("at least", 3), ("at least", 4), ("less than", 2)))
    asked = f"Your answer should contain {relation} {n} sentences."
    return _type("number_sentences", relation=relation, num_sentences=n), asked


def _forbidden_words(rng: random.Random, topic: str) -> tuple[Constraint, str]:
    words = [topic.split()[-1], rng.choice(PLAIN)]
    return _type("forbidden_words", forbidden_words=words), f'Do not use the words "{words[0]}" and "{words[1]}".'


def _existence(rng: random.Random, topic: str) -> tuple[Constraint, str]:
    words = rng.sample(WORDS, 2)
    return _type("existence", keywords=words), f'Include the keywords "{words[0]}" and "{words[1]}".'


def _frequency(rng: random.Random, topic: str) -> tuple[Constraint, str]:
    word, n = rng.choice(WORDS), 2
    asked = f'The word "{word}" should appear at least {n} times.'
    return _type("frequency", keyword=word, frequency=n, relation="at least"), asked


def _letter_frequency(rng: random.Random, topic: str) -> tuple[Constraint, str]:
    letter, n = rng.choice("bckpvw"), rng.choice((3, 4))
    asked = f"The letter {letter} should appear at least {n} times."
    return _type("letter_frequency", letter=letter, let_frequency=n, let_relation="at least"), asked


def _highlights(rng: random.Random, topic: str) -> tuple[Constraint, str]:
    n = rng.choice((1, 2, 3))
    asked = f"Highlight at least {n} phrases with markdown, for example *this phrase*."
    return _type("number_highlighted_sections", num_highlights=n), asked


def _paragraphs(rng: random.Random, topic: str) -> tuple[Constraint, str]:
    asked = "Write 2 very short paragraphs with the markdown divider *** between them."
    return _type("number_paragraphs", num_paragraphs=2), asked


def _sections(rng: random.Random, topic: str) -> tuple[Constraint, str]:
    word = rng.choice(("SECTION", "PART"))
    asked = f"Your answer must have 2 sections. Mark their beginnings with {word} 1 and {word} 2."
    return _type("multiple_sections", section_spliter=word, num_sections=2), asked


def _capital(rng: random.Random, topic: str) -> tuple[Constraint, str]:
    return {"type": "english_capital"}, "Your entire answer should be in capital letters."


def _capital_words(rng: random.Random, topic: str) -> tuple[Constraint, str]:
    n = rng.choice((2, 3))
    asked = f"Use at least {n} words in all capital letters."
    return _type("capital_word_frequency", capital_frequency=n, capital_relation="at least"), asked


def _json(rng: random.Random, topic: str) -> tuple[Constraint, str]:
    return {"type": "json_format"}, "Wrap your entire answer in JSON format."


def _postscript(rng: random.Random, topic: str) -> tuple[Constraint, str]:
    return _type("postscript", postscript_marker="P.S."), "At the end, add a postscript that starts with P.S."


def _title(rng: random.Random, topic: str) -> tuple[Constraint, str]:
    return {"type": "title"}, "Add a title, wrapped in double angular brackets, such as <<title>>."


def _quotation(rng: random.Random, topic: str) -> tuple[Constraint, str]:
    return {"type": "quotation"}, "Wrap your entire answer in double quotation marks."


def _lowercase(rng: random.Random, topic: str) -> tuple[Constraint, str]:
    return {"type": "english_lowercase"}, "Your entire answer should be in lowercase letters, without any capital."


def _placeholders(rng: random.Random, topic: str) -> tuple[Constraint, str]:
    asked = "Include at least 1 placeholder in square brackets, such as [name]."
    return _type("number_placeholders", num_placeholders=1), asked


def _bullets(rng: random.Random, topic: str) -> tuple[Constraint, str]:
    n = rng.choice((2, 3))
    asked = f"Your answer must contain exactly {n} bullet points, such as: * This is a point."
    return _type("number_bullet_lists", num_bullets=n), asked


def _end(rng: random.Random, topic: str) -> tuple[Constraint, str]:
    phrase = rng.choice(("Is there anything else?", "That is all.", "The end."))
    return _type("end_checker", end_phrase=phrase), f'Finish your answer with exactly this phrase: "{phrase}"'


def _type(name: str, **kwargs: Any) -> Constraint:
    return {"type": name} | kwargs


TRAINED: tuple[Draw, ...] = (
    _no_comma,
    _number_words,
    _number_sentences,
    _forbidden_words,
    _existence,
    _frequency,
    _letter_frequency,
    _highlights,
    _paragraphs,
    _sections,
    _capital,
    _capital_words,
    _json,
)
UNSEEN: tuple[Draw, ...] = (_postscript, _title, _quotation, _lowercase, _placeholders, _bullets, _end)
SECOND: tuple[Draw, ...] = (_no_comma, _forbidden_words, _existence, _letter_frequency)  # goes with every other


def rows(first: Sequence[Draw], topics: Sequence[str], number: int, rng: random.Random, *, two: float) -> list[Any]:
    """So many different prompts, the types of `first` in turn; a share `two` of them with a second constraint."""
    found: dict[str, dict[str, Any]] = {}
    while len(found) < number:
        topic = rng.choice(topics)
        drawn = [first[len(found) % len(first)](rng, topic)]
        if rng.random() < two:
            drawn += [draw(rng, topic) for draw in [rng.choice(SECOND)] if draw is not first[len(found) % len(first)]]
        asked = [rng.choice(TASKS).format(topic), *(sentence for _, sentence in drawn)]
        prompt = " ".join(asked)
        found[prompt] = {"prompt": prompt, "constraints": [c for c, _ in drawn]}
    return list(found.values())
