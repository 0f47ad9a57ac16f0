"""Spider's questions as prompts, its databases as SQLite files: python examples/text_to_sql/prepare.py --out DIR

The slice: questions of at most eight words that name exactly one table of their database (singular or plural, words in
order). It is chosen by question and schema alone, never by the gold query, which nothing but the audit reads. The
prompt is that table's CREATE TABLE and the question.

Databases are dealt to two sides by the hash of their name: three in ten give prompts for preferences, the others
prompts for the run, of which `prompts.split_by: db_id` holds whole databases out. Written to DIR: `databases/`,
`prompts.jsonl`, `preference_prompts.jsonl`, and this recipe's own files.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shutil
import sqlite3
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sources import SPIDER_FILES as FILES
from sources import SourceError, arguments, find, members

HERE = Path(__file__).resolve().parent
PREFERENCE_SHARE = 0.3
LONGEST = 8  # words of a question: a short one asks for one thing
ASK = "{table}\n\n-- Write a SQL query for: {question}\nAnswer with one SELECT statement only."
FOREIGN = re.compile(r"^\s*(FOREIGN KEY|CONSTRAINT|UNIQUE|INDEX|KEY|PRIMARY KEY)\b", re.IGNORECASE)
Files = dict[str, str]  # "schema.sql" and "data/TABLE.csv" -> text


def read_databases(archive: Path) -> dict[str, Files]:
    found: dict[str, Files] = defaultdict(dict)
    for name, content in members(archive, FILES):
        database, _, file = name.partition("/")
        found[database][file] = content.decode("utf-8")
    return dict(found)


def build(files: Files, name: str, path: Path) -> None:
    """One SQLite file. The schemas are MySQL's: database prefixes and INDEX lines go. Empty or NULL where a column may
    be null is null."""
    schema = files["schema.sql"].replace(f"`{name}`.", "")
    schema = re.sub(r",\n\s*INDEX [^\n]*?(?=,?\n)", "", schema)
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path)
    with connection:
        connection.executescript(schema)
        for file, text in sorted(files.items()):
            if file.startswith("data/"):
                _fill(connection, Path(file).stem, text)
    connection.execute("vacuum")
    connection.close()


def _fill(connection: sqlite3.Connection, table: str, text: str) -> None:
    rows = csv.reader(io.StringIO(text, newline=""))
    columns = next(rows)
    needed = {c[1] for c in connection.execute(f"pragma table_info(`{table}`)") if c[3]}
    values = (
        [None if v == "NULL" or (v == "" and c not in needed) else v for c, v in zip(columns, row, strict=True)]
        for row in rows
    )
    names, marks = ", ".join(f"`{c}`" for c in columns), ", ".join("?" * len(columns))
    connection.executemany(f"insert into `{table}` ({names}) values ({marks})", values)


def tables_of(name: str, schema: str) -> dict[str, str]:
    """Table -> its CREATE TABLE with columns and types only, as a person would write it."""
    found = {}
    for table, body in re.findall(rf"CREATE TABLE `{name}`\.`(\w+)` \(\n(.*?)\n\);", schema, re.DOTALL):
        lines = [line.strip().rstrip(",").replace("`", "") for line in body.split("\n") if not FOREIGN.match(line)]
        found[table] = f"CREATE TABLE {table} (\n  " + ",\n  ".join(lines) + "\n);"
    return found


def words(text: str) -> list[str]:
    """Lower case, split at underscores and capitals, without the s of a plural: "Ref_DocumentTypes" -> ref document
    type."""
    parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", text)
    return [_singular(p.lower()) for p in parts]


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word


def named_table(question: str, tables: list[str]) -> str | None:
    """The only table that the question names; None if it names none or several."""
    said = words(question)
    runs = {tuple(said[i:j]) for i in range(len(said)) for j in range(i + 1, len(said) + 1)}
    named = [t for t in tables if tuple(words(t)) in runs]
    return named[0] if len(named) == 1 else None


def for_preferences(database: str) -> bool:
    return hashlib.sha256(database.encode()).digest()[0] < 256 * PREFERENCE_SHARE


def rows_of(path: Path, databases: dict[str, Files]) -> list[dict[str, str]]:
    """The slice, each question once."""
    schemas = {name: tables_of(name, files["schema.sql"]) for name, files in databases.items()}
    rows = {}
    for entry in json.loads(path.read_text(encoding="utf-8")):
        tables = schemas.get(entry["db_id"], {})
        question = " ".join(entry["SpiderQuestion"].split())
        if len(question.split()) > LONGEST:
            continue
        if (table := named_table(question, list(tables))) is not None:
            prompt = ASK.format(table=tables[table], question=question)
            rows[prompt] = {"prompt": prompt, "db_id": entry["db_id"], "gold": entry["query"]}
    return list(rows.values())


def main() -> None:
    given = arguments(__doc__).parse_args()
    try:
        questions, archive = find("spider", given.data)
    except SourceError as error:
        sys.exit(str(error))
    databases = read_databases(archive)
    folder = given.out / "databases"
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows_of(questions, databases)
    for name in sorted({row["db_id"] for row in rows}):
        build(databases[name], name, folder / f"{name}.sqlite")
    sides = {"prompts": False, "preference_prompts": True}
    for file, wanted in sides.items():
        own = [row for row in rows if for_preferences(row["db_id"]) == wanted]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own)
        (given.out / f"{file}.jsonl").write_text(text, encoding="utf-8")
        print(f"{file}.jsonl: {len(own)} questions on {len({row['db_id'] for row in own})} databases")
    for path in (*HERE.glob("*.yaml"), HERE / "queries.py"):
        shutil.copy(path, given.out / path.name)


if __name__ == "__main__":
    main()
