"""Preference files: every accepted form, every reason for which a row is set aside, whole files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opentao.errors import DataError
from opentao.preferences import Preferences, Ranking, read_preferences, write_preferences
from opentao.types import Prompt

GOOD = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
CHAT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2 + 2?"}]


def written(folder: Path, *rows: Any) -> Path:
    """Rows as JSON lines; text goes in as it is."""
    path = folder / "pairs.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read_one(folder: Path, row: Any) -> Ranking:
    found = read_preferences(written(folder, row))
    assert found.set_aside == []
    [ranking] = found.rankings
    return ranking


# ---------------------------------------------------------------------------------------------------- forms


def test_prompt_chosen_rejected(tmp_path: Path) -> None:
    ranking = read_one(tmp_path, GOOD | {"source": "other keys do not matter"})
    assert ranking == Ranking(prompt=Prompt.from_text("2 + 2?"), texts=("4", "5"), ranks=(1.0, 2.0))
    assert ranking.pairs == [(0, 1)]


@pytest.mark.parametrize(
    "answers",
    [
        {"chosen": "4", "rejected": "5"},
        {"chosen": [{"role": "assistant", "content": "4"}], "rejected": [{"role": "assistant", "content": "5"}]},
        {
            "chosen": [*CHAT, {"role": "assistant", "content": "4"}],
            "rejected": "5",
        },  # the whole chat, as many sets have it
        {"responses": ["4", "5"], "ranks": [1, 2]},
        {"responses": ["4", "5"], "ranks": [0.5, 7.0], "chosen": None, "rejected": None},
    ],
)
def test_messages_with_answers_in_any_form(tmp_path: Path, answers: dict[str, Any]) -> None:
    ranking = read_one(tmp_path, {"messages": CHAT} | answers)
    assert list(ranking.prompt.messages) == CHAT
    assert ranking.texts == ("4", "5")
    assert ranking.pairs == [(0, 1)]


def test_messages_win_over_prompt_and_keep_role_and_content_only(tmp_path: Path) -> None:
    chat = [m | {"name": "x"} for m in CHAT]
    assert list(read_one(tmp_path, GOOD | {"messages": chat}).prompt.messages) == CHAT
    assert read_one(tmp_path, GOOD | {"messages": []}).prompt == Prompt.from_text("2 + 2?")


def test_ranks_with_ties(tmp_path: Path) -> None:
    ranking = read_one(tmp_path, {"prompt": "x", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]})
    assert ranking.ranks == (2.0, 1.0, 2.0)
    assert ranking.pairs == [(1, 0), (1, 2)]
    same = read_one(tmp_path, {"prompt": "x", "responses": ["a", "a", "c"], "ranks": [1, 1, 2]})  # equal, but tied
    assert same.pairs == [(0, 2), (1, 2)]


def test_an_empty_answer_is_an_answer(tmp_path: Path) -> None:
    assert read_one(tmp_path, GOOD | {"rejected": ""}).texts == ("4", "")


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    rows = [
        {"prompt": "2 + 2?", "messages": None, "chosen": "4", "rejected": "5", "responses": None, "ranks": None},
        {"prompt": None, "messages": CHAT, "chosen": "4", "rejected": None, "responses": None, "ranks": None},
        {"prompt": "x", "messages": None, "chosen": None, "rejected": None, "responses": ["a", "b"], "ranks": [2, 1]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = read_preferences(path)
    assert [r.texts for r in found.rankings] == [("4", "5"), ("a", "b")]
    assert found.rankings[1].pairs == [(1, 0)]
    assert found.set_aside == [
        {
            "file": str(path),
            "line": 2,
            "reason": "rejected: expected text, or messages whose last turn is the assistant's answer",
        }
    ]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    """Line separators that JSON allows inside a text, quotes, other scripts."""
    texts = ('a\u2028b\x85c\x0cd "e" \\ \n', "naïve 日本語 🙂", "x")
    rankings = [
        Ranking(prompt=Prompt(messages=tuple(CHAT)), texts=texts, ranks=(1.0, 2.0, 2.0)),
        Ranking(prompt=Prompt.from_text("line\u2029two"), texts=("1", "2"), ranks=(2.0, 1.0)),
    ]
    write_preferences(tmp_path / "p.jsonl", rankings)
    assert read_preferences(tmp_path / "p.jsonl") == Preferences(rankings=rankings, set_aside=[])


def test_windows_line_ends_a_mark_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n  \r\n" + json.dumps(GOOD).encode())
    assert len(read_preferences(path).rankings) == 2


# ---------------------------------------------------------------------------------------------------- bad rows

NO_PROMPT = "expected `prompt` (text) or `messages` (chat)"
BAD_MESSAGES = "messages: expected a list of {role, content}, role one of system, user, assistant, tool"
NO_ANSWERS = "expected `chosen` and `rejected`, or `responses` (a list of texts) and `ranks`"
BAD_RANKS = "ranks: expected a list of numbers, 1 = best"
UNICODE = "not valid Unicode: the file must be UTF-8, without lone surrogates"


def answer(key: str) -> str:
    return f"{key}: expected text, or messages whose last turn is the assistant's answer"


def ranked(responses: Any, ranks: Any) -> dict[str, Any]:
    return {"prompt": "x", "responses": responses, "ranks": ranks}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{'prompt': 'x'}", "invalid JSON in the row: Expecting property name enclosed in double quotes"),
        ('{"prompt": "x", "chosen": "a", "rejected": "b", "chosen": "c"}', "key 'chosen' is given twice in the row"),
        ("[" * 100_000, "invalid JSON in the row: nested too deeply"),
        ("[1, 2]", "expected an object, got list"),
        ("null", "expected an object, got NoneType"),
        ({"chosen": "a", "rejected": "b"}, NO_PROMPT),
        (GOOD | {"prompt": "  "}, NO_PROMPT),
        (GOOD | {"prompt": 7}, NO_PROMPT),
        (GOOD | {"messages": "hello"}, BAD_MESSAGES),
        (GOOD | {"messages": 5}, BAD_MESSAGES),
        (GOOD | {"messages": True}, BAD_MESSAGES),
        (GOOD | {"messages": {"role": "user", "content": "x"}}, BAD_MESSAGES),
        (GOOD | {"messages": ["hello"]}, BAD_MESSAGES),
        (GOOD | {"messages": [{"content": "x"}]}, BAD_MESSAGES),
        (GOOD | {"messages": [{"role": None, "content": "x"}]}, BAD_MESSAGES),
        (GOOD | {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, BAD_MESSAGES),
        (
            GOOD | {"messages": [*CHAT, {"role": "assistant", "content": "4"}]},
            "messages: the last turn is the assistant's; expected the turns before the answer",
        ),
        (GOOD | {"messages": [{"role": "alien", "content": "x"}]}, BAD_MESSAGES),
        (GOOD | {"messages": [{"role": "system", "content": "x"}]}, "messages: no user turn to answer"),
        (GOOD | {"chosen": [*CHAT, {"role": "user", "content": "4"}]}, answer("chosen")),
        (
            GOOD | {"chosen": [*CHAT, {"role": "assistant", "content": "4"}]},  # a system turn that the prompt lacks
            "chosen: its turns before the answer are not those of the prompt",
        ),
        (ranked(["a", "b"], [True, False]), BAD_RANKS),
        ({"prompt": "x", "chosen": "a"}, answer("rejected")),
        ({"prompt": "x", "rejected": "a"}, answer("chosen")),
        (GOOD | {"chosen": 3}, answer("chosen")),
        (GOOD | {"chosen": []}, answer("chosen")),
        (GOOD | {"rejected": ["5"]}, answer("rejected")),
        (GOOD | {"rejected": [{"role": "assistant"}]}, answer("rejected")),
        (GOOD | {"rejected": "4"}, "the better and the worse answer are the same text"),
        ({"prompt": "x"}, NO_ANSWERS),
        (ranked("ab", [1, 2]), NO_ANSWERS),
        (ranked(["a", None], [1, 2]), NO_ANSWERS),
        (ranked(["a", "b"], None), BAD_RANKS),
        (ranked(["a", "b"], ["1", "2"]), BAD_RANKS),
        (ranked(["a", "b", "c"], [1, 2, float("nan")]), BAD_RANKS),
        (ranked(["a", "b"], [1, float("inf")]), BAD_RANKS),
        (ranked(["a", "b"], [1, 2, 3]), "ranks: expected one number for each of at least 2 responses, got 3"),
        (ranked(["a"], [1]), "ranks: expected one number for each of at least 2 responses, got 1"),
        (ranked(["a", "b"], [1, 1]) | {"ties": "unknown"}, "all answers have the same rank, and were not compared"),
        (GOOD | {"ties": "some"}, 'ties: expected "equal" or "unknown", got \'some\''),
        (GOOD | {"margin": -1}, "margin: expected a number of at least 0, got -1"),
        (GOOD | {"margin": "big"}, "margin: expected a number of at least 0, got 'big'"),
        (GOOD | {"annotator": 7}, "annotator: expected text, got int"),
        (GOOD | {"instruction": "\udfff"}, "instruction: expected text, got str"),
        (ranked(["a", "b", "a"], [1, 2, 3]), "the better and the worse answer are the same text"),
        (GOOD | {"chosen": "\ud800"}, UNICODE),
        (GOOD | {"prompt": "\udfff"}, UNICODE),
    ],
)
def test_a_bad_row_is_set_aside_with_file_line_and_reason(tmp_path: Path, row: Any, reason: str) -> None:
    path = written(tmp_path, GOOD, "", row, GOOD)
    found = read_preferences(path)
    assert len(found.rankings) == 2
    [aside] = found.set_aside
    assert (aside["file"], aside["line"]) == (str(path), 3)  # blank lines count as lines
    assert aside["reason"].startswith(reason)
    assert "\n" not in aside["reason"]


def test_bytes_that_are_not_utf8_spoil_their_row_only(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    latin = json.dumps(GOOD | {"chosen": "naïve"}, ensure_ascii=False).encode("latin-1")
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + latin + b"\n")
    found = read_preferences(path)
    assert len(found.rankings) == 1
    assert found.set_aside == [{"file": str(path), "line": 2, "reason": UNICODE}]


# ---------------------------------------------------------------------------------------------------- bad files


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read: No such file or directory"):
        read_preferences(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"none\.parquet: cannot be read"):
        read_preferences(tmp_path / "none.parquet")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_preferences(tmp_path)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 or not")
    with pytest.raises(DataError, match=r"broken\.parquet: cannot be read: \S+") as failed:
        read_preferences(broken)
    assert "\n" not in str(failed.value)


def test_a_file_without_one_usable_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: no usable preference: the file is empty"):
        read_preferences(written(tmp_path))
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: no usable preference: expected an object, got int"):
        read_preferences(written(tmp_path, "", "5", {"prompt": "x"}))


def test_columns_of_the_files_own_are_left_out(tmp_path: Path) -> None:
    """Whose names are those of `tao label`'s facts; and the newer name of the system role."""
    turns = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "x"}]
    rows = [GOOD | {"id": {"$oid": "5f"}, "order": "A123"}, {"messages": turns, "chosen": "a", "rejected": "b"}]
    first, second = read_preferences(written(tmp_path, *rows)).rankings
    assert first.facts == {}
    assert [m["role"] for m in second.prompt.messages] == ["system", "user"]
