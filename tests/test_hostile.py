"""Over 300 hostile answers to the verifiers: none escapes, hangs beyond its limit, or ends the run."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from pathlib import Path
from typing import Any

import hostile
import pytest
from test_verifiers import TICKET, group_of, scores

from opentao.isolation.run import missing_layers
from opentao.types import Score

isolated = pytest.mark.skipif(bool(missing_layers()), reason=f"this machine lacks {', '.join(missing_layers())}")
OVER = {"timeout", "memory", "too_many_rows", "crashed", "too_much_output"}
TESTS = [{"function": "add", "args": [1, 2], "expect": 3}]

READERS: list[tuple[str, dict[str, Any]]] = [
    ("citation", {"key": "label"}),
    ("contains", {"key": "label", "casefold": True}),
    ("exact", {"key": "label", "casefold": True}),
    ("json_field", {"field": "queue", "key": "label", "schema": TICKET}),
    ("json_schema", {"schema": TICKET, "partial": True, "fences": True}),
    ("language", {"languages": ["en"]}),
    ("length", {"min": 1, "max": 9, "slack": 5}),
    ("majority", {"pattern": r"(\w+)\s*$", "least": 1}),
    ("regex", {"pattern": r"^\s*\S+(\s+\S+)*\s*$"}),
    ("repetition", {"unit": "characters"}),
]


def kinds(found: tuple[Score, ...]) -> set[str]:
    return {(s.error or "").partition(":")[0] for s in found if not s.scored}


def test_there_are_300() -> None:
    assert len(hostile.ANY) * (len(READERS) + 2) + len(hostile.SQL) + len(hostile.PYTHON) >= 300
    assert len(set(hostile.ANY)) == len(hostile.ANY)


@pytest.mark.parametrize(("type_", "args"), READERS, ids=[name for name, _ in READERS])
def test_readers_score_low_or_not_at_all(type_: str, args: dict[str, Any]) -> None:
    start = time.monotonic()
    found = scores(type_, args, group_of(*hostile.ANY, label="billing"))
    assert time.monotonic() - start < 15
    assert kinds(found) <= {"timeout", "too_short"}
    if type_ in ("json_field", "exact", "citation"):
        assert {s.value for s in found} == {0.0}
    if type_ == "contains":
        holding = {a for a in hostile.ANY if "billing" in a}
        assert {a for a, s in zip(hostile.ANY, found, strict=True) if s.value} == holding
    if type_ == "json_schema":
        assert max(s.value for s in found) <= 0.4


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "dbs" / "music.sqlite"
    path.parent.mkdir()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE singer (id INTEGER, name TEXT, age INTEGER)")
    connection.executemany("INSERT INTO singer VALUES (?, ?, ?)", [(1, "Ann", 30), (2, "Bo", 40)])
    connection.execute("CREATE TABLE big (name TEXT)")
    connection.executemany("INSERT INTO big VALUES (?)", [(f"name {i}" * 5,) for i in range(200)])
    connection.commit()
    connection.close()
    return path


def _state(folder: Path) -> dict[str, str]:
    """Every file under the folder, by its content."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@isolated
def test_sql(database: Path, tmp_path: Path) -> None:
    """None writes, none gives rows, and each ends within its limit."""
    before = _state(tmp_path)
    args = {"database": str(database), "seconds": 0.3, "memory_mb": 64, "max_rows": 1000}
    answers = [*hostile.ANY, *(text.replace("{folder}", str(tmp_path)) for text in hostile.SQL)]
    start = time.monotonic()
    found = scores("sql", args, group_of(*answers))
    assert time.monotonic() - start < 60
    assert kinds(found) <= OVER
    reached = {a: s.value for a, s in zip(answers, found, strict=True) if s.scored and s.value > 0.1}
    assert set(reached) <= HARMLESS, reached
    assert _state(tmp_path) == before


HARMLESS = {  # they run and give what any query may give
    "SELECT 1 " + "UNION ALL SELECT 1 " * 900,
    "SELECT 'a' LIKE '" + "%a" * 600 + "b'",
    "SELECT name GLOB '" + "*a" * 400 + "' FROM singer",
    "SELECT printf('%2000000000d', 1)",
}


@isolated
def test_sql_on_duckdb(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    path = tmp_path / "music.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE singer (id INTEGER, name TEXT, age INTEGER)")
        connection.execute("INSERT INTO singer VALUES (1, 'Ann', 30), (2, 'Bo', 40)")
        connection.execute("CREATE TABLE big AS SELECT 'name ' || range AS name FROM range(200)")
    before = _state(tmp_path)
    args = {"database": str(path), "engine": "duckdb", "seconds": 0.3, "memory_mb": 128, "max_rows": 1000}
    answers = [text.replace("{folder}", str(tmp_path)) for text in hostile.SQL]
    found = scores("sql", args, group_of("SELECT name FROM singer", "SELECT name FROM singer", *answers))
    assert [s.value for s in found[:2]] == [1.0, 1.0]
    assert kinds(found) <= OVER
    reached = {a: s.value for a, s in zip(answers, found[2:], strict=True) if s.scored and s.value > 0.1}
    assert not [a for a in reached if "/etc/passwd" in a or "evil" in a or "pragma" in a.lower()], reached
    assert _state(tmp_path) == before


@isolated
def test_python_tests(tmp_path: Path) -> None:
    """None passes, none leaves a trace, and each ends within its limit."""
    (tmp_path / "secret").write_text("the gold answers")
    before = _state(tmp_path)
    args = {"key": "tests", "seconds": 0.5, "memory_mb": 256}
    answers = [*hostile.ANY, *(text.replace("{folder}", str(tmp_path)) for text in hostile.PYTHON)]
    start = time.monotonic()
    found = scores("python_tests", args, group_of(*answers, tests=TESTS))
    assert time.monotonic() - start < 90
    assert {s.value for s in found if s.scored} == {0.0}
    assert kinds(found) <= OVER
    assert _state(tmp_path) == before
    assert not Path("/tmp/opentao-evil").exists()


@isolated
def test_after_all_that_an_honest_answer_passes(database: Path) -> None:
    (good,) = scores("python_tests", {"key": "tests"}, group_of("def add(a, b):\n    return a + b", tests=TESTS))
    assert good.value == 1.0
    both = scores("sql", {"database": str(database)}, group_of("SELECT name FROM singer", "SELECT name FROM singer"))
    assert [s.value for s in both] == [1.0, 1.0]
