"""The recipes' own code: data is fetched and checked, prompts hold no labels, checks and audits judge as they say.

No file of the real data is needed; what is fetched comes from a server on loopback.
"""

from __future__ import annotations

import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import sqlite3
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from opentao.config import load_config
from opentao.preferences import read_preferences
from opentao.scorers.registry import build_scorer
from opentao.scorers.run import run_scorer
from opentao.types import Group, Prompt

EXAMPLES = Path(__file__).parent.parent / "examples"
RECIPES = ("document_qa", "instruction_following", "text_to_sql")


def script(path: str) -> Any:
    """A file of the examples as a module."""
    name = "recipe_" + path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        sys.path[:0] = [str(EXAMPLES), str((EXAMPLES / path).parent)]
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
        del sys.path[:2]
    return sys.modules[name]


@pytest.fixture(scope="module")
def sources() -> Any:
    return script("sources.py")


@pytest.fixture(scope="module")
def prepare() -> Any:
    return script("text_to_sql/prepare.py")


@pytest.fixture(scope="module")
def constraints() -> Any:
    return script("instruction_following/constraints.py")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_config_loads(path: Path) -> None:
    assert load_config(path).scorers


class TestSources:
    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[tuple[str, Path]]:
        """A server on loopback in place of GitHub, and the folder it serves."""
        served = tmp_path / "served"
        served.mkdir()
        handler = partial(Quiet, directory=str(served))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
            thread = threading.Thread(target=running.serve_forever, daemon=True)
            thread.start()
            yield f"http://127.0.0.1:{running.server_port}", served
            running.shutdown()
            thread.join()

    def put(self, folder: Path, source: Any, content: bytes) -> None:
        path = folder / source.url("", "").lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def test_a_file_is_fetched_once_and_checked(
        self, sources: Any, server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url, served = server
        good = self.source(sources, sha256=hashlib.sha256(b"content").hexdigest())
        monkeypatch.setitem(sources.SOURCES, "own", (good,))
        self.put(served, good, b"content")
        [path] = sources.find("own", tmp_path / "data", raw=url, archive=url)
        assert path.read_bytes() == b"content"
        self.put(served, good, b"changed")
        assert sources.find("own", tmp_path / "data", raw=url, archive=url) == [path]
        path.write_bytes(b"changed")
        with pytest.raises(sources.SourceError, match=r"own\.json: sha256 .*, expected .*; delete it"):
            sources.find("own", tmp_path / "data", raw=url, archive=url)

    def test_a_packed_file_counts_by_its_content(
        self, sources: Any, server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is plain at its source and kept as .gz."""
        own = self.source(sources, sha256=hashlib.sha256(b"[1, 2]").hexdigest(), file="own.json.gz")
        monkeypatch.setitem(sources.SOURCES, "own", (own,))
        self.put(server[1], own, b"[1, 2]")
        [path] = sources.find("own", tmp_path / "data", raw=server[0], archive=server[0])
        assert gzip.decompress(path.read_bytes()) == b"[1, 2]"
        path.write_bytes(gzip.compress(b"[1, 3]"))
        with pytest.raises(sources.SourceError, match="sha256"):
            sources.find("own", tmp_path / "data", raw=server[0], archive=server[0])

    def test_what_cannot_be_fetched_leaves_nothing(
        self, sources: Any, server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sources.SOURCES, "own", (self.source(sources, sha256="0"),))
        with pytest.raises(sources.SourceError, match=r"404.*put the file at .*own\.json yourself"):
            sources.find("own", tmp_path / "data", raw=server[0], archive=server[0])
        assert [p for p in (tmp_path / "data").rglob("*") if p.is_file()] == []

    def test_an_archive_counts_by_its_content(
        self, sources: Any, server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Packed in another order, with other files beside: the same. Other content of a file that counts: not."""
        url, served = server
        files = {"top/a/schema.sql": b"create", "top/a/data/t.csv": b"x\n1\n"}
        archives = {
            "first": pack(files),
            "again": pack({"README": b"new", **dict(reversed(files.items()))}),
            "other": pack(files | {"top/a/data/t.csv": b"x\n2\n"}),
        }
        own = {"path": "", "file": "own.tar.gz", "used": sources.SPIDER_FILES}
        path = tmp_path / "first.tar.gz"
        path.write_bytes(archives["first"])
        right = self.source(sources, sha256="?", **own).hash_of(path)
        monkeypatch.setitem(sources.SOURCES, "own", (self.source(sources, sha256=right, **own),))
        for name, archive in archives.items():
            self.put(served, sources.SOURCES["own"][0], archive)
            find = partial(sources.find, "own", tmp_path / name, raw=url, archive=url)
            if name == "other":
                with pytest.raises(sources.SourceError, match="sha256"):
                    find()
            else:
                find()

    def source(self, sources: Any, **changes: str) -> Any:
        return sources.Source(**{"file": "own.json", "repository": "o/r", "commit": "c0", "path": "own.json"} | changes)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


def pack(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


SCHEMA = """-- Dialect: mysql
CREATE TABLE `zoo`.`Animal_Types` (
    `id` INT,
    `Type_Name` TEXT NOT NULL,
    PRIMARY KEY (`id`)
);

CREATE TABLE `zoo`.`keeper` (
    `id` INT,
    `Name` TEXT,
    `type` INT,
    PRIMARY KEY (`id`),
    FOREIGN KEY (`type`) REFERENCES `zoo`.`Animal_Types` (`id`),
    INDEX `by_type` (`type`)
);
"""


class TestTextToSql:
    def test_a_database_is_built(self, prepare: Any, tmp_path: Path) -> None:
        files = {
            "schema.sql": SCHEMA,
            "data/Animal_Types.csv": "id,Type_Name\n1,ape\n2,\n",
            "data/keeper.csv": "id,Name,type\n1,Ann,NULL\n2,,1\n",
        }
        prepare.build(files, "zoo", tmp_path / "zoo.sqlite")
        with sqlite3.connect(tmp_path / "zoo.sqlite") as connection:
            assert connection.execute("select * from Animal_Types").fetchall() == [(1, "ape"), (2, "")]
            assert connection.execute("select * from keeper").fetchall() == [(1, "Ann", None), (2, None, 1)]

    def test_the_prompt_shows_columns_and_types(self, prepare: Any) -> None:
        tables = prepare.tables_of("zoo", SCHEMA)
        assert list(tables) == ["Animal_Types", "keeper"]
        assert tables["keeper"] == "CREATE TABLE keeper (\n  id INT,\n  Name TEXT,\n  type INT\n);"

    @pytest.mark.parametrize(
        ("question", "table"),
        [
            ("How many keepers are there?", "keeper"),
            ("List all animal types.", "Animal_Types"),
            ("What is the animal type that most keepers like?", None),
            ("How many animals of each type?", None),
            ("Who is there?", None),
        ],
    )
    def test_the_slice_goes_by_the_question_alone(self, prepare: Any, question: str, table: str | None) -> None:
        assert prepare.named_table(question, ["Animal_Types", "keeper"]) == table

    def test_rows(self, prepare: Any, tmp_path: Path) -> None:
        path = tmp_path / "q.json"
        long = "How many keepers of the zoo are older than forty?"
        known = [("zoo", "How many keepers?"), ("zoo", "How many  keepers?"), ("zoo", long)]
        asked = [*known, ("zoo", "Who?"), ("other", "Keepers?")]
        path.write_text(json.dumps([{"db_id": d, "SpiderQuestion": q, "query": "select 1"} for d, q in asked]))
        [row] = prepare.rows_of(path, {"zoo": {"schema.sql": SCHEMA}})
        end = ");\n\n-- Write a SQL query for: How many keepers?\nAnswer with one SELECT statement only."
        assert row["prompt"].endswith(end)
        assert (row["db_id"], row["gold"]) == ("zoo", "select 1")

    def test_a_query_near_the_known_one_is_preferred(self) -> None:
        alike = script("text_to_sql/queries.py").alike
        prompt = Prompt.from_text("Names?", gold="SELECT name FROM keeper")
        assert alike(prompt, "```sql\nselect name from keeper;\n```") == 1.0
        assert 1.0 > alike(prompt, "SELECT name, age FROM keeper") > alike(prompt, "SELECT * FROM zoo") > 0.0
        assert alike(prompt, "") == 0.0


class TestLinked:
    SCHEMA = "CREATE TABLE zoo (\n  zoo_id INTEGER,\n  Opening_Year INT,\n  city TEXT\n);\n\n-- Write a SQL query for: "

    def linked(self, question: str, query: str) -> float:
        rule = script("text_to_sql/queries.py").linked
        return float(rule(Prompt.from_text(f"{self.SCHEMA}{question}\nAnswer with one statement."), query))

    def test_what_the_question_names_and_nothing_else(self) -> None:
        assert self.linked("What are the cities?", "SELECT city FROM zoo") == 1.0
        assert self.linked("What are the cities?", "SELECT city, opening_year FROM zoo") == pytest.approx(5 / 6)
        assert self.linked("How many zoos are there?", "SELECT count(*) FROM zoo") == 1.0
        assert self.linked("Opening years in Bonn?", "SELECT Opening_Year FROM zoo WHERE city = 'Bonn'") < 1.0

    def test_values_come_from_the_question(self) -> None:
        good, bad = "SELECT city FROM zoo LIMIT 1", "SELECT city FROM zoo WHERE 1 = 1"
        assert self.linked("Which city?", good) == 1.0
        assert self.linked("Which city?", bad) == 0.5

    def test_no_select_is_nothing(self) -> None:
        assert self.linked("Which city?", "CREATE TABLE zoo (city TEXT)") == self.linked("Which city?", "") == 0.0


CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"type": "no_comma"}, "none here", "one, here"),
    ({"type": "number_words", "relation": "at least", "num_words": 3}, "it's one-word too", "two words"),
    ({"type": "number_words", "relation": "less than", "num_words": 3}, "two words", "now three words"),
    ({"type": "number_sentences", "relation": "at least", "num_sentences": 2}, "One. Two!", "Version 1.2 only."),
    ({"type": "number_sentences", "relation": "less than", "num_sentences": 2}, "One...", "One? Two"),
    ({"type": "forbidden_words", "forbidden_words": ["cat"]}, "concatenate", "a Cat."),
    ({"type": "existence", "keywords": ["ice cream", "sun"]}, "Sun and ICE cream", "sunny ice cream"),
    ({"type": "frequency", "keyword": "at", "frequency": 2, "relation": "at least"}, "At it, at", "at cat"),
    ({"type": "frequency", "keyword": "at", "frequency": 2, "relation": "less than"}, "at cat", "at at"),
    ({"type": "letter_frequency", "letter": "q", "let_frequency": 2, "let_relation": "at least"}, "Qq", "q"),
    ({"type": "number_highlighted_sections", "num_highlights": 2}, "*one* and **two**", "*one* and * *"),
    ({"type": "number_bullet_lists", "num_bullets": 2}, "* a\n  - b", "* a\n* b\n* c"),
    ({"type": "number_placeholders", "num_placeholders": 2}, "[name], [age]", "[name] []"),
    ({"type": "number_paragraphs", "num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    (
        {"type": "multiple_sections", "section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1 a SECTION 2",
        "SECTION",
    ),
    ({"type": "postscript", "postscript_marker": "P.P.S"}, "x\nP.P.S. more", "x P.P.S more"),
    ({"type": "postscript", "postscript_marker": "P.S."}, "x\n\nPS: more", "x\nP.T."),
    ({"type": "title"}, "<<A title>> b", "<< >> b"),
    ({"type": "quotation"}, '"all of it"', '"a part" of it'),
    ({"type": "english_lowercase"}, "all low 1", "One"),
    ({"type": "english_capital"}, "ALL 1", "ONe"),
    ({"type": "capital_word_frequency", "capital_frequency": 2, "capital_relation": "at least"}, "NASA FBI", "NASA A"),
    ({"type": "json_format"}, '```json\n{"a": 1}\n```', '{"a": 1'),
    ({"type": "end_checker", "end_phrase": "The End."}, 'so. the end."', "The End. No"),
]


class TestInstructionFollowing:
    @pytest.mark.parametrize(("constraint", "right", "wrong"), CASES, ids=lambda v: str(v)[:40])
    def test_every_type(self, constraints: Any, constraint: dict[str, Any], right: str, wrong: str) -> None:
        assert constraints.follows(constraint, right)
        assert not constraints.follows(constraint, wrong)

    def test_all_types_have_cases_and_no_type_is_on_both_sides(self, constraints: Any) -> None:
        assert {c["type"] for c, _, _ in CASES} == set(constraints.CHECKS)
        assert not set(constraints.TRAINED) & set(constraints.UNSEEN)

    def test_doing_nothing_follows_nothing(self, constraints: Any) -> None:
        prompt = Prompt.from_text("x", constraints=[{"type": "no_comma"}], unseen=[])
        assert constraints.followed(prompt, "short") == 0.0
        assert constraints.followed(prompt, "the same again " * 20) == 0.0
        different = "every word of this long enough sentence stands in it for the first and only time so."
        assert constraints.followed(prompt, different.removesuffix(".")) == 0.0  # it breaks off
        assert constraints.followed(prompt, different) == 1.0
        assert constraints.followed_unseen(prompt, different) is None

    def test_composed_prompts(self, constraints: Any) -> None:
        prepare = script("instruction_following/prepare.py")
        files = prepare.composed()
        assert {c["type"] for row in files["prompts"] for c in row["constraints"]} == set(constraints.TRAINED)
        assert {c["type"] for row in files["heldout"] for c in row.get("unseen", [])} == set(constraints.UNSEEN)
        assert not any(row["constraints"] for row in files["heldout"] if row.get("unseen"))
        assert files == prepare.composed()

    def test_topics_and_prompts_are_on_one_side(self) -> None:
        prepare = script("instruction_following/prepare.py")
        topics = prepare.compose.TOPICS
        files = prepare.composed()
        told = {file: {t for t in topics for r in rows if f" {t}" in r["prompt"]} for file, rows in files.items()}
        assert len(told["prompts"]) + len(told["heldout"]) == len(topics)
        prompts = [row["prompt"] for rows in files.values() for row in rows]
        assert len(set(prompts)) == len(prompts) == prepare.NUM_PROMPTS + prepare.NUM_HELDOUT + prepare.NUM_UNSEEN

    def test_the_prompt_says_what_is_checked(self) -> None:
        for row in script("instruction_following/prepare.py").composed()["prompts"]:
            for constraint in row["constraints"]:
                told = [value for name, value in constraint.items() if name != "type"]
                values = [v for value in told for v in (value if isinstance(value, list) else [value])]
                assert all(str(value) in row["prompt"] for value in values), row

    def test_prompts_of_ifeval(self) -> None:
        row_of = script("instruction_following/prepare.py").ifeval_row
        entry = {"prompt": "p", "instruction_id_list": ["punctuation:no_comma", "x:title"], "kwargs": [{}, {}]}
        row = row_of(entry)
        assert (row["constraints"], row["unseen"]) == ([{"type": "no_comma"}], [{"type": "title"}])
        assert row_of(entry | {"instruction_id_list": ["punctuation:no_comma", "x:sing"]}) is None
        long = [{}, {"relation": "at least", "num_words": 600}]
        ids = ["punctuation:no_comma", "x:number_words"]
        assert row_of(entry | {"instruction_id_list": ids, "kwargs": long}) is None


class TestDocumentQa:
    def test_audit(self) -> None:
        answers = script("document_qa/answers.py")
        prompt = Prompt.from_text("q", answers=["the river Rhine", "Rhine"])
        assert answers.f1(prompt, 'Answer: Rhine\nQuote: "The Rhine flows."') == 1.0
        assert answers.exact(prompt, 'the Rhine. "The Rhine flows."') == 1.0
        assert answers.f1(prompt, "The Danube") == 0.0
        assert answers.f1(prompt, "") == 0.0
        assert answers.exact(prompt, "") == 0.0
        assert answers.f1(Prompt.from_text("q"), "Rhine") is None

    def test_grounded(self) -> None:
        grounded = script("document_qa/answers.py").grounded
        passage, question = "The bridge opened in 1994, on the Rhine.", "When did the bridge open?"
        prompt = Prompt.from_text(f"In few words.\n\nPassage: {passage}\n\nQuestion: {question}", passage=passage)
        assert grounded(prompt, 'In 1994. "The bridge opened in 1994"') == 1.0
        assert grounded(prompt, "1994 or 1995") == 0.5
        assert grounded(prompt, "the bridge") == 0.0
        assert grounded(prompt, "few words") == 0.0  # of the instruction
        assert grounded(prompt, "in it") == 0.0  # of every passage
        assert grounded(prompt, "") == 0.0
        assert grounded(prompt, "opened " * 30) == 0.0

    def test_no_answer_to_all_questions_is_paid_for(self, tmp_path: Path) -> None:
        """What stands in every prompt, or in the question, is neither a quotation nor few words of the passage."""
        prepare, answers = script("document_qa/prepare.py"), script("document_qa/answers.py")
        config = load_config(EXAMPLES / "document_qa" / "tao.yaml")
        citation = build_scorer(next(s for s in config.scorers if s.type == "citation"))
        row = prepare.asked("The bridge opened in 1994.", "When did the bridge open?", "d")
        prompt = Prompt.from_text(row["prompt"], passage=row["passage"])
        texts = [row["prompt"], 'few words. "quote the sentence of the passage"', 'in. "When did the bridge open?"']
        scored = run_scorer(citation, Group.of_texts(prompt, [*texts, '1994. "The bridge opened in 1994."']))
        assert [s.value for s in scored] == [0.0, 0.0, 0.0, 1.0]
        assert [answers.grounded(prompt, text) for text in texts] == [0.0, 0.0, 0.0]

    def test_only_held_out_questions_carry_answers(self, tmp_path: Path) -> None:
        prepare = script("document_qa/prepare.py")
        paragraphs = [
            {"context": f"Passage {i}.", "qas": [{"question": "Which?", "answers": [{"text": str(i)}]}]}
            for i in range(40)
        ]
        path = tmp_path / "x.json"
        path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
        train, heldout = prepare.questions(path)
        assert len(train) + len(heldout) == 40
        assert 2 <= len(heldout) <= 20
        assert all("answers" in row for row in heldout)
        assert not any("answers" in row for row in train)
        assert not {r["document"] for r in train} & {r["document"] for r in heldout}
        assert all(row["passage"] in row["prompt"].partition("Question:")[0] for row in [*train, *heldout])

    def test_people_rank_answers(self, tmp_path: Path) -> None:
        prepare = script("document_qa/prepare.py")
        entry = {
            "question": "Who?",
            "passages": [["Title", "One.", "Two."]],
            "preference": [1, 1, 0, 2, 2, 1],  # 1 > 2, 1 > 3, 1 = 4, 3 > 2, 4 > 2, 3 > 4
        } | {f"prediction {i}": f"answer {i}" for i in range(1, 5)}
        path = tmp_path / "f.json"
        path.write_text(json.dumps([entry]))
        [row] = prepare.preferences(path)
        assert dict(zip(row["responses"], row["ranks"], strict=True)) == {
            "answer 1": 1,
            "answer 2": 4,
            "answer 3": 2,
            "answer 4": 3,
        }
        out = tmp_path / "p.jsonl"
        out.write_text(json.dumps(row) + "\n")
        [ranking] = read_preferences(out).rankings
        assert len(ranking.pairs) == 6


class TestPreferences:
    def group(self, rewards: list[float]) -> Group:
        group = Group.of_texts(Prompt.from_text("p"), [f"answer {i}" for i in range(len(rewards))])
        return group.with_scores({}, rewards)

    def test_levels_are_covered(self) -> None:
        ranking = script("preferences.py").ranking(self.group([0.0] * 8 + [0.5, 1.0]))
        assert len(ranking.texts) == 4
        assert {"answer 8", "answer 9"} <= set(ranking.texts)
        assert sorted(ranking.ranks) == [1.0, 2.0, 3.0, 3.0]

    def test_many_levels_are_covered_from_best_to_worst(self) -> None:
        ranking = script("preferences.py").ranking(self.group([i / 10 for i in range(10)]))
        assert dict(zip(ranking.texts, ranking.ranks, strict=True)) == {
            "answer 9": 1.0,
            "answer 6": 2.0,
            "answer 3": 3.0,
            "answer 0": 4.0,
        }

    def test_nothing_to_choose(self) -> None:
        ranking = script("preferences.py").ranking
        assert ranking(self.group([0.5] * 4)) is None
        assert ranking(self.group([float("nan"), 0.5])) is None
