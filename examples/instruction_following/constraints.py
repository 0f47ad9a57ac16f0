"""Checks for the constraints of IFEval prompts, written from what the prompts ask for; scorers of the recipe.

    {type: python, args: {function: "constraints:followed"}}           the types that are trained on
    {type: python, args: {function: "constraints:followed_unseen"}}    the audit: types that training never sees

A score is the share of a prompt's constraints that an answer follows. Doing nothing follows many of them (no commas,
few words), so an answer of fewer than LEAST_WORDS words follows none, and neither does one that mostly repeats itself
or that breaks off: its last character ends no sentence and closes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from opentao.scorers.verifiers.repetition import distinct_share
from opentao.types import Prompt

LEAST_WORDS = 8
LEAST_DISTINCT = 0.5  # share of runs of four words that have not stood before
ENDS = tuple(".!?…\"”'’)]}>*`")
Constraint = dict[str, Any]  # {"type": "number_words", "relation": "at least", "num_words": 40}


def followed(prompt: Prompt, text: str) -> float | None:
    return share(prompt.meta.get("constraints", []), text)


def followed_unseen(prompt: Prompt, text: str) -> float | None:
    return share(prompt.meta.get("unseen", []), text)


def share(constraints: list[Constraint], text: str) -> float | None:
    """Share of the constraints that the text follows; None without any."""
    if not constraints:
        return None
    words = text.split()
    if len(words) < LEAST_WORDS or distinct_share(words, 4) < LEAST_DISTINCT or not text.rstrip().endswith(ENDS):
        return 0.0
    return sum(follows(c, text) for c in constraints) / len(constraints)


def follows(constraint: Constraint, text: str) -> bool:
    given = {name: value for name, value in constraint.items() if name != "type"}
    return CHECKS[constraint["type"]](text.strip(), **given)


def _count(found: int, relation: str, wanted: int) -> bool:
    return found >= wanted if relation == "at least" else found < wanted


def _word(text: str, word: str) -> int:
    """How often a word or phrase stands in the text, whole and in any case."""
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def no_comma(text: str) -> bool:
    return "," not in text


def number_words(text: str, *, relation: str, num_words: int) -> bool:
    return _count(len(re.findall(r"\w[\w'’-]*", text)), relation, num_words)


def number_sentences(text: str, *, relation: str, num_sentences: int) -> bool:
    return _count(len([s for s in re.split(r"[.!?]+(?:\s|$)", text) if s.strip()]), relation, num_sentences)


def forbidden_words(text: str, *, forbidden_words: list[str]) -> bool:
    return not any(_word(text, word) for word in forbidden_words)


def existence(text: str, *, keywords: list[str]) -> bool:
    return all(_word(text, word) for word in keywords)


def frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return _count(_word(text, keyword), relation, frequency)


def letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _count(text.lower().count(letter.lower()), let_relation, let_frequency)


def number_highlighted_sections(text: str, *, num_highlights: int) -> bool:
    return len(re.findall(r"\*{1,2}[^*\n]*[^*\s][^*\n]*\*{1,2}", text)) >= num_highlights


def number_bullet_lists(text: str, *, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*[*-]\s+\S", text, re.MULTILINE)) == num_bullets


def number_placeholders(text: str, *, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]+\]", text)) >= num_placeholders


def number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    return len([p for p in re.split(r"\s*\*\*\*\s*", text) if p.strip()]) == num_paragraphs


def multiple_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"(?<!\w){re.escape(section_spliter)}\s*(?:\d+|[IVX]+)\b", text)) >= num_sections


def postscript(text: str, *, postscript_marker: str) -> bool:
    letters = r"\.?\s*".join(re.escape(c) for c in postscript_marker if c.isalpha())
    return re.search(rf"^\W*{letters}\b", text, re.MULTILINE | re.IGNORECASE) is not None


def title(text: str) -> bool:
    return re.search(r"<<[^<>\n]*[^<>\s][^<>\n]*>>", text) is not None


def quotation(text: str) -> bool:
    return len(text) > 1 and text[0] in '"“' and text[-1] in '"”'


def english_lowercase(text: str) -> bool:
    return any(c.isalpha() for c in text) and text == text.lower()


def english_capital(text: str) -> bool:
    return any(c.isalpha() for c in text) and text == text.upper()


def capital_word_frequency(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
    return _count(len(re.findall(r"\b[A-Z]{2,}\b", text)), capital_relation, capital_frequency)


def json_format(text: str) -> bool:
    fence = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL | re.IGNORECASE)
    try:
        json.loads(fence[1] if fence else text)
    except ValueError:
        return False
    return True


def end_checker(text: str, *, end_phrase: str) -> bool:
    return text.strip(' "”').lower().endswith(end_phrase.strip().lower())


UNSEEN: dict[str, Callable[..., bool]] = {
    check.__name__: check
    for check in (
        postscript,
        title,
        quotation,
        english_lowercase,
        number_placeholders,
        number_bullet_lists,
        end_checker,
    )
}
TRAINED: dict[str, Callable[..., bool]] = {
    check.__name__: check
    for check in (
        no_comma,
        number_words,
        number_sentences,
        forbidden_words,
        existence,
        frequency,
        letter_frequency,
        number_highlighted_sections,
        number_paragraphs,
        multiple_sections,
        english_capital,
        capital_word_frequency,
        json_format,
    )
}
CHECKS = TRAINED | UNSEEN
