"""The verifier `sql`: levels by hand, on SQLite and DuckDB; that answers do no harm is tested in `test_hostile`."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from test_verifiers import bad_config, group_of, scores

from opentao.config import ScorerConfig
from opentao.isolation.run import missing_layers, run_jobs
from opentao.scorers.registry import build_scorer
from opentao.scorers.run import run_scorer
from opentao.scorers.verifiers.sql import query_of

pytestmark = pytest.mark.skipif(bool(missing_layers()), reason=f"this machine lacks {', '.join(missing_layers())}")
ROWS = [(1, "Ann", 30.0), (2, "Bo", 40.0), (3, None, 40.5)]


@pytest.fixture(params=["sqlite", "duckdb"])
def args(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Arguments for a database of three singers, in both engines."""
    path = tmp_path / "music.db"
    connect = sqlite3.connect if request.param == "sqlite" else pytest.importorskip("duckdb").connect
    connection = connect(str(path))
    connection.execute("CREATE TABLE singer (id INTEGER, name TEXT, age DOUBLE)")
    for row in ROWS:
        connection.execute("INSERT INTO singer VALUES (?, ?, ?)", row)
    connection.commit()
    connection.close()
    return {"database": f"{tmp_path}/{{db}}.db", "engine": request.param}


def values(args: dict[str, Any], *texts: str, **meta: Any) -> list[float]:
    found = scores("sql", args, group_of(*texts, db="music", **meta))
    assert all(s.error is None for s in found), found
    return [s.value for s in found]


def test_levels(args: dict[str, Any]) -> None:
    found = values(
        args,
        "SELECT name FROM singer",  # these two agree, whatever the order and the way to write it
        "The query:\n```sql\nSELECT name FROM singer ORDER BY id DESC;\n```",
        "SELECT id FROM singer",  # rows of its own
        "SELECT name FROM singer WHERE id = 3",  # one row, null
        "SELECT name FROM singer WHERE id > 9",  # no rows
        "SELECT nom FROM singer",  # does not run
        "I would join the tables.",
        "",
    )
    assert found == [1.0, 1.0, 0.5, 0.3, 0.3, 0.1, 0.0, 0.0]


def test_a_comment_after_the_query_is_no_second_one(args: dict[str, Any]) -> None:
    query = "SELECT name FROM singer"
    texts = [f"{query}; -- all of them", f"{query};\n-- all of them", f"{query}; /* all */", f"{query} -- all"]
    assert values(args | {"levels": {"runs": 1.0}}, *texts, f"{query}; {query}") == [1.0] * 4 + [0.0]


def test_levels_can_be_named_and_weighed(args: dict[str, Any]) -> None:
    only_runs = args | {"levels": {"runs": 1.0}}
    assert values(only_runs, "SELECT 1", "SELECT x FROM y", "no") == [1.0, 0.0, 0.0]


def test_no_votes_for_nothing_and_no_majority_of_one(args: dict[str, Any]) -> None:
    empty = "SELECT name FROM singer WHERE id > 9"
    one, two = "SELECT count(*) - 2 FROM singer", "SELECT min(id) + 1 FROM singer"
    assert values(args, empty, empty, one, two) == [0.3, 0.3, 0.5, 0.5]
    assert values(args, one, "SELECT min(id) FROM singer", two, two) == [1.0] * 4  # a draw: both win


def test_what_asks_the_database_nothing_is_no_answer(args: dict[str, Any]) -> None:
    """A policy that says the same constant everywhere agrees with itself."""
    alone = ["SELECT 1", "SELECT 1", "SELECT count(*)", "WITH t AS (SELECT 1) SELECT * FROM t"]
    assert values(args, *alone) == [0.3] * 4
    assert values(args, "WITH t AS (SELECT id FROM singer) SELECT * FROM t", *alone) == [0.5, *[0.3] * 4]


def test_sums_in_another_order_are_the_same(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "sums.db")
    connection.execute("CREATE TABLE t (v REAL)")
    connection.executemany("INSERT INTO t VALUES (?)", [(1234567890.1,), (0.1,), (0.2,), (-0.4,)])
    connection.commit()
    connection.close()
    args = {"database": f"{tmp_path}/{{db}}.db", "levels": {"gold": 1.0}, "gold": "query"}
    up, down = (f"SELECT sum(v) FROM (SELECT v FROM t ORDER BY v{how})" for how in ("", " DESC"))
    near = (f"SELECT {number} FROM t LIMIT 1" for number in (1234567890, 1234567880))
    found = scores("sql", args, group_of(up, down, *near, db="sums", query=up))
    assert [s.value for s in found] == [1.0, 1.0, 1.0, 0.0]


def test_an_engine_that_broke_down_leaves_the_others_their_scores() -> None:
    """After an internal error of DuckDB its connection answers nothing any more: the process must go."""
    duckdb = pytest.importorskip("duckdb")
    from opentao.isolation.sql_child import examine

    class Cursor:
        def execute(self, sql: str) -> Any:
            raise duckdb.InternalException("INTERNAL Error")

        def close(self) -> None:
            pass

    setup = {"engine": "duckdb", "connection": type("C", (), {"cursor": Cursor})(), "seconds": 5, "max_rows": 9}
    with pytest.raises(SystemExit):
        examine("SELECT name FROM singer", setup)


def test_gold(args: dict[str, Any]) -> None:
    gold = args | {"levels": {"gold": 1.0}, "gold": "query"}
    texts = ["SELECT age, name FROM singer", "SELECT name, age FROM singer", "SELECT name FROM singer"]
    assert values(gold, *texts, query="SELECT name, age FROM singer ORDER BY age DESC") == [0.0, 0.0, 0.0]
    ordered = "SELECT name, age FROM singer ORDER BY age DESC"
    assert values(gold, ordered, texts[1], query=ordered) == [1.0, 0.0]
    assert values(gold, ordered, texts[1], texts[0], query=texts[1]) == [1.0, 1.0, 0.0]


def test_numbers_are_compared_by_value(args: dict[str, Any]) -> None:
    gold = args | {"levels": {"gold": 1.0}, "gold": "query"}
    same = ["SELECT 2", "SELECT 2.0", "SELECT 4 / 2.0", "SELECT count(*) - 1 FROM singer"]
    assert values(gold, *same, "SELECT '2'", "SELECT 2.001", query="SELECT 2") == [1.0] * 4 + [0.0, 0.0]
    thirds = ["SELECT sum(age) / 3 FROM singer", "SELECT avg(age) FROM singer"]
    assert values(gold, *thirds, query="SELECT avg(age) FROM singer") == [1.0, 1.0]


def test_a_constant_is_no_gold_answer(args: dict[str, Any]) -> None:
    """A small number can be guessed: the query must ask the database, as the gold query does."""
    gold = args | {"levels": {"gold": 1.0}, "gold": "query"}
    count = "SELECT count(*) FROM singer"
    assert values(gold, count, "SELECT count(id) FROM singer", "SELECT 3", query=count) == [1.0, 1.0, 0.0]


def test_what_cannot_be_judged_is_unscored(args: dict[str, Any], tmp_path: Path) -> None:
    def kinds(more: dict[str, Any], *texts: str, **meta: Any) -> list[str]:
        found = scores("sql", args | more, group_of(*texts, **meta))
        return [(s.error or "").partition(":")[0] for s in found]

    assert kinds({}, "SELECT 1") == ["missing_key"]
    assert kinds({}, "SELECT 1", db="other") == ["no_database"]
    for name in ("../music", "/etc/passwd", "..", "", "a/b", "a\0b"):
        assert kinds({}, "SELECT 1", db=name) == ["bad_key"]
    gold = {"levels": {"gold": 1.0}, "gold": "query"}
    assert kinds(gold, "SELECT 1", db="music") == ["missing_key"]
    assert kinds(gold, "SELECT 1", db="music", query="SELECT nothing FROM nowhere") == ["bad_key"]
    assert kinds(gold, "SELECT 1 WHERE 0 = 1", db="music", query="SELECT id FROM singer WHERE id > 9") == ["bad_key"]
    assert kinds(gold, "SELECT 1", db="music", query=" ") == ["bad_key"]
    many = "SELECT a.id FROM singer a, singer b, singer c, singer d"
    assert kinds({"max_rows": 80}, many, "SELECT 1", db="music") == ["too_many_rows", ""]
    assert kinds({"max_rows": 81}, many, db="music") == [""]


def test_a_file_that_is_no_database_is_no_answers_fault(args: dict[str, Any], tmp_path: Path) -> None:
    """Such as a pointer of git-lfs, or a database that was copied half."""
    good = (tmp_path / "music.db").read_bytes()
    for content in (b"version https://git-lfs.github.com/spec/v1\n" * 200, good[: len(good) // 2 - 100]):
        (tmp_path / "other.db").write_bytes(content)
        found = scores("sql", args, group_of("SELECT name FROM singer", "SELECT id FROM singer", db="other"))
        assert [s.scored for s in found] == [False, False], found


def test_a_query_runs_once(args: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Among the base's answers the same queries come again and again; what broke a limit is tried again."""
    scorer = build_scorer(ScorerConfig(type="sql", args=args | {"seconds": 0.3}))
    asked: list[str] = []

    def counting(module: str, setup: Any, jobs: Any, *rest: Any, **more: Any) -> Any:
        asked.extend(jobs)
        return run_jobs(module, setup, jobs, *rest, **more)

    monkeypatch.setattr("opentao.scorers.verifiers.sql.run_jobs", counting)
    endless = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT count(*) FROM r"
    one, two = "SELECT id FROM singer", "SELECT age FROM singer"
    group = group_of(one, one, two, endless, db="music")
    first, second = run_scorer(scorer, group), run_scorer(scorer, group)
    assert asked == [one, two, endless, endless]
    assert [s.value for s in first[:3]] == [s.value for s in second[:3]] == [1.0, 1.0, 0.5]


def test_over_a_limit(args: dict[str, Any]) -> None:
    endless = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT count(*) FROM r"
    short = args | {"seconds": 0.3}
    ids = "SELECT id FROM singer"
    found = scores("sql", short, group_of(ids, endless, ids, db="music"))
    assert [s.value for s in found if s.scored] == [1.0, 1.0]
    assert (found[1].error or "").startswith(("timeout: ", "memory: "))
    assert values(short | {"over_limit": -1.0}, endless) == [-1.0]


def test_bad_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad_config("sql", {}, "database: ")
    bad_config("sql", {"database": "x", "levels": {}}, "expected at least one of parses, runs")
    bad_config("sql", {"database": "x", "levels": {"right": 1.0}}, "levels: ")
    bad_config("sql", {"database": "x", "gold": "query"}, "gold: give the name of the meta entry and a level")
    bad_config("sql", {"database": "x", "levels": {"gold": 1.0}}, "gold: give the name of the meta entry and a level")
    monkeypatch.setitem(__import__("sys").modules, "duckdb", None)
    bad_config("sql", {"database": "x", "engine": "duckdb"}, "pip install duckdb")


def test_the_query_of_an_answer() -> None:
    assert query_of("SELECT 1;; \n") == "SELECT 1"
    assert query_of("```\nSELECT 1;\n```\nor\n```sql\nSELECT 2;\n```") == "SELECT 2"
