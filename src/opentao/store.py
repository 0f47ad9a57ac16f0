"""A run directory: Parquet shards, JSON files and policies, each entered in an append-only manifest once it is whole.

What is written goes to a temporary name, is fsynced and renamed, and only then entered in `manifest.jsonl` with the
hash of its bytes and the *key* (the hash of everything it was made from). A reader trusts only the manifest, so a kill
at any moment leaves either the old state or the new one. Asking for a file under its key is how a stage resumes:
there already and made from the same inputs means reuse, anything else means make.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from opentao.errors import StoreError
from opentao.types import NAN, Failure, Group, Prompt, Response, Score

RESPONSE = pa.struct(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("tokens_R", pa.list_(pa.int32())),
        ("sampler_logprobs_R", pa.list_(pa.float32())),
        ("finish", pa.string()),
        ("strategy", pa.string()),
        ("seed", pa.int64()),
        ("policy", pa.string()),
    ]
)
PROMPTS = pa.schema([("id", pa.string()), ("messages", pa.string()), ("tools", pa.string()), ("meta", pa.string())])
GROUPS = pa.schema(
    [
        *PROMPTS,
        ("prompt_tokens_P", pa.list_(pa.int32())),
        ("responses", pa.list_(RESPONSE)),
        ("failure_kind", pa.string()),
        ("failure_message", pa.string()),
    ]
)
SCORES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("response_id", pa.string()),
        ("scorer", pa.string()),  # "reward" is the combined number
        ("value", pa.float64()),  # null = unscored
        ("error", pa.string()),
    ]
)
REWARD = "reward"


def file_hash(path: Path) -> str:
    """sha256 of a file, or of a folder's file names and contents."""
    if path.is_dir():
        parts = [f"{p.relative_to(path)} {file_hash(p)}" for p in sorted(path.rglob("*")) if p.is_file()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Run:
    """One run directory with one writer. Use as a context manager; `read_only` skips the lock.

    Raises:
        StoreError: another live process holds the lock, or a file of the manifest was changed or lost.
    """

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        self.root = Path(root)
        self.read_only = read_only
        self._entries: dict[str, dict[str, Any]] = {}
        self._verified: set[str] = set()
        self._lock = FileLock(self.root / "lock", blocking=False)

    def __enter__(self) -> Run:
        if self.read_only and not self.root.is_dir():
            raise StoreError(f"{self.root}: no such run directory")
        if not self.read_only:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock_or_refuse()
        try:
            if not self.read_only:
                self._own()
            self._read_manifest()
            if not self.read_only:
                self._restore()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self.read_only:
            self._lock.release()

    def _lock_or_refuse(self) -> None:
        """The kernel drops the lock of a dead process, so a stale lock needs no guess: whoever gets it is the owner."""
        owner = self.root / "owner.json"
        try:
            self._lock.acquire()
        except Timeout:
            who = owner.read_text().strip() if owner.exists() else "unknown"
            raise StoreError(f"{self.root}: in use by another process: {who}") from None

    def _own(self) -> None:
        (self.root / "owner.json").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
        for folder, folders, files in os.walk(self.root):  # what a killed owner was writing
            inside = Path(folder)
            folders[:] = [name for name in folders if not (inside / name / "manifest.jsonl").exists()]  # another run
            for name in [n for n in (*folders, *files) if n.startswith(".") and n.endswith(".part")]:
                _remove(inside / name)
            folders[:] = [name for name in folders if (inside / name).exists()]

    def _read_manifest(self) -> None:
        """Read whole lines; a half-written last line (a kill) is cut off."""
        path = self.root / "manifest.jsonl"
        if not path.exists():
            return
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data) and not self.read_only:
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._remember(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(f"{path}:{number}: not a manifest entry: {error}") from error

    def _restore(self) -> None:
        """A folder whose replacement was not entered before a kill is as it was."""
        for name in self._entries:
            if (old := _old(self.root / name)).exists():
                if not self.have(name):
                    _remove(self.root / name)
                    old.rename(self.root / name)
                _remove(old)

    def path(self, name: str) -> Path:
        return self.root / name

    def have(self, name: str, key: str | None = None) -> bool:
        """True if `name` is whole, unchanged on disk and (if given) was made from `key`."""
        entry = self._entries.get(name)
        if entry is None or (key is not None and entry["key"] != key):
            return False
        if name not in self._verified:
            path = self.root / name
            if not path.exists() or file_hash(path) != entry["sha256"]:
                return False
            self._verified.add(name)
        return True

    def key(self, name: str) -> str | None:
        """What `name` was made from; None if it is not there."""
        return self._entries[name]["key"] if self.have(name) else None

    def hash(self, name: str) -> str:
        """The hash of the bytes of a file that the manifest holds."""
        if not self.have(name):
            raise StoreError(f"{self.root / name}: missing, or changed since it was written")
        return str(self._entries[name]["sha256"])

    def names(self, prefix: str) -> list[str]:
        """Names in the manifest that start with `prefix`, sorted."""
        return sorted(name for name in self._entries if name.startswith(prefix))

    def commit(self, name: str, key: str, write: Callable[[Path], None]) -> Path:
        """Write a file or folder atomically and enter it in the manifest. `write` gets the temporary path."""
        final = self.root / name
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.part")
        _remove(temporary)
        try:
            with full_disk_as_os_error():
                write(temporary)
            for part in [*temporary.rglob("*"), temporary] if temporary.is_dir() else [temporary]:
                _fsync(part)
            digest = file_hash(temporary)
        except BaseException:
            _remove(temporary)
            raise
        old = _old(final)
        if final.is_dir():  # which no rename replaces: until the new one is entered, the old one can be had again
            _remove(old)  # of one that was never entered
            final.rename(old)
        temporary.rename(final)
        _fsync(final.parent)
        self._enter({"path": name, "key": key, "sha256": digest})
        _remove(old)
        self._verified.add(name)
        return final

    def discard(self, name: str) -> None:
        """Delete a file or folder that is no longer needed; the manifest forgets it first (a kill may come between)."""
        if name in self._entries:
            self._enter({"path": name, "key": None, "sha256": None})
        _remove(self.root / name)

    def _enter(self, entry: dict[str, Any]) -> None:
        with (self.root / "manifest.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._remember(entry)

    def _remember(self, entry: dict[str, Any]) -> None:
        """The last entry of a path counts; one without a hash says that the file was discarded."""
        known = {name: entry[name] for name in ("path", "key", "sha256")}
        if known["sha256"] is None:
            self._entries.pop(known["path"], None)
        else:
            self._entries[known["path"]] = known

    def write_json(self, name: str, key: str, value: Any) -> Path:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        return self.commit(name, key, lambda path: _ignore(path.write_text(text, encoding="utf-8")))

    def read_json(self, name: str) -> Any:
        self.hash(name)
        return json.loads((self.root / name).read_text(encoding="utf-8"))

    def write_table(self, name: str, key: str, table: pa.Table) -> Path:
        return self.commit(name, key, lambda path: pq.write_table(table, path, compression="zstd"))

    def read_table(self, name: str) -> pa.Table:
        self.hash(name)
        return pq.read_table(self.root / name)


def _ignore(_: object) -> None:
    return None


@contextmanager
def full_disk_as_os_error() -> Iterator[None]:
    """safetensors reports a full disk as an error of its own kind."""
    try:
        yield
    except SafetensorError as error:
        full = next((n for n in (errno.ENOSPC, errno.EDQUOT) if f"(os error {n})" in str(error)), None)
        if full is None:
            raise
        raise OSError(full, os.strerror(full)) from error


def _old(path: Path) -> Path:
    """Where a folder waits until what replaces it is entered."""
    return path.with_name(f".{path.name}.old")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all. OSError names `path`."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        _fsync(part)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    part.replace(path)


def _prompt_row(prompt: Prompt) -> dict[str, Any]:
    # keys as they came: a chat template writes a tool's schema in the order of its keys
    as_json = {k: json.dumps(v, ensure_ascii=False) for k, v in asdict(prompt).items()}
    return {"id": prompt.id, **as_json}


def _row_prompt(row: dict[str, Any]) -> Prompt:
    return Prompt(
        messages=tuple(json.loads(row["messages"])),
        tools=tuple(json.loads(row["tools"])),
        meta=json.loads(row["meta"]),
    )


def prompts_to_table(prompts: Iterable[Prompt]) -> pa.Table:
    return pa.Table.from_pylist([_prompt_row(p) for p in prompts], schema=PROMPTS)


def table_to_prompts(table: pa.Table) -> list[Prompt]:
    return [_row_prompt(row) for row in table.to_pylist()]


def groups_to_table(groups: Iterable[Group]) -> pa.Table:
    """One row a group; scores live elsewhere, so that re-scoring never touches responses."""
    rows = [
        _prompt_row(g.prompt)
        | {
            "prompt_tokens_P": list(g.prompt_tokens_P),
            "responses": [asdict(r) for r in g.responses],
            "failure_kind": g.failure.kind if g.failure else None,
            "failure_message": g.failure.message if g.failure else None,
        }
        for g in groups
    ]
    return pa.Table.from_pylist(rows, schema=GROUPS)


def table_to_groups(table: pa.Table) -> list[Group]:
    return [_row_group(row) for row in table.to_pylist()]


def _row_group(row: dict[str, Any]) -> Group:
    kind = row["failure_kind"]
    return Group(
        prompt=_row_prompt(row),
        prompt_tokens_P=tuple(row["prompt_tokens_P"]),
        responses=tuple(
            Response(**(r | {k: tuple(r[k]) for k in ("tokens_R", "sampler_logprobs_R")})) for r in row["responses"]
        ),
        failure=Failure(kind=kind, message=row["failure_message"]) if kind else None,
    )


def scores_to_table(groups: Iterable[Group]) -> pa.Table:
    """One row a (response, scorer), plus the combined one under the name "reward"."""
    rows = []
    for group in groups:
        rewards = tuple(Score(value=r) for r in group.rewards_N)
        for scorer, scores in (*group.scores.items(), (REWARD, rewards)):
            for response, score in zip(group.responses, scores, strict=True):
                value = None if math.isnan(score.value) else score.value
                rows.append(
                    {
                        "prompt_id": group.prompt.id,
                        "response_id": response.id,
                        "scorer": scorer,
                        "value": value,
                        "error": score.error,
                    }
                )
    return pa.Table.from_pylist(rows, schema=SCORES)


def attach_scores(groups: Sequence[Group], table: pa.Table) -> list[Group]:
    """Join scores to their groups by response id. A response without a row is unscored."""
    by_response: dict[str, dict[str, Score]] = {}
    scorers: dict[str, None] = {}
    for row in table.to_pylist():
        scorers.setdefault(row["scorer"])
        score = Score(value=NAN if row["value"] is None else row["value"], error=row["error"])
        by_response.setdefault(row["response_id"], {})[row["scorer"]] = score
    missing = Score(value=NAN, error="missing: no row")
    joined = []
    for group in groups:
        found = [by_response.get(r.id, {}) for r in group.responses]
        scores = {name: tuple(f.get(name, missing) for f in found) for name in scorers}
        rewards = scores.pop(REWARD, (missing,) * len(found))
        joined.append(group.with_scores(scores, [r.value for r in rewards]))
    return joined
