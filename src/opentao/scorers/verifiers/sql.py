"""`sql`: how far does the answer's query get on a database?

Threat model. An answer may hold any text. Only one statement that sqlglot takes for a query is run, in a process of its
own without network, without rights on files but reading the database and the interpreter, under limits of time, memory
and rows, on a connection that refuses everything but reading. What is left to an answer: processor time up to the
limit, and all that the database holds, which it can read but has nowhere to send.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from opentao.isolation.run import Broken, Isolation, Limits, require, run_jobs
from opentao.scorers.plugin import Rating, unscored
from opentao.scorers.verifiers.base import ARGS, Unscored, Verifier, as_text, meta_text, meta_value
from opentao.scorers.verifiers.text import last_fence
from opentao.types import Group, Prompt

CHILD = "opentao.isolation.sql_child"
LEVELS = ("parses", "runs", "non_empty", "majority", "gold")
OVER = {"timeout", "memory", "too_many_rows", "crashed", "too_much_output"}
MOST_KNOWN = 10_000  # outcomes that are kept
FIELD = re.compile(r"\{(\w+)\}")


@dataclass(kw_only=True, config=ARGS)
class Sql(Verifier):
    """The score of the highest level that the answer's query reaches, 0.0 if none. `levels` says what each is worth:

    * `parses`: one statement, and it is a query;
    * `runs`: the database gives rows (or none) for it;
    * `non_empty`: some value in them is not null;
    * `majority`: at least two answers of the group gave these rows, and no other rows got more votes; rows without a
      value have no vote. Agreement is not truth, but needs no label;
    * `gold`: the same rows as the query at ``meta[gold]``, in the same order if that one sorts.

    Rows are compared as a bag, columns by place; 1 equals 1.0, floats count to nine digits. `database` is a path with
    names of `meta` in braces, ``dbs/{db_id}.sqlite``; it must not change during a run. The query is the last Markdown
    fence, or the whole answer. A query over a limit is unscored (timeout, memory, too_many_rows, crashed), or has the
    score `over_limit`.
    """

    database: str
    engine: Literal["sqlite", "duckdb"] = "sqlite"
    levels: dict[Literal["parses", "runs", "non_empty", "majority", "gold"], float] = Field(
        default={"parses": 0.1, "runs": 0.3, "non_empty": 0.5, "majority": 1.0}
    )
    gold: str | None = None
    seconds: PositiveFloat = 2.0
    memory_mb: PositiveInt = 256
    max_rows: PositiveInt = 10_000
    over_limit: float | None = None
    isolation: Isolation = "full"
    _limits: Any = dataclasses.field(init=False, repr=False)
    _known: dict[tuple[str, str], dict[str, Any]] = dataclasses.field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        require(self.isolation)
        if not self.levels:
            raise ValueError(f"levels: expected at least one of {', '.join(LEVELS)}")
        if ("gold" in self.levels) != (self.gold is not None):
            raise ValueError("gold: give the name of the meta entry and a level `gold`, or neither")
        if self.engine == "duckdb":
            _import_duckdb()
        # The engine is told the time and memory that a query has; the process gets some more, to be able to say so.
        room = 4096 if self.engine == "duckdb" else 256  # DuckDB reserves addresses that it does not use
        self._limits = Limits(seconds=self.seconds + 3, memory_mb=self.memory_mb + room)

    @property
    def relative(self) -> bool:
        return "majority" in self.levels

    def score(self, group: Group) -> list[Rating]:
        try:
            outcomes, gold = self._run(group)
        except Unscored as reason:
            return [unscored(reason.kind, str(reason)) for _ in group.responses]
        votes = Counter(o["bag"] for o in outcomes if o["state"] == "rows" and o["reads"] and not o["empty"])
        most = max(votes.values(), default=0)
        winners = {bag for bag, count in votes.items() if count == most >= 2}
        return [self._rating(outcome, winners, gold) for outcome in outcomes]

    def _run(self, group: Group) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """What became of each answer's query, and of the gold query if there is one."""
        path = self._path(group.prompt)
        setup = {
            "engine": self.engine,
            "database": str(path),
            "seconds": self.seconds,
            "memory_bytes": self.memory_mb << 20,
            "max_rows": self.max_rows,
        }
        queries = [query_of(r.text) for r in group.responses]
        if self.gold is not None:
            queries.append(meta_text(group.prompt, self.gold))
        outcomes = self._outcomes(setup, queries)
        if self.gold is None:
            return outcomes, None
        *outcomes, gold = outcomes
        if gold["state"] != "rows":
            raise Unscored("bad_key", f"meta[{self.gold!r}] does not run: {gold['state']}: {gold['message']}")
        if not gold["rows"]:
            raise Unscored("bad_key", f"meta[{self.gold!r}] finds no row: whatever finds none would be right")
        return outcomes, gold

    def _outcomes(self, setup: dict[str, Any], queries: Sequence[str]) -> list[dict[str, Any]]:
        """Each query runs once on a database: among the base's answers the same ones come again and again."""
        database = setup["database"]
        new = list(dict.fromkeys(q for q in queries if (database, q) not in self._known))
        answers = run_jobs(CHILD, setup, new, self._limits, readable=[database], isolation=self.isolation)
        own = {
            q: {"state": a.kind, "message": a.message} if isinstance(a, Broken) else a
            for q, a in zip(new, answers, strict=True)
        }
        found = [own[q] if q in own else self._known[database, q] for q in queries]
        if len(self._known) > MOST_KNOWN:
            self._known.clear()
        self._known |= {(database, q): outcome for q, outcome in own.items() if outcome["state"] not in OVER}
        return found

    def _path(self, prompt: Prompt) -> Path:
        def value(match: re.Match[str]) -> str:
            text = as_text(meta_value(prompt, match[1]), match[1])
            if not re.fullmatch(r"\w[\w.-]*", text):
                raise Unscored("bad_key", f"meta[{match[1]!r}]: {text!r} is not the name of a database")
            return text

        path = Path(FIELD.sub(value, self.database)).absolute()
        if not path.is_file():
            raise Unscored("no_database", f"{path}: there is no such file")
        return path

    def _rating(self, outcome: dict[str, Any], winners: set[str], gold: dict[str, Any] | None) -> Rating:
        state = outcome["state"]
        if state == "no_database":
            return unscored(state, outcome["message"])
        if state in OVER:
            return self.over_limit if self.over_limit is not None else unscored(state, outcome["message"])
        reached = set()
        if state in ("failed", "rows"):
            reached.add("parses")
        if state == "rows":
            reached.add("runs")
            if outcome["reads"] and not outcome["empty"]:  # SELECT 1 asks the database nothing
                reached.add("non_empty")
            if outcome["reads"] and outcome["bag"] in winners:
                reached.add("majority")
            which = "list" if gold and gold["ordered"] else "bag"
            if gold and (outcome["reads"] or not gold["reads"]) and outcome[which] == gold[which]:
                reached.add("gold")
        return max((value for level, value in self.levels.items() if level in reached), default=0.0)


def query_of(text: str) -> str:
    """The statement that an answer gives: its last Markdown fence, or all of it; without closing semicolons."""
    return last_fence(text).strip().rstrip(";").strip()


def _import_duckdb() -> None:
    try:
        import duckdb  # noqa: F401
    except ImportError as error:
        raise ValueError("engine: duckdb is not installed; pip install duckdb") from error
