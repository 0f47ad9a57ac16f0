"""Every format, every kind of row that cannot be read, and a split that keeps near-copies together."""

from __future__ import annotations

import csv
import datetime
import json
import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opentao.config import PromptsConfig
from opentao.errors import DataError
from opentao.preferences import read_preferences
from opentao.prompts import Reading, SetAside, read_prompts
from opentao.split import near_duplicates, split, split_given
from opentao.store import prompts_to_table, table_to_prompts
from opentao.types import Prompt

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is my parcel?"}]
TOOL = {"type": "function", "function": {"name": "track", "parameters": {"type": "object"}}}


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    """A str is written as it is, anything else as JSON."""
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def write_csv(path: Path, header: list[str], rows: Sequence[Sequence[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def read(tmp_path: Path, *rows: object) -> Reading:
    reading = read_prompts(write_lines(tmp_path / "p.jsonl", rows))
    assert reading.num_rows == len(rows) == len(reading.prompts) + len(reading.set_aside)
    return reading


def reason(tmp_path: Path, row: object) -> str:
    """Why a row that follows a good one is set aside."""
    reading = read(tmp_path, {"prompt": "good"}, row)
    [aside] = reading.set_aside
    assert (aside.file, aside.line) == (str(tmp_path / "p.jsonl"), 2)
    return aside.reason


def config(**changes: Any) -> PromptsConfig:
    return PromptsConfig(path="p.jsonl", **changes)


def test_jsonl_of_texts(tmp_path: Path) -> None:
    rows = [{"prompt": f"Ticket {i}", "category": "billing", "priority": i} for i in range(3)]
    reading = read(tmp_path, *rows)
    assert reading.prompts == [Prompt.from_text(f"Ticket {i}", category="billing", priority=i) for i in range(3)]
    assert reading.understood == (
        "3 rows of JSONL, prompts from key `prompt`; other keys kept in meta: category, priority"
    )


def test_jsonl_of_chats(tmp_path: Path) -> None:
    [prompt] = read(tmp_path, {"messages": CHAT, "tools": [TOOL], "meta": {"a": 1}, "b": None}).prompts
    assert prompt == Prompt(messages=tuple(CHAT), tools=(TOOL,), meta={"b": None, "a": 1})


def test_chat_under_the_key_prompt(tmp_path: Path) -> None:
    assert read(tmp_path, {"prompt": CHAT}).prompts[0].messages == tuple(CHAT)


def test_sentence_counts_mixed_keys(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"messages": CHAT}, {"body": {"prompt": "c"}}, "{", "7"]
    assert read(tmp_path, *rows).understood == (
        "6 rows of JSONL, prompts from keys `prompt` (2), `messages` (1), `body.prompt` (1); 2 rows set aside"
    )


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "p.ndjson"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \r\n{"prompt": 7}')
    reading = read_prompts(path)
    assert (reading.num_rows, reading.set_aside[0].line) == (2, 4)


def test_line_separators_inside_a_string_do_not_split_the_row(tmp_path: Path) -> None:
    [prompt] = read(tmp_path, '{"prompt": "one\u2028two\x85three"}').prompts
    assert prompt.text == "one\u2028two\x85three"


def test_json_array(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": "a"}, {"prompt": 1}, {"messages": CHAT}], indent=2))
    reading = read_prompts(tmp_path / "p.json")
    assert [p.text for p in reading.prompts] == ["a", "Where is my parcel?"]
    assert reading.set_aside[0].line == 2
    assert read_prompts(write_lines(tmp_path / "q.json", [{"prompt": "a"}])).prompts == [Prompt.from_text("a")]


def test_csv(tmp_path: Path) -> None:
    rows = [["two\nlines", "x", json.dumps({"k": 1})], ["plain", "", ""], ["", "y", ""], ["third", "00123", "note"]]
    reading = read_prompts(write_csv(tmp_path / "p.csv", ["prompt", " label", "meta"], rows))
    assert reading.prompts == [
        Prompt.from_text("two\nlines", label="x", k=1),
        Prompt.from_text("plain"),
        Prompt.from_text("third", label="00123", meta="note"),
    ]
    [aside] = reading.set_aside  # the first row takes lines 2 and 3
    assert (aside.line, aside.reason) == (5, "neither `prompt` nor `messages` has a value (keys: label)")


def test_csv_of_chats_as_json_text(tmp_path: Path) -> None:
    rows = [[json.dumps(CHAT), json.dumps([TOOL])], ["[{]", ""], ['"hi"', ""]]
    reading = read_prompts(write_csv(tmp_path / "p.csv", ["messages", "tools"], rows))
    assert reading.prompts == [Prompt(messages=tuple(CHAT), tools=(TOOL,))]
    first, second = reading.set_aside
    assert first.reason.startswith("invalid JSON in `messages`: Expecting property name")
    assert second.reason == "`messages` is str, expected a list of chat turns"


def test_csv_rows_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt,label\na,1\nb\nc,2,3\n"d"x,4\ne,5\n"never closed,6\nf,7\n')
    reading = read_prompts(path)
    assert [p.text for p in reading.prompts] == ["a", "e", "f"]
    assert [(s.line, s.reason) for s in reading.set_aside] == [
        (3, "1 cell for 2 columns"),
        (4, "3 cells for 2 columns"),
        (5, "invalid CSV: ',' expected after '\"'"),
        (7, "invalid CSV: unexpected end of data"),
    ]


def test_an_unclosed_quote_takes_one_row_with_it(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    rows = [f"prompt {i}" for i in range(50)]
    for last in ("end", '"a, b"', '"two\nlines"'):
        path.write_text("\n".join(["prompt", '"Where is my parcel', *rows, last, ""]))
        reading = read_prompts(path)
        assert [p.text for p in reading.prompts] == [*rows, last.strip('"')]
        assert [s.line for s in reading.set_aside] == [2]


def test_two_columns_of_one_name_are_an_error(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "p.csv", ["prompt", "answer", "answer"], [["x", "the first", "the second"]])
    with pytest.raises(DataError, match="line 1: two columns are called 'answer'"):
        read_prompts(path)


def test_a_key_given_twice_is_set_aside(tmp_path: Path) -> None:
    (path := tmp_path / "p.jsonl").write_text(
        '{"prompt": "a", "prompt": "b"}\n{"prompt": "c", "meta": {"k": 1, "k": 2}}\n{"prompt": "d"}\n'
    )
    reading = read_prompts(path)
    assert [p.text for p in reading.prompts] == ["d"]
    reasons = [a.reason for a in reading.set_aside]
    assert reasons == [f"key {key!r} is given twice in the row" for key in ("prompt", "k")]


def test_meta_of_a_log_entry_and_of_its_request(tmp_path: Path) -> None:
    row = {
        "request": {"messages": [{"role": "user", "content": "x"}], "meta": {"a": 1, "c": 1}},
        "meta": {"b": 2, "c": 2},
    }
    (path := tmp_path / "p.jsonl").write_text(json.dumps(row))
    assert read_prompts(path).prompts[0].meta == {"a": 1, "b": 2, "c": 1}


def test_csv_takes_long_documents(tmp_path: Path) -> None:
    text = "word " * 60_000
    assert read_prompts(write_csv(tmp_path / "p.csv", ["prompt"], [[text]])).prompts[0].text == text


def test_times_in_nanoseconds(tmp_path: Path) -> None:
    times = pa.array([1_700_000_000_000_000_001], pa.timestamp("ns"))
    pq.write_table(pa.table({"prompt": ["x"], "at": times}), tmp_path / "p.parquet")
    assert [p.text for p in read_prompts(tmp_path / "p.parquet").prompts] == ["x"]
    pq.write_table(pa.table({"prompt": ["x"], "chosen": ["a"], "rejected": ["b"], "at": times}), tmp_path / "c.parquet")
    assert len(read_preferences(tmp_path / "c.parquet").rankings) == 1


def test_parquet(tmp_path: Path) -> None:
    called = [CHAT[1], {"role": "assistant", "content": None, "tool_calls": [{"id": "7"}]}]
    answer = {"role": "tool", "content": "at the depot", "tool_call_id": "7"}
    day = datetime.date(2024, 5, 1)
    rows = [
        {"messages": [*called, answer], "day": day, "raw": b"ab", "x": float("nan"), "tools": None},
        {"messages": CHAT, "tools": [TOOL], "day": None},
    ]
    folder = tmp_path / "split=train"  # must not become a column
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "p.parquet")
    reading = read_prompts(folder / "p.parquet")
    assert reading.prompts == [
        Prompt(
            messages=(CHAT[1], {"role": "assistant", "content": "", "tool_calls": [{"id": "7"}]}, answer),
            meta={"day": "2024-05-01", "raw": "ab", "x": None},
        ),
        Prompt(messages=tuple(CHAT), tools=(TOOL,)),
    ]
    assert reading.understood.startswith("2 rows of Parquet, prompts from key `messages`; other keys kept in meta: day")


def test_parquet_of_bytes(tmp_path: Path) -> None:
    """Some writers mark no column as text."""
    prompts = pa.array(["Où est-il ?".encode()], pa.binary())
    pq.write_table(pa.table({"prompt": prompts, "hash": pa.array([b"\xff\x00"], pa.binary())}), tmp_path / "p.parquet")
    [prompt] = read_prompts(tmp_path / "p.parquet").prompts
    assert (prompt.text, prompt.meta) == ("Où est-il ?", {"hash": "ff00"})


def test_parquet_of_texts_with_a_duplicate(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", None, "a"]}), tmp_path / "p.parquet")
    assert [(s.line, s.reason) for s in read_prompts(tmp_path / "p.parquet").set_aside] == [
        (2, "neither `prompt` nor `messages` has a value (keys: none)"),
        (3, "duplicate of row 1"),
    ]


def test_one_prompt_has_one_id_in_every_format(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"messages": CHAT, "n": 1}]), tmp_path / "p.parquet")
    paths = [
        write_lines(tmp_path / "p.jsonl", [{"messages": CHAT}]),
        write_csv(tmp_path / "p.csv", ["messages"], [[json.dumps(CHAT)]]),
        tmp_path / "p.parquet",
    ]
    assert {read_prompts(path).prompts[0].id for path in paths} == {Prompt(messages=tuple(CHAT)).id}


def test_what_is_read_can_be_stored(tmp_path: Path) -> None:
    prompts = read(tmp_path, {"messages": CHAT, "tools": [TOOL], "x": [1.5, None, {"y": True}]}).prompts
    assert table_to_prompts(prompts_to_table(prompts)) == prompts


def test_request_log(tmp_path: Path) -> None:
    said = {"role": "assistant", "content": "At the depot."}
    reading = read(tmp_path, {"messages": [*CHAT, said], "model": "m", "temperature": 0.5})
    assert reading.prompts == [
        Prompt(messages=tuple(CHAT), meta={"model": "m", "temperature": 0.5, "logged_response": "At the depot."})
    ]
    assert reading.understood == (
        "1 row of JSONL, prompts from key `messages`; the assistant's last turn kept in meta as logged_response"
        " (1 prompt); other keys kept in meta: model, temperature"
    )


def test_several_trailing_assistant_turns_are_kept_as_turns(tmp_path: Path) -> None:
    said = [{"role": "assistant", "content": "One moment."}, {"role": "assistant", "content": "At the depot."}]
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"id": "7"}]}]
    first, second = read(tmp_path, {"messages": [*CHAT, *said]}, {"messages": [CHAT[1], *calls]}).prompts
    assert (first.messages, first.meta) == (tuple(CHAT), {"logged_response": said})
    assert second.meta["logged_response"] == [{"role": "assistant", "content": "", "tool_calls": [{"id": "7"}]}]


def test_two_logged_responses_are_one_too_many(tmp_path: Path) -> None:
    said = {"role": "assistant", "content": "At the depot."}
    row = {"messages": [*CHAT, said], "logged_response": "Sold out."}
    reading = read(tmp_path, row, {"messages": CHAT, "logged_response": "Sold out."})
    assert [p.meta for p in reading.prompts] == [{"logged_response": "Sold out."}]
    assert [(s.line, s.reason) for s in reading.set_aside] == [
        (1, "an answer ends the chat, and there is logged_response beside it: expected one of them")
    ]


def test_an_assistant_turn_in_the_middle_stays(tmp_path: Path) -> None:
    chat = [CHAT[1], {"role": "assistant", "content": "Which?"}, {"role": "user", "content": "The blue one."}]
    [prompt] = read(tmp_path, {"messages": chat}).prompts
    assert (prompt.messages, prompt.meta) == (tuple(chat), {})


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("wrapper", ["request", "body"])
def test_wrapped_request_log(tmp_path: Path, wrapper: str, as_text: bool) -> None:
    request: Any = {"messages": CHAT, "tools": [TOOL], "model": "m"}
    row = {"custom_id": "9", wrapper: json.dumps(request) if as_text else request, "response": {"status": 200}}
    reading = read(tmp_path, row)
    assert reading.prompts == [
        Prompt(messages=tuple(CHAT), tools=(TOOL,), meta={"custom_id": "9", "response": {"status": 200}, "model": "m"})
    ]
    assert f"`{wrapper}.messages`" in reading.understood


def test_doubly_wrapped_request_log(tmp_path: Path) -> None:
    reading = read(tmp_path, {"request": {"url": "/v1", "body": {"messages": CHAT}}})
    assert reading.prompts == [Prompt(messages=tuple(CHAT), meta={"url": "/v1"})]
    assert "`request.body.messages`" in reading.understood


def test_a_column_called_request_is_no_wrapper_beside_a_prompt(tmp_path: Path) -> None:
    assert read(tmp_path, {"prompt": "a", "request": {"prompt": "b"}}).prompts[0].meta == {"request": {"prompt": "b"}}


def test_text_parts_and_the_developer_role(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Where is"}, {"type": "text", "text": "my parcel?"}]
    row = {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]}
    assert read(tmp_path, row).prompts[0].messages == (CHAT[0], {"role": "user", "content": "Where is\nmy parcel?"})


def user(content: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('{"prompt": "a"', "invalid JSON in the row: Expecting ',' delimiter at character 15"),
        ('{"prompt": "a", "n": ' + "9" * 5000 + "}", "invalid JSON in the row: Exceeds the limit"),
        ("[" * 200_000, "invalid JSON in the row: nested too deeply"),
        ('{"prompt": "a", "x": ' + "[" * 800 + "]" * 800 + "}", "nested too deeply"),
        ("7", "expected an object with `prompt` or `messages`, got int"),
        ({"text": "a", "id": 1}, "neither `prompt` nor `messages` has a value (keys: text, id)"),
        ({}, "neither `prompt` nor `messages` has a value (keys: none)"),
        ({"prompt": None, "messages": None}, "neither `prompt` nor `messages` has a value"),
        ({"request": "GET /"}, "neither `prompt` nor `messages` has a value (keys: request)"),
        ({"request": "{oops"}, "invalid JSON in `request`"),
        ({"prompt": " \n"}, "empty text in the user's last turn"),
        (user(""), "empty text in the user's last turn"),
        ({"prompt": 7}, "`prompt` is int, expected text"),
        ({"messages": {"role": "user"}}, "`messages` is dict, expected a list of chat turns"),
        ({"messages": []}, "no user turn to answer"),
        ({"messages": CHAT[:1]}, "no user turn to answer"),
        ({"messages": ["hi"]}, "`messages` turn 1 is str, expected an object with role and content"),
        ({"messages": [*CHAT, {"content": "x"}]}, "`messages` turn 3 has no role"),
        ({"messages": [{"role": "user"}]}, "`messages` turn 1 has no content"),
        (user(None), "`messages` turn 1 has no content"),
        ({"messages": [*CHAT, {"role": "assistant", "content": None}]}, "`messages` turn 3 has no content"),
        (
            {"messages": [{"role": "human", "content": "x"}]},
            "`messages` turn 1 has unknown role 'human', expected one of",
        ),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "`messages` turn 1 has unknown role ['user']"),
        (user(7), "`messages` turn 1 has content of type int, expected text"),
        (user([{"type": "image_url"}]), "`messages` turn 1 has a content part of type 'image_url', expected only text"),
        (user(["hi"]), "`messages` turn 1 has a content part of type 'str', expected only text"),
        ({"prompt": "a", "tools": {"type": "function"}}, "`tools` must be a list of JSON schemas"),
        ({"prompt": "a", "tools": ["track"]}, "`tools` must be a list of JSON schemas"),
        ({"prompt": "a", "tools": "track"}, "invalid JSON in `tools`"),
        ({"prompt": "a", "meta": "{oops"}, "invalid JSON in `meta`"),
        ('{"prompt": "a \\ud800"}', "not valid Unicode"),
        ('{"prompt": "a", "label": "\\ud800"}', "not valid Unicode"),
        ({"prompt": "good", "label": "other"}, "duplicate of line 1"),
    ],
)
def test_bad_row(tmp_path: Path, row: object, expected: str) -> None:
    assert reason(tmp_path, row).startswith(expected)


def test_bad_utf8_costs_one_row(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n{"prompt": "b"}\n')
    reading = read_prompts(tmp_path / "p.jsonl")
    assert [p.text for p in reading.prompts] == ["a", "b"]
    assert reading.set_aside[0].reason.startswith("not valid Unicode")


def test_set_aside_as_dict() -> None:
    assert SetAside(file="p.csv", line=3, reason="why").as_dict() == {"file": "p.csv", "line": 3, "reason": "why"}


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    for name, expected in {
        "none.jsonl": "No such file",
        "p.txt": "unknown kind of file '.txt'",
        "p": "file ''",
    }.items():
        with pytest.raises(DataError, match=rf"{name}: .*{expected}.*; expected JSONL"):
            read_prompts(tmp_path / name)
    for name in ("p.parquet", "q.json", "p.csv", "empty.jsonl", "folder.jsonl"):
        path = tmp_path / name
        path.mkdir() if "folder" in name else path.write_text("" if "empty" in name else "[1, 2")
        with pytest.raises(DataError, match=rf"{name}: .*expected JSONL"):
            read_prompts(path)


def test_nothing_readable_names_the_first_reason(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", ["", {"text": "a"}, {"prompt": 1}])
    expected = "no prompt in 2 rows; first problem: line 2: neither `prompt` nor `messages` has a value"
    with pytest.raises(DataError, match=expected):
        read_prompts(path)


@given(st.lists(st.text() | st.sampled_from(['{"prompt": "a"}', "{", "7", '{"prompt": 1}']), max_size=8))
def test_no_row_is_lost(tmp_path_factory: pytest.TempPathFactory, rows: list[str]) -> None:
    path = tmp_path_factory.mktemp("any") / "p.jsonl"
    text = "\n".join(['{"prompt": "first"}', *rows])
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    reading = read_prompts(path)
    assert reading.num_rows == len(reading.prompts) + len(reading.set_aside)
    assert [s.line for s in reading.set_aside] == sorted(s.line for s in reading.set_aside)


# Held-out prompts

WORDS = ["late", "parcel", "refund", "broken", "blue", "card"]
sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join)


def prompts_of(texts: Sequence[str]) -> list[Prompt]:
    return [Prompt.from_text(text) for text in dict.fromkeys(texts)]


def jaccard(a: str, b: str) -> float:
    def shingles(text: str) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return {(w,) for w in words} if len(words) < 3 else set(zip(words, words[1:], words[2:], strict=False))

    one, two = shingles(a), shingles(b)
    return len(one & two) / len(one | two)


@given(st.lists(sentences, min_size=1, max_size=25), st.sampled_from([0.1, 0.3, 0.5, 0.55, 2 / 3, 0.8, 1.0]))
def test_near_duplicates_are_brute_force(texts: list[str], threshold: float) -> None:
    prompts = prompts_of(texts)
    clusters = [{p.text} for p in prompts]
    for a, b in combinations([p.text for p in prompts], 2):
        one, two = (next(c for c in clusters if text in c) for text in (a, b))
        if one is not two and jaccard(a, b) >= threshold:
            one |= two
            clusters.remove(two)
    found = [{p.text for p in cluster} for cluster in near_duplicates(prompts, threshold)]
    assert sorted(map(sorted, found)) == sorted(map(sorted, clusters))


def test_near_duplicates_by_hand() -> None:
    texts = ["My parcel is late", "my PARCEL is late!", "late", "Late?", "parcel late", "??", "!!"]
    clusters = near_duplicates(prompts_of(texts), 0.8)
    assert sorted(sorted(p.text for p in c) for c in clusters) == sorted(
        [["My parcel is late", "my PARCEL is late!"], ["Late?", "late"], ["parcel late"], ["??"], ["!!"]]
    )


def test_a_shared_system_turn_does_not_make_prompts_alike() -> None:
    system = {"role": "system", "content": "You are a patient clerk of the parcel office in Bern. " * 5}
    prompts = [Prompt(messages=(system, {"role": "user", "content": t})) for t in ("Where is it?", "I want a refund.")]
    assert len(near_duplicates(prompts, 0.8)) == 2


@settings(max_examples=50)
@given(st.lists(sentences, min_size=2, max_size=40), st.floats(0.05, 0.9), st.randoms(use_true_random=False))
def test_near_copies_never_straddle(texts: list[str], fraction: float, shuffle: random.Random) -> None:
    prompts = prompts_of(texts)
    settings_ = config(heldout_fraction=fraction, near_duplicate=0.5, max_heldout=1000)
    if len(near_duplicates(prompts, 0.5)) < 2:
        with pytest.raises(DataError, match="at least 2"):
            split(prompts, settings_)
        return
    parts = split(prompts, settings_)
    assert parts.train
    assert parts.heldout
    assert sorted(p.id for p in parts.train + parts.heldout) == sorted(p.id for p in prompts)
    assert all(jaccard(a.text, b.text) < 0.5 for a in parts.train for b in parts.heldout)
    shuffle.shuffle(prompts)
    assert split(prompts, settings_) == parts


@settings(max_examples=50)
@given(st.lists(st.tuples(sentences, st.sampled_from("abcde")), min_size=2, max_size=40), st.floats(0.05, 0.9))
def test_what_split_by_names_never_straddles(rows: list[tuple[str, str]], fraction: float) -> None:
    prompts = [Prompt.from_text(text, table=name) for text, name in dict(rows).items()]
    settings_ = config(heldout_fraction=fraction, near_duplicate=0.5, max_heldout=1000, split_by="table")
    try:
        parts = split(prompts, settings_)
    except DataError:
        assume(False)  # all are one cluster
    assert sorted(p.id for p in parts.train + parts.heldout) == sorted(p.id for p in prompts)
    assert not {p.meta["table"] for p in parts.train} & {p.meta["table"] for p in parts.heldout}
    assert all(jaccard(a.text, b.text) < 0.5 for a in parts.train for b in parts.heldout)
    assert split(prompts[::-1], settings_) == parts


@settings(max_examples=50)
@given(st.lists(sentences, min_size=1, max_size=30), st.lists(sentences, max_size=6))
def test_given_held_out_prompts_are_all_held_out(texts: list[str], held: list[str]) -> None:
    prompts, heldout = prompts_of(texts), prompts_of(held)
    settings_ = config(near_duplicate=0.5, max_heldout=1000, heldout_path="h.jsonl")
    try:
        parts = split_given(prompts, heldout, settings_)
    except DataError:
        assume(False)  # nothing is unlike them
    assert sorted(p.id for p in parts.heldout) == sorted(p.id for p in heldout)
    assert {p.id for p in parts.train} <= {p.id for p in prompts} - {p.id for p in heldout}
    assert all(jaccard(a.text, b.text) < 0.5 for a in parts.train for b in heldout)
    assert split_given(prompts[::-1], heldout[::-1], settings_) == parts


def test_given_held_out_prompts_by_hand() -> None:
    prompts = [Prompt.from_text(t, table=n) for t, n in (("one", "a"), ("two", "b"), ("three", "b"), ("four", "c"))]
    parts = split_given(prompts, [prompts[1]], config(heldout_path="h.jsonl", split_by="table"))
    assert (sorted(p.text for p in parts.train), [p.text for p in parts.heldout]) == (["four", "one"], ["two"])
    with pytest.raises(DataError, match=r"p\.jsonl: of 1 prompt 0 are unlike all of 1 prompt in h\.jsonl"):
        split_given(prompts[:1], prompts[:1], config(heldout_path="h.jsonl"))


def test_split_by_needs_the_entry_on_every_prompt() -> None:
    prompts = [Prompt.from_text("one", table="a"), Prompt.from_text("two", db="b", c=1)]
    with pytest.raises(DataError, match=r"p\.jsonl: prompts\.split_by: 'table' is not in the meta .* has c, db"):
        split(prompts, config(split_by="table"))


def test_about_the_right_share_is_held_out() -> None:
    prompts = prompts_of([f"{i} alone" for i in range(1000)])
    parts = split(prompts, config(max_heldout=1000))
    assert 160 <= len(parts.heldout) <= 240  # 0.2 ± 3 standard errors


def test_large_clusters_are_held_out_as_often_as_small_ones() -> None:
    prompts = prompts_of([f"w{i} w{i} w{i}" + "!" * j for i in range(300) for j in range(8)])
    assert len(near_duplicates(prompts, 0.8)) == 300
    parts = split(prompts, config(max_heldout=10_000))
    assert 0.13 <= len(parts.heldout) / len(prompts) <= 0.27


def test_caps_take_the_first_by_id_and_never_fill_the_other_side() -> None:
    prompts = prompts_of([f"{i} alone" for i in range(200)])
    whole = split(prompts, config(max_heldout=1000))
    capped = split(prompts, config(max_heldout=5, max_train=7))
    assert (capped.heldout, capped.train) == (whole.heldout[:5], whole.train[:7])
    assert [p.id for p in whole.train] == sorted(p.id for p in whole.train)
    assert len(split(prompts, config(max_heldout=5)).train) == len(whole.train)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_both_sides_get_a_cluster(fraction: float) -> None:
    parts = split(prompts_of(["one", "two", "three"]), config(heldout_fraction=fraction))
    assert sorted((len(parts.train), len(parts.heldout))) == [1, 2]


@pytest.mark.parametrize("texts", [[], ["alone"], ["a b c d", "A b c d.", "a, b, c, d"]])
def test_one_cluster_cannot_be_split(texts: list[str]) -> None:
    with pytest.raises(DataError, match=r"p\.jsonl: .* near-duplicates; expected at least 2"):
        split(prompts_of(texts), config())
