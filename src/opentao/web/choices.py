"""What people chose, in SQLite: items (groups to choose in), tasks (what was shown to whom), choices (what they said).

Write-ahead log and full sync: an answer that the page has confirmed is on disk, whatever is killed next. Nothing is
ever deleted; undo marks a choice as undone. A task is written before it is shown, with the order in which the answers
stood, so a reload shows the same thing and a second click of the same button changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from opentao.errors import DataError
from opentao.types import Message, content_hash

Kind = Literal["pair", "rank", "mark"]
SCHEMA = """
CREATE TABLE IF NOT EXISTS annotators (name TEXT PRIMARY KEY, token_hash TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS items (
  id TEXT PRIMARY KEY, position INTEGER NOT NULL, messages TEXT NOT NULL, responses TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS tasks (
  id TEXT PRIMARY KEY, annotator TEXT NOT NULL REFERENCES annotators, item TEXT NOT NULL REFERENCES items,
  kind TEXT NOT NULL, shown TEXT NOT NULL, repeat_of TEXT REFERENCES tasks, policy TEXT NOT NULL, issued REAL NOT NULL,
  extra TEXT NOT NULL DEFAULT '{}');
CREATE TABLE IF NOT EXISTS choices (
  id INTEGER PRIMARY KEY, task TEXT NOT NULL REFERENCES tasks, time REAL NOT NULL, seconds REAL NOT NULL,
  answer TEXT NOT NULL, undone REAL);
CREATE UNIQUE INDEX IF NOT EXISTS one_standing ON choices (task) WHERE undone IS NULL;
CREATE INDEX IF NOT EXISTS tasks_of ON tasks (annotator, issued);
"""
VERSION = 2  # 1 had no `extra`


@dataclass(kw_only=True, slots=True, frozen=True)
class Item:
    """A prompt with its answers: ``Item(id="9f…", messages=({"role": "user", …},), responses=("a", "b"))``"""

    id: str
    messages: tuple[Message, ...]
    responses: tuple[str, ...]


@dataclass(kw_only=True, slots=True, frozen=True)
class Task:
    """What one person was shown: the answers `shown` (indices of the item's) in that order."""

    id: str
    annotator: str
    item: str
    kind: Kind
    shown: tuple[int, ...]
    repeat_of: str | None
    policy: str  # how it was chosen: informative, random, repeat, import
    issued: float  # seconds since 1970
    extra: dict[str, Any] = field(default_factory=dict)  # of an imported row: instruction, margin, subset


@dataclass(kw_only=True, slots=True, frozen=True)
class Choice:
    """What they said of it. Answers by kind, in indices of the item's responses:

    * pair: ``{"better": 3, "worse": 1}``, ``{"tie": true}``, ``{"tie": true, "both_bad": true}``;
    * rank: ``{"order": [2, 0, 1]}`` best first; what is left out is below and not compared;
    * mark: ``{"right": true}``;
    * any: ``{"skip": true}``.
    """

    task: Task
    answer: dict[str, Any]
    time: float  # seconds since 1970
    seconds: float  # from shown to chosen


class Choices:
    """The file. Safe to use from several threads; several processes may read it."""

    def __init__(self, path: Path) -> None:
        """Raises DataError if the file is not one of ours."""
        self.path = path
        self.lock = threading.RLock()
        try:
            self.db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10)
            self._refuse_foreign()
            self.db.execute("PRAGMA journal_mode = WAL")
            self.db.execute("PRAGMA synchronous = FULL")
            self.db.execute("PRAGMA foreign_keys = ON")
            self.db.executescript(SCHEMA)
            (version,) = self.db.execute("PRAGMA user_version").fetchone()
            if version not in (0, 1, VERSION):
                raise DataError(f"{path}: written by another version of opentao ({version}, this one writes {VERSION})")
            if "extra" not in {row[1] for row in self.db.execute("PRAGMA table_info(tasks)")}:
                self.db.execute("ALTER TABLE tasks ADD COLUMN extra TEXT NOT NULL DEFAULT '{}'")
            self.db.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.Error as error:
            raise DataError(f"{path}: not a file of choices: {error}") from error

    def _refuse_foreign(self) -> None:
        """Before anything is written into it."""
        there = {name for (name,) in self.db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if there and "choices" not in there:
            raise DataError(f"{self.path}: not a file of choices: an SQLite file with other tables")

    def close(self) -> None:
        self.db.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self.lock:
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield self.db
            except BaseException:
                self.db.execute("ROLLBACK")
                raise
            self.db.execute("COMMIT")

    def _rows(self, query: str, *args: Any) -> list[tuple[Any, ...]]:
        with self.lock:
            try:
                return self.db.execute(query, args).fetchall()
            except sqlite3.Error as error:
                raise DataError(f"{self.path}: cannot be read: {error}") from error

    # --- annotators

    def add_annotator(self, name: str) -> str:
        """A new token for this person; an earlier one stops working. Only its hash is kept."""
        token = secrets.token_urlsafe(18)
        with self._writing() as db:
            db.execute(
                "INSERT INTO annotators VALUES (?, ?)"
                " ON CONFLICT (name) DO UPDATE SET token_hash = excluded.token_hash",
                (name, _hash(token)),
            )
        return token

    def annotator_of(self, token: str) -> str | None:
        rows = self._rows("SELECT name FROM annotators WHERE token_hash = ?", _hash(token))
        return str(rows[0][0]) if rows else None

    def annotators(self) -> list[str]:
        return [str(name) for (name,) in self._rows("SELECT name FROM annotators ORDER BY name")]

    # --- items

    def add_items(self, items: Sequence[Item]) -> int:
        """Add those that are not there yet; an item never changes. Returns how many were new."""
        with self._writing() as db:
            (start,) = db.execute("SELECT coalesce(max(position) + 1, 0) FROM items").fetchone()
            before = db.total_changes
            db.executemany(
                "INSERT OR IGNORE INTO items VALUES (?, ?, ?, ?)",
                [
                    (item.id, start + n, _dump(list(item.messages)), _dump(list(item.responses)))
                    for n, item in enumerate(items)
                ],
            )
            return int(db.total_changes - before)

    def items(self) -> list[Item]:
        rows = self._rows("SELECT id, messages, responses FROM items ORDER BY position")
        return [_item(*row) for row in rows]

    def item(self, id_: str) -> Item:
        (row,) = self._rows("SELECT id, messages, responses FROM items WHERE id = ?", id_)
        return _item(*row)

    # --- tasks and choices

    def add_task(
        self,
        annotator: str,
        item: str,
        kind: Kind,
        shown: Sequence[int],
        policy: str,
        repeat_of: str | None = None,
        id_: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Task:
        """A new task; with `id_` the one of that name if it is there."""
        if id_ is not None and (known := self.task(id_)) is not None:
            return known
        task = Task(
            id=id_ or secrets.token_urlsafe(12),
            annotator=annotator,
            item=item,
            kind=kind,
            shown=tuple(shown),
            repeat_of=repeat_of,
            policy=policy,
            issued=time.time(),
            extra=extra or {},
        )
        with self._writing() as db:
            db.execute(
                "INSERT INTO tasks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (task.id, annotator, item, kind, _dump(task.shown), repeat_of, policy, task.issued, _dump(task.extra)),
            )
        return task

    def open_task(self, annotator: str, fits: Callable[[Task], bool] = lambda task: True) -> Task | None:
        """The newest task that fits and that this person has not answered, or has taken back."""
        rows = self._rows(
            f"SELECT {_TASK} FROM tasks t WHERE annotator = ? AND NOT EXISTS"
            " (SELECT 1 FROM choices c WHERE c.task = t.id AND c.undone IS NULL)"
            " ORDER BY issued DESC, rowid DESC",
            annotator,
        )
        return next((task for task in (_task(*row) for row in rows) if fits(task)), None)

    def open_tasks(self, since: float) -> list[Task]:
        """Everybody's tasks that were shown after `since` (seconds since 1970) and have no answer."""
        rows = self._rows(
            f"SELECT {_TASK} FROM tasks t WHERE issued > ? AND NOT EXISTS"
            " (SELECT 1 FROM choices c WHERE c.task = t.id AND c.undone IS NULL)",
            since,
        )
        return [_task(*row) for row in rows]

    def task(self, id_: str) -> Task | None:
        rows = self._rows(f"SELECT {_TASK} FROM tasks t WHERE id = ?", id_)
        return _task(*rows[0]) if rows else None

    def was_answered(self, id_: str) -> bool:
        """Is there a choice of this task, one that was taken back included?"""
        return bool(self._rows("SELECT 1 FROM choices WHERE task = ? LIMIT 1", id_))

    def choose(self, task: Task, answer: dict[str, Any], made: float | None = None) -> bool:
        """Record an answer, given now or at `made`. False: the task has one that stands, e.g. a second click.

        Raises:
            DataError: the answer is not one for this task.
        """
        check_answer(task, answer)
        now = made if made is not None else time.time()
        with self._writing() as db:
            if db.execute("SELECT 1 FROM choices WHERE task = ? AND undone IS NULL", (task.id,)).fetchone():
                return False
            db.execute(
                "INSERT INTO choices (task, time, seconds, answer) VALUES (?, ?, ?, ?)",
                (task.id, now, max(now - task.issued, 0.0), _dump(answer)),
            )
        return True

    def undo(self, annotator: str, fits: Callable[[Task], bool] = lambda task: True) -> bool:
        """Take back the newest standing choice that fits and that this person made here. False: there is none.

        Its task is open again.
        """
        with self._writing() as db:
            rows = db.execute(
                f"SELECT {_TASK}, c.id FROM choices c JOIN tasks t ON t.id = c.task WHERE t.annotator = ?"
                " AND c.undone IS NULL AND t.policy != 'import' ORDER BY c.id DESC",
                (annotator,),
            )
            last = next(((task, row[-1]) for row in rows if fits(task := _task(*row[:-1]))), None)
            if last is None:
                return False
            task, choice = last
            db.execute("UPDATE choices SET undone = ? WHERE id = ?", (time.time(), choice))
            # What was shown meanwhile and not answered stays for later; the task taken back comes first.
            db.execute("UPDATE tasks SET issued = ? WHERE id = ?", (time.time(), task.id))
        return True

    def choices(self, annotator: str | None = None) -> list[Choice]:
        """Standing choices in the order in which they were made."""
        rows = self._rows(
            f"SELECT {_TASK}, c.answer, c.time, c.seconds FROM choices c JOIN tasks t ON t.id = c.task"
            " WHERE c.undone IS NULL AND (? IS NULL OR t.annotator = ?) ORDER BY c.id",
            annotator,
            annotator,
        )
        return [Choice(task=_task(*r[:9]), answer=json.loads(r[9]), time=r[10], seconds=r[11]) for r in rows]


_TASK = "t.id, t.annotator, t.item, t.kind, t.shown, t.repeat_of, t.policy, t.issued, t.extra"


def check_answer(task: Task, answer: dict[str, Any]) -> None:
    """Raises DataError unless `answer` has the shape that `Choice` describes for this task's kind."""
    if answer == {"skip": True}:
        return
    if task.kind == "pair":
        tie = answer in ({"tie": True}, {"tie": True, "both_bad": True})
        good = tie or (set(answer) == {"better", "worse"} and sorted(answer.values()) == sorted(task.shown))
    elif task.kind == "rank":
        order = answer.get("order")
        good = isinstance(order, list) and set(answer) == {"order"} and 0 < len(order) == len(set(order))
        good = good and set(order or ()) <= set(task.shown)
    else:
        good = set(answer) == {"right"} and isinstance(answer["right"], bool)
    if not good:
        raise DataError(f"not an answer to a {task.kind} task: {_dump(answer)[:200]}")


def item_of(messages: Sequence[Message], responses: Sequence[str]) -> Item:
    """Identical answers are one: nobody can choose between them."""
    texts = tuple(dict.fromkeys(responses))
    return Item(id=content_hash(list(messages), list(texts)), messages=tuple(messages), responses=texts)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))


def _item(id_: str, messages: str, responses: str) -> Item:
    return Item(id=id_, messages=tuple(json.loads(messages)), responses=tuple(json.loads(responses)))


def _task(
    id_: str,
    annotator: str,
    item: str,
    kind: Kind,
    shown: str,
    repeat_of: str | None,
    policy: str,
    issued: float,
    extra: str,
) -> Task:
    return Task(
        id=id_,
        annotator=annotator,
        item=item,
        kind=kind,
        shown=tuple(json.loads(shown)),
        repeat_of=repeat_of,
        policy=policy,
        issued=issued,
        extra=json.loads(extra),
    )
