"""Preferences in: which of several answers to one prompt people chose.

JSONL or Parquet rows with `prompt` (text) or `messages` (chat) and either `chosen` and `rejected` (text, or messages
whose last turn is the answer), or `responses` with `ranks` (1 = best). Equal ranks are answers that people found
equally good, or, with ``"ties": "unknown"``, answers that were not compared with each other. Optional: `instruction`
(what counted as good), `margin` (how clear the choice was), `annotator`, `time`, `order` (what stood where), `subset`.
A row that cannot be read is set aside with file, line and reason.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opentao.errors import DataError
from opentao.prompts import ROLES, from_json, rows_of
from opentao.store import write_whole
from opentao.types import Message, Prompt

CARRIED = ("time", "order", "id", "both_bad", "repeat", "policy")  # facts that `tao label` writes and training leaves


@dataclass(kw_only=True, slots=True, frozen=True)
class Ranking:
    """Answers to one prompt with their ranks: ``Ranking(prompt=…, texts=("good", "bad"), ranks=(1.0, 2.0))``"""

    prompt: Prompt
    texts: tuple[str, ...]
    ranks: tuple[float, ...]  # lower is better
    ties_equal: bool = True  # equal ranks are equally good; False: not compared
    instruction: str = ""  # what counted as good
    margin: float = 1.0  # how clear the choice was; multiplies the margin of the loss
    annotator: str = ""
    subset: str = ""
    facts: dict[str, Any] = field(default_factory=dict)  # carried along: time, order, and so on

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) indices of every two answers of different ranks."""
        indices = range(len(self.texts))
        return [(i, j) for i, j in itertools.permutations(indices, 2) if self.ranks[i] < self.ranks[j]]

    @property
    def tied(self) -> list[tuple[int, int]]:
        """Indices of every two answers that people found equally good."""
        pairs = itertools.combinations(range(len(self.texts)), 2)
        return [(i, j) for i, j in pairs if self.ties_equal and self.ranks[i] == self.ranks[j]]


@dataclass(kw_only=True, slots=True)
class Preferences:
    """What a preference file held."""

    rankings: list[Ranking]
    set_aside: list[dict[str, Any]]  # file, line, reason

    @property
    def said_aside(self) -> str:
        """How many rows were set aside, and why the first one."""
        first = f", first: line {self.set_aside[0]['line']}: {self.set_aside[0]['reason']}" if self.set_aside else ""
        return f"{len(self.set_aside)} rows set aside{first}"


def read_preferences(path: Path) -> Preferences:
    """Raises DataError if the file cannot be read or holds no usable row."""
    rankings: list[Ranking] = []
    set_aside: list[dict[str, Any]] = []
    for number, row in preference_rows(path):
        try:
            rankings.append(_ranking(row))
        except ValueError as error:
            set_aside.append({"file": str(path), "line": number, "reason": str(error)})
    if not rankings:
        first = set_aside[0] if set_aside else {"line": 1, "reason": "the file is empty"}
        raise DataError(f"{path}:{first['line']}: no usable preference: {first['reason']}")
    return Preferences(rankings=rankings, set_aside=set_aside)


def write_preferences(path: Path, rankings: Sequence[Ranking]) -> None:
    """One JSON line a ranking, in the `responses` and `ranks` form. The file is written whole or not at all."""
    write_whole(path, "".join(json.dumps(ranking_row(r), ensure_ascii=False) + "\n" for r in rankings))


def ranking_row(r: Ranking) -> dict[str, Any]:
    """The row of a preference file; what has its default is left out."""
    row = {"messages": list(r.prompt.messages), "responses": list(r.texts), "ranks": list(r.ranks)}
    if not r.ties_equal:
        row["ties"] = "unknown"
    if r.margin != 1.0:
        row["margin"] = r.margin
    named = {"instruction": r.instruction, "annotator": r.annotator, "subset": r.subset}
    return row | {name: value for name, value in named.items() if value} | dict(r.facts)


def preference_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        if path.suffix == ".parquet":
            yield from enumerate(rows_of(pq.read_table(path)), 1)
            return
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() splits at U+2028 inside a string, too
        if line.strip():
            yield number, _parse(line)


def _parse(line: str) -> Any:
    try:
        return from_json(line, "the row")
    except ValueError as error:
        return error


def as_object(row: Any) -> dict[str, Any]:
    """A row of `preference_rows` that is an object. Raises ValueError with what was expected."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    return row


def _ranking(row: Any) -> Ranking:
    """Raises ValueError with what was expected."""
    row = as_object(row)
    messages = messages_of(row)
    if row.get("chosen") is not None or row.get("rejected") is not None:
        texts: tuple[str, ...] = (_answer(row, "chosen", messages), _answer(row, "rejected", messages))
        ranks: tuple[float, ...] = (1.0, 2.0)
    else:
        texts, ranks = _ranked(row)
    if not is_unicode([*texts, *(m["content"] for m in messages)]):
        raise ValueError("not valid Unicode: the file must be UTF-8, without lone surrogates")
    ranking = Ranking(prompt=Prompt(messages=tuple(messages)), texts=texts, ranks=ranks, **_extras(row))
    if not ranking.pairs and not ranking.tied:
        raise ValueError("all answers have the same rank, and were not compared")
    if any(texts[i] == texts[j] for i, j in ranking.pairs):
        raise ValueError("the better and the worse answer are the same text")
    return ranking


def _extras(row: dict[str, Any]) -> dict[str, Any]:
    """The optional fields, checked. Absent and null are alike: a table has every column in every row."""
    found: dict[str, Any] = {}
    if (ties := row.get("ties")) is not None:
        if ties not in ("equal", "unknown"):
            raise ValueError(f'ties: expected "equal" or "unknown", got {ties!r}')
        found["ties_equal"] = ties == "equal"
    if (margin := row.get("margin")) is not None:
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < math.inf:
            raise ValueError(f"margin: expected a number of at least 0, got {margin!r}")
        found["margin"] = float(margin)
    for name in ("instruction", "annotator", "subset"):
        if (text := row.get(name)) is not None:
            if not isinstance(text, str) or not is_unicode([text]):
                raise ValueError(f"{name}: expected text, got {type(text).__name__}")
            found[name] = text
    facts = {name: row[name] for name in CARRIED if row.get(name) is not None}
    if not isinstance(facts.get("id", ""), str | int | float):  # a column of the file's own
        del facts["id"]
    order = facts.get("order", [])
    if not (isinstance(order, list) and all(type(place) is int for place in order)):
        del facts["order"]
    return found | ({"facts": facts} if facts else {})


def messages_of(row: dict[str, Any]) -> list[Message]:
    if row.get("messages"):
        messages = row["messages"]
        if not (isinstance(messages, list) and all(map(_is_turn, messages))):
            raise ValueError(f"messages: expected a list of {{role, content}}, role one of {', '.join(ROLES)}")
        if not any(m["role"] == "user" for m in messages):
            raise ValueError("messages: no user turn to answer")
        if messages[-1]["role"] == "assistant":
            raise ValueError("messages: the last turn is the assistant's; expected the turns before the answer")
        return _turns(messages)
    if isinstance(row.get("prompt"), str) and row["prompt"].strip():
        return [{"role": "user", "content": row["prompt"]}]
    raise ValueError("expected `prompt` (text) or `messages` (chat)")


def _turns(messages: Sequence[dict[str, Any]]) -> list[Message]:
    """Roles and texts. "developer" is the newer name of "system", which chat templates do not know."""
    roles = [m["role"] if m["role"] in ROLES else "system" for m in messages]
    return [{"role": role, "content": m["content"]} for role, m in zip(roles, messages, strict=True)]


def _is_turn(value: Any) -> bool:
    return (
        isinstance(value, dict) and value.get("role") in (*ROLES, "developer") and isinstance(value.get("content"), str)
    )


def is_unicode(texts: Sequence[str]) -> bool:
    return not any("\ud800" <= character <= "\udfff" for text in texts for character in text)


def _answer(row: dict[str, Any], key: str, messages: Sequence[Message]) -> str:
    """Text, or the last turn of a chat that is the prompt's own or nothing before it."""
    value = row.get(key)
    if isinstance(value, list) and value and isinstance(value[-1], dict) and value[-1].get("role") == "assistant":
        before = value[:-1]
        if before and not (all(map(_is_turn, before)) and _turns(before) == _turns(messages)):
            raise ValueError(f"{key}: its turns before the answer are not those of the prompt")
        value = value[-1].get("content")
    if not isinstance(value, str):
        raise ValueError(f"{key}: expected text, or messages whose last turn is the assistant's answer")
    return value


def _is_rank(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _ranked(row: dict[str, Any]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    texts, ranks = row.get("responses"), row.get("ranks")
    if not (isinstance(texts, list) and all(isinstance(t, str) for t in texts)):
        raise ValueError("expected `chosen` and `rejected`, or `responses` (a list of texts) and `ranks`")
    if not (isinstance(ranks, list) and all(map(_is_rank, ranks))):
        raise ValueError("ranks: expected a list of numbers, 1 = best")
    if len(ranks) != len(texts) or len(texts) < 2:
        raise ValueError(f"ranks: expected one number for each of at least 2 responses, got {len(ranks)}")
    return tuple(texts), tuple(float(r) for r in ranks)
