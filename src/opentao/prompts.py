"""Prompts in: read files and request logs.

`read_prompts` says what it understood, and sets aside what it cannot read with line and reason: rows read =
prompts + rows set aside, always.

Left out: compressed and multi-file inputs. Shown by ``pytest tests/test_prompts.py``.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opentao.errors import DataError
from opentao.types import Message, Prompt

ROLES = ("system", "user", "assistant", "tool")
EXPECTED = "JSONL (.jsonl, .ndjson, .json), Parquet (.parquet) or CSV (.csv) with `prompt` (text) or `messages` (chat)"
LOGGED = "logged_response"
LONGEST_CELL = 2**30  # characters; the csv module's own limit of 128 Ki would refuse long documents
MOST_KEYS_NAMED = 20


@dataclass(kw_only=True, slots=True, frozen=True)
class SetAside:
    """A row that gave no prompt: ``SetAside(file="logs.jsonl", line=7, reason="`prompt` is empty")``."""

    file: str
    line: int  # from 1: line of a text file (the first one of the row); row of a Parquet file; item of a JSON array
    reason: str

    def as_dict(self) -> dict[str, str | int]:
        return asdict(self)


@dataclass(kw_only=True, slots=True, frozen=True)
class Reading:
    """What a file held; ``num_rows == len(prompts) + len(set_aside)``."""

    prompts: list[Prompt]  # in file order, ids differ
    set_aside: list[SetAside]
    understood: str  # one sentence for people: "480 rows of JSONL, prompts from key `prompt`; ..."
    num_rows: int  # blank lines are not rows


class _BadRow(ValueError):
    """A row that cannot be read; the message is the reason."""


Row = tuple[int, object]  # line, and: an object, JSON text, or a _BadRow


def read_prompts(path: Path) -> Reading:
    """Read a file of prompts or request logs.

    A row has `prompt` (text) or `messages` (chat turns; in any format also as a JSON string), optional `tools` and
    `meta`; every other key goes into `meta` as well (on a clash the one inside `meta` wins). A log entry may carry the
    request under `request` or `body`. Assistant turns at the end of a chat are answers, not prompt: they move to
    ``meta["logged_response"]``, as text, or as turns if there is more than one plain text.

    Raises:
        DataError: no such file, unknown kind of file, or not a single readable row.
    """
    kind, noun, rows = _rows(path)
    prompts: dict[str, Prompt] = {}
    lines: dict[str, int] = {}  # prompt id -> where it was first seen
    sources: Counter[str] = Counter()
    set_aside: list[SetAside] = []
    for line, row in rows:
        try:
            prompt, source = _parse(row)
            if prompt.id in prompts:
                raise _BadRow(f"duplicate of {noun} {lines[prompt.id]}")
        except _BadRow as error:
            set_aside.append(SetAside(file=str(path), line=line, reason=_writable(str(error))))
            continue
        prompts[prompt.id], lines[prompt.id] = prompt, line
        sources[source] += 1
    if not prompts:
        first = f"{noun} {set_aside[0].line}: {set_aside[0].reason}" if set_aside else "there are no rows"
        raise DataError(f"{path}: no prompt in {len(rows)} rows; first problem: {first}; expected {EXPECTED}")
    understood = _understood(f"{counted(len(rows), 'row')} of {kind}", sources, list(prompts.values()), len(set_aside))
    return Reading(prompts=list(prompts.values()), set_aside=set_aside, understood=understood, num_rows=len(rows))


def _writable(text: str) -> str:
    """The reason may quote a row, and half a character cannot be written as UTF-8: its escape stands in its place."""
    return text.encode("utf-8", "backslashreplace").decode()


def _understood(what: str, sources: Counter[str], prompts: Sequence[Prompt], num_set_aside: int) -> str:
    """One sentence: how many rows, which keys the prompts came from, what went where."""
    shares = [f"`{key}`" + (f" ({num})" if len(sources) > 1 else "") for key, num in sources.items()]
    clauses = [f"{what}, prompts from {'keys' if len(shares) > 1 else 'key'} {', '.join(shares)}"]
    num_logged = sum(LOGGED in p.meta for p in prompts)
    if num_logged:
        clauses.append(f"the assistant's last turn kept in meta as {LOGGED} ({counted(num_logged, 'prompt')})")
    keys = list(dict.fromkeys(key for p in prompts for key in p.meta if key != LOGGED))
    if keys:
        more = f" and {len(keys) - MOST_KEYS_NAMED} more" if len(keys) > MOST_KEYS_NAMED else ""
        clauses.append(f"other keys kept in meta: {', '.join(keys[:MOST_KEYS_NAMED])}{more}")
    if num_set_aside:
        clauses.append(f"{counted(num_set_aside, 'row')} set aside")
    return "; ".join(clauses)


def counted(num: int, noun: str) -> str:
    return f"{num} {noun}{'' if num == 1 else 's'}"


# Files to rows


def _rows(path: Path) -> tuple[str, str, list[Row]]:
    """Kind of file, what its positions are called, and its rows."""
    readers: dict[str, tuple[str, str, Callable[[Path], Iterator[Row]]]] = {
        ".jsonl": ("JSONL", "line", _json_lines),
        ".ndjson": ("JSONL", "line", _json_lines),
        ".json": ("JSON", "line", _json_lines),
        ".parquet": ("Parquet", "row", _parquet_rows),
        ".csv": ("CSV", "line", _csv_rows),
    }
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; expected {EXPECTED}")
    kind, noun, read = readers[path.suffix.lower()]
    try:
        return kind, noun, list(read(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; expected {EXPECTED}") from error
    except (csv.Error, pa.ArrowException) as error:
        raise DataError(f"{path}: not a {kind} file: {error}; expected {EXPECTED}") from error


def _text(path: Path) -> str:
    """Bytes that are not UTF-8 become lone surrogates, which `_check_unicode` finds row by row."""
    return path.read_text(encoding="utf-8-sig", errors="surrogateescape")


def _json_lines(path: Path) -> Iterator[Row]:
    """One JSON object a line; a .json file may also hold one array of objects."""
    text = _text(path)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            items = from_json(text, "the array")
        except _BadRow as error:
            yield 1, error
            return
        yield from enumerate(items, 1)
        return
    # not splitlines(): it also splits at characters such as U+2028, which JSON allows inside a string
    yield from ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _csv_rows(path: Path) -> Iterator[Row]:
    """Strict: a stray quote is reported instead of swallowing the rows that follow. An empty cell is an absent key."""
    csv.field_size_limit(LONGEST_CELL)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = list(file)
    reader, before = csv.reader(lines, strict=True), 0  # lines before those that the reader was given
    header = [name.strip() for name in next(reader, [])]
    if repeated := [name for name, times in Counter(filter(None, header)).items() if times > 1]:
        raise csv.Error(f"line 1: two columns are called {repeated[0]!r}")
    while True:
        line = before + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, _BadRow(f"invalid CSV: {error}")
            reader, before = csv.reader(lines[line:], strict=True), line  # whatever it read on to is read again
            continue
        if cells:
            yield line, _cells(header, cells)


def _cells(header: list[str], cells: list[str]) -> object:
    if len(cells) != len(header):
        return _BadRow(f"{counted(len(cells), 'cell')} for {counted(len(header), 'column')}")
    return {name: cell for name, cell in zip(header, cells, strict=True) if cell}


def _parquet_rows(path: Path) -> Iterator[Row]:
    """`ParquetFile`, not `read_table`: the latter invents columns from folder names such as `split=train`."""
    with pq.ParquetFile(path) as file:
        rows = rows_of(file.read())
    yield from enumerate((_without_nulls(row) for row in rows), 1)


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    """The table's rows. Times in nanoseconds lose what Python's have no place for.

    Raises:
        pyarrow.ArrowInvalid: a value that Python has no object for.
    """
    for i, column in enumerate(table.schema):
        if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
            microseconds = table.column(i).cast(pa.timestamp("us", column.type.tz), safe=False)
            table = table.set_column(i, column.name, microseconds)
    try:
        found: list[dict[str, Any]] = table.to_pylist()
    except (ValueError, OverflowError) as error:
        raise pa.ArrowInvalid(str(error)) from error
    return found


def _without_nulls(value: Any) -> Any:
    """A Parquet struct has every field in every row: null there means that the key is absent."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


# Rows to prompts


def _parse(row: object) -> tuple[Prompt, str]:
    """The prompt of a row and the key it came from, e.g. ``request.messages``."""
    try:
        fields, wrapper = _unwrap(_object(row))
        key, turns = _turns(fields)
        tools = _tools(fields.pop("tools", None))
        asked = _num_asked(turns)
        meta = _meta(fields)
        if asked < len(turns):
            if LOGGED in meta:
                raise _BadRow(f"an answer ends the chat, and there is {LOGGED} beside it: expected one of them")
            meta[LOGGED] = _logged(turns[asked:])
        prompt = Prompt(messages=tuple(turns[:asked]), tools=tuple(tools), meta=meta)
        _check_unicode(prompt)
    except RecursionError:
        raise _BadRow("nested too deeply") from None
    return prompt, wrapper + key


def _object(row: object) -> dict[str, Any]:
    if isinstance(row, _BadRow):
        raise row
    value = from_json(row, "the row") if isinstance(row, str) else row
    if not isinstance(value, dict):
        raise _BadRow(f"expected an object with `prompt` or `messages`, got {type(value).__name__}")
    plain: dict[str, Any] = _plain(value)
    return plain


def from_json(text: str, what: str) -> Any:
    """The value. Raises ValueError with what is wrong, a key that is given twice included."""
    try:
        if what == "the array":  # of all rows: one with a repeated key must not cost the others
            return json.loads(text)
        return json.loads(text, object_pairs_hook=lambda pairs: _without_repeats(pairs, what))
    except _BadRow:
        raise
    except json.JSONDecodeError as error:
        raise _BadRow(f"invalid JSON in {what}: {error.msg} at character {error.pos + 1}") from None
    except ValueError as error:  # a number with thousands of digits
        raise _BadRow(f"invalid JSON in {what}: {error}") from None
    except RecursionError:
        raise _BadRow(f"invalid JSON in {what}: nested too deeply") from None


def _without_repeats(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    """JSON readers keep the last of equal keys, and whatever stood under the first would be gone without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise _BadRow(f"key {key!r} is given twice in {what}")
    return found


def _plain(value: Any) -> Any:
    """What JSON can hold: dates, decimals and bytes become text (what is no UTF-8 in hex), NaN and infinity None."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            return value.decode()
        return value.hex()
    return value if value is None or isinstance(value, str | int) else str(value)


def _unwrap(row: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A log entry's request, with the entry's other keys beside it (the request's own win), and where it was."""
    if row.get("messages") is None and row.get("prompt") is None:
        for key in ("request", "body"):
            inner = row.get(key)
            if isinstance(inner, str) and inner.lstrip().startswith("{"):  # Databricks inference tables log it as text
                inner = _plain(from_json(inner, f"`{key}`"))
            if isinstance(inner, dict):
                fields, wrapper = _unwrap(inner)
                outer = {k: v for k, v in row.items() if k != key}
                if isinstance(outer.get("meta"), dict) and isinstance(fields.get("meta"), dict):
                    fields = fields | {"meta": outer["meta"] | fields["meta"]}
                return outer | fields, f"{key}.{wrapper}"
    return row, ""


def _turns(fields: dict[str, Any]) -> tuple[str, list[Message]]:
    """Take the chat turns out of `fields`; `messages` goes before `prompt`."""
    key = next((k for k in ("messages", "prompt") if fields.get(k) is not None), None)
    if key is None:
        raise _BadRow(f"neither `prompt` nor `messages` has a value (keys: {', '.join(fields) or 'none'})")
    value = fields.pop(key)
    if key == "prompt" and isinstance(value, str):
        value = [{"role": "user", "content": value}]
    elif isinstance(value, str):
        value = from_json(value, f"`{key}`")
    if not isinstance(value, list):
        expected = "text" if key == "prompt" else "a list of chat turns"
        raise _BadRow(f"`{key}` is {type(value).__name__}, expected {expected}")
    return key, [_turn(turn, f"`{key}` turn {number}") for number, turn in enumerate(value, 1)]


def _turn(turn: Any, where: str) -> Message:
    """A turn with a known role and text. Newer logs call the system role "developer", which chat templates do not."""
    if not isinstance(turn, dict):
        raise _BadRow(f"{where} is {type(turn).__name__}, expected an object with role and content")
    present = {k: v for k, v in _plain(turn).items() if v is not None}
    if "role" not in present:
        raise _BadRow(f"{where} has no role")
    role = "system" if present["role"] == "developer" else present["role"]
    if role not in ROLES:
        raise _BadRow(f"{where} has unknown role {role!r}, expected one of {', '.join(ROLES)}")
    if "content" not in present and not (role == "assistant" and present.get("tool_calls")):
        raise _BadRow(f"{where} has no content")
    return present | {"role": role, "content": _content(present.get("content", ""), where)}


def _content(content: Any, where: str) -> str:
    """Text, or parts such as ``[{"type": "text", "text": "Hi"}]`` joined by newlines."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _BadRow(f"{where} has content of type {type(content).__name__}, expected text")
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise _BadRow(f"{where} has a content part of type {kind!r}, expected only text")
    return "\n".join(part["text"] for part in content)


def _num_asked(turns: Sequence[Message]) -> int:
    """How many turns are the prompt: all but the assistant's at the end."""
    asked = len(turns)
    while asked and turns[asked - 1]["role"] == "assistant":
        asked -= 1
    last = next((turn for turn in reversed(turns[:asked]) if turn["role"] == "user"), None)
    if last is None:
        raise _BadRow("no user turn to answer")
    if not last["content"].strip():
        raise _BadRow("empty text in the user's last turn")
    return asked


def _logged(turns: list[Message]) -> str | list[Message]:
    plain = len(turns) == 1 and set(turns[0]) == {"role", "content"}
    return str(turns[0]["content"]) if plain else turns


def _tools(value: Any) -> list[dict[str, Any]]:
    tools = _plain(from_json(value, "`tools`")) if isinstance(value, str) and value else value or []
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _BadRow("`tools` must be a list of JSON schemas")
    return tools


def _meta(fields: dict[str, Any]) -> dict[str, Any]:
    """Every key that is left, and the content of `meta` if that is an object (or the JSON text of one)."""
    inner = fields.get("meta")
    if isinstance(inner, str) and inner.lstrip().startswith("{"):
        inner = _plain(from_json(inner, "`meta`"))
    if inner is not None and not isinstance(inner, dict):
        return fields
    return {k: v for k, v in fields.items() if k != "meta"} | (inner or {})


def _check_unicode(prompt: Prompt) -> None:
    """Lone surrogates can be written in JSON but neither hashed nor stored; bad UTF-8 was read as such, too."""
    try:
        json.dumps([prompt.messages, prompt.tools, prompt.meta], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _BadRow("not valid Unicode: the file must be UTF-8, without lone surrogates") from None
