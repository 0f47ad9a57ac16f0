"""Child of the verifier `sql`: parse one statement, run it on a read-only database, say what came out.

Two locks, one behind the other: the statement must be a query in the eyes of sqlglot, and the engine itself is told to
refuse whatever is not (SQLite's authoriser; DuckDB without external access, its settings locked).
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Iterable
from decimal import Decimal
from typing import Any
from urllib.parse import quote

import sqlglot
from sqlglot import exp

from opentao.isolation.child import Answer, serve

QUERIES = (exp.Select, exp.SetOperation, exp.Subquery, exp.Values)
NOT_IN_QUERIES = (
    exp.DML,
    exp.DDL,
    exp.Command,
    exp.Into,
    exp.Pragma,
    exp.Attach,
    exp.Detach,
    exp.Set,
    exp.Use,
    exp.Copy,
    exp.LoadData,
    exp.Transaction,
    exp.Commit,
    exp.Rollback,
    exp.Drop,
    exp.Alter,
    exp.Lock,
)
ALLOWED_DML = (exp.Select, exp.SetOperation, exp.Subquery, exp.Values)
FORBIDDEN_FUNCTIONS = ("load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "getenv", "glob_files")
FORBIDDEN_PREFIXES = ("read_", "pragma_", "parquet_", "duckdb_", "sqlite_", "sniff_", "dbstat", "which_secret")
FORBIDDEN_TABLES = ("pragma_", "duckdb_", "dbstat", "sqlite_dbpage")
MAX_CHARACTERS = 20_000
STEPS = 10_000  # of SQLite's machine between two looks at the clock


class Refused(Exception):
    """Not a query that may run."""


class NoDatabase(Exception):
    """The file cannot be read as a database: no answer's fault."""


def prepare(setup: dict[str, Any]) -> Answer:
    if setup["engine"] == "duckdb":  # opened before the door is locked: it wants to read what memory there is
        setup["connection"] = _open_duckdb(setup)
    return lambda sql: examine(sql, setup)


def examine(sql: str, setup: dict[str, Any]) -> dict[str, Any]:
    """``{"state": "rows", "rows": 3, "empty": false, "bag": "9f…", "list": "77…"}``, or a state with a message."""
    try:
        ordered, reads = check_query(sql, setup["engine"])
        rows = run(sql, setup)
    except Refused as error:
        return {"state": "refused", "message": str(error)[:200]}
    except RecursionError:
        return {"state": "refused", "message": "nested too deep"}
    except MemoryError:
        return {"state": "memory", "message": "out of memory"}
    except NoDatabase as error:
        return {"state": "no_database", "message": str(error)[:200]}
    except TimeoutError:
        return {"state": "timeout", "message": f"over {setup['seconds']:g} s"}
    except Exception as error:  # an engine's own errors: each engine has its own tree
        return {"state": "failed", "message": f"{type(error).__name__}: {error}"[:200]}
    if len(rows) > setup["max_rows"]:
        return {"state": "too_many_rows", "message": f"over {setup['max_rows']} rows"}
    lines = [canonical(row) for row in rows]
    return {
        "state": "rows",
        "rows": len(rows),
        "empty": all(value is None for row in rows for value in row),
        "bag": digest(sorted(lines)),
        "list": digest(lines),
        "ordered": ordered,
        "reads": reads,
    }


def check_query(sql: str, dialect: str) -> tuple[bool, bool]:
    """Does the query fix the order of its rows, and does it read a table of the database?

    Raises:
        Refused: not exactly one statement, or one that is not only a query.
    """
    if len(sql) > MAX_CHARACTERS:
        raise Refused(f"over {MAX_CHARACTERS} characters")
    if "\0" in sql:
        raise Refused("a zero byte")
    try:
        parsed = sqlglot.parse(sql, read=dialect)
        # exp.Semicolon: one that a comment follows
        statements = [s for s in parsed if s is not None and not isinstance(s, exp.Semicolon)]
    except (sqlglot.errors.SqlglotError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise Refused(f"does not parse: {type(error).__name__}: {error}") from error
    if len(statements) != 1:
        raise Refused(f"{len(statements)} statements")
    root = statements[0]
    if not isinstance(root, QUERIES):
        raise Refused(f"{root.key} is not a query")
    for node in root.walk():
        if isinstance(node, NOT_IN_QUERIES) and not isinstance(node, ALLOWED_DML):
            raise Refused(f"{node.key} inside a query")
        if isinstance(node, exp.Table) and node.name.lower().startswith(FORBIDDEN_TABLES):
            raise Refused(f"table {node.name}")
        if isinstance(node, exp.Func):
            name = (node.name if isinstance(node, exp.Anonymous) else node.sql_name()).lower()
            if name in FORBIDDEN_FUNCTIONS or name.startswith(FORBIDDEN_PREFIXES):
                raise Refused(f"function {name}")
    own = {cte.alias.lower() for cte in root.find_all(exp.CTE)}
    reads = any(table.name.lower() not in own for table in root.find_all(exp.Table))
    return root.args.get("order") is not None, reads


def run(sql: str, setup: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Up to `max_rows` + 1 rows."""
    return _duckdb(sql, setup) if setup["engine"] == "duckdb" else _sqlite(sql, setup)


def _sqlite(sql: str, setup: dict[str, Any]) -> list[tuple[Any, ...]]:
    import sqlite3

    allowed = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}

    def authorise(action: int, first: str | None, second: str | None, *_: object) -> int:
        if action == sqlite3.SQLITE_FUNCTION:
            return sqlite3.SQLITE_DENY if (second or "").lower() in FORBIDDEN_FUNCTIONS else sqlite3.SQLITE_OK
        return sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY

    try:
        connection = sqlite3.connect(f"file:{quote(setup['database'])}?mode=ro&immutable=1", uri=True)
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        raise NoDatabase(f"{type(error).__name__}: {error}") from error
    try:
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
        connection.execute(f"PRAGMA hard_heap_limit = {setup['memory_bytes'] // 2}")
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute("PRAGMA trusted_schema = OFF")
        for limit, most in (
            (sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000),
            (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
            (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1000),
            (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 200),
            (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 50),
        ):
            connection.setlimit(limit, most)
        deadline = time.monotonic() + setup["seconds"]
        connection.set_progress_handler(lambda: time.monotonic() > deadline, STEPS)
        connection.set_authorizer(authorise)
        try:
            return connection.execute(sql).fetchmany(setup["max_rows"] + 1)
        except sqlite3.OperationalError as error:
            if time.monotonic() > deadline:
                raise TimeoutError from error
            raise
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0)  # Python's own errors have none
            if code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise NoDatabase(f"{type(error).__name__}: {error}") from error
            raise
    finally:
        connection.close()


def _open_duckdb(setup: dict[str, Any]) -> Any:
    import duckdb

    settings = {
        "enable_external_access": "false",
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "memory_limit": f"{setup['memory_bytes'] >> 21}MB",
        "threads": "1",
        "temp_directory": "",
        "lock_configuration": "true",
    }
    return duckdb.connect(setup["database"], read_only=True, config=settings)


def _duckdb(sql: str, setup: dict[str, Any]) -> list[tuple[Any, ...]]:
    import duckdb

    cursor = setup["connection"].cursor()
    late = threading.Event()

    def stop() -> None:
        late.set()
        cursor.interrupt()

    timer = threading.Timer(setup["seconds"], stop)
    timer.start()
    try:
        rows: list[tuple[Any, ...]] = cursor.execute(sql).fetchmany(setup["max_rows"] + 1)
        return rows
    except duckdb.OutOfMemoryException as error:
        raise MemoryError from error
    except (duckdb.FatalException, duckdb.InternalException) as error:
        raise SystemExit(f"{error}") from error  # the connection is of no use any more: others need a new process
    except duckdb.Error as error:
        if late.is_set():
            raise TimeoutError from error
        raise
    finally:
        timer.cancel()
        cursor.close()


def canonical(row: Iterable[Any]) -> str:
    """One text a row; 1 and 1.0 are one value, floats count to nine digits."""
    return "\x1f".join(_value(value) for value in row)


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"n{int(value)}"
    if isinstance(value, int):
        return f"n{value}"
    if isinstance(value, float | Decimal):
        return f"n{round(value)}" if _is_whole(value) else f"n{float(value):.9g}"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"b{bytes(value).hex()}"
    return f"t{value}"


def _is_whole(value: float | Decimal) -> bool:
    """Up to rounding in the tenth digit, which sums in another order differ by."""
    if not math.isfinite(value) or abs(value) >= 2**53:
        return False
    return abs(value - round(value)) <= abs(value) / 10**9


def digest(lines: list[str]) -> str:
    return hashlib.sha256("\x1e".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def main(path: str) -> None:
    serve(path, prepare)
