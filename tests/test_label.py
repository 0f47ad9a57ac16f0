"""`tao label` as it runs: a server on loopback that is asked well and badly, and killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from opentao.cli import app
from opentao.web.choices import Choices

TASK = re.compile(r'name="task" value="([^"]+)"')


def write_rows(path: Path, number: int = 6, answers: int = 2) -> Path:
    rows = [{"prompt": f"prompt {i}", "responses": [f"answer {i}.{j}" for j in range(answers)]} for i in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextmanager
def serving(source: Path, *args: str) -> Iterator[tuple[dict[str, str], subprocess.Popen[str]]]:
    """`tao label start` in a process of its own; yields annotator -> link, and the process."""
    command = [sys.executable, "-m", "opentao", "label", "start", str(source), "--port", "0", *args]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a script's background hands down "ignore SIGINT"
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, preexec_fn=hear, **output)  # type: ignore[call-overload]
    assert process.stdout is not None
    links, lines = {}, []
    for line in process.stdout:
        lines.append(line)
        if found := re.match(r"(\S+): (http://\S+token=\S+)$", line):
            links[found[1]] = found[2]
        if line.startswith("stop with Ctrl-C"):
            break
    assert links, "".join(lines)
    process.said = lines  # type: ignore[attr-defined]
    try:
        yield links, process
    finally:
        process.kill()
        process.wait()


@contextmanager
def person(link: str) -> Iterator[httpx.Client]:
    base = link.partition("/?")[0]
    with httpx.Client(base_url=base, follow_redirects=True, trust_env=False) as client:
        client.get(link)
        yield client


def task_of(page: str) -> str:
    found = TASK.search(page)
    assert found is not None, page
    return found[1]


def test_nobody_sees_anything_without_a_token(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl")
    with serving(source, "--db", str(tmp_path / "c.sqlite"), "--annotator", "ann") as (links, _):
        base, token = links["ann"].split("/?token=")
        with httpx.Client(base_url=base, trust_env=False) as stranger:
            for path in ("/", "/?token=", "/?token=wrong"):
                reply = stranger.get(path)
                assert reply.status_code == 403 and "answer" not in reply.text
            assert stranger.post("/choose", data={"task": "x", "answer": "first"}).status_code == 403
            assert stranger.post("/undo").status_code == 403
            assert stranger.get("/docs").status_code == stranger.get("/openapi.json").status_code == 404
            for name in ("label.html.j2", "../cli.py", "tao.yaml"):
                assert stranger.get(f"/static/{name}").status_code == 404
            # A page elsewhere that has its own name lead to this machine is refused.
            assert stranger.get("/", headers={"host": "evil.example"}).status_code == 400
            reply = stranger.get(f"/?token={token}")
            assert reply.status_code == 303
            cookie = reply.headers["set-cookie"].lower()
            assert "httponly" in cookie and "samesite=lax" in cookie


def test_headers_on_every_answer(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl")
    with (
        serving(source, "--db", str(tmp_path / "c.sqlite"), "--annotator", "ann") as (links, _),
        person(links["ann"]) as ann,
    ):
        for path in ("/", "/static/label.js", "/static/label.css", "/nowhere"):
            headers = ann.get(path).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
            assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


def test_a_session_with_two_people(tmp_path: Path) -> None:
    source, db = write_rows(tmp_path / "rows.jsonl"), tmp_path / "c.sqlite"
    options = ["--db", str(db), "--annotator", "ann", "--annotator", "bo", "--overlap", "1", "--repeats", "0"]
    with serving(source, *options) as (links, _), person(links["ann"]) as ann, person(links["bo"]) as bo:
        page = ann.get("/").text
        task = task_of(page)
        assert task_of(ann.get("/").text) == task  # a reload shows the same
        assert bo.post("/choose", data={"task": task, "answer": "first"}).status_code == 403  # not yours
        assert ann.post("/choose", data={"task": task, "answer": "best"}).status_code == 422
        assert ann.post("/choose", data={"task": task, "answer": "0,1"}).status_code == 422
        for _ in range(2):  # pressed twice: one answer
            page = ann.post("/choose", data={"task": task, "answer": "first"}).text
        assert '<b id="done">1</b> of 6' in page
        page = ann.post("/undo").text
        assert task_of(page) == task and '<b id="done">0</b> of 6' in page
        for answer in ("first", "second", "tie", "both bad", "skip", "first"):
            page = ann.post("/choose", data={"task": task_of(page), "answer": answer}).text
        assert "All done" in page and "1 skipped" in page
        for _ in range(6):
            page = bo.post("/choose", data={"task": task_of(bo.get("/").text), "answer": "first"}).text
        assert "5 shared" in page and "you and others" in page
    made = Choices(db).choices("ann")
    assert [c.task.shown for c in made if "better" in c.answer] != []
    assert all(c.answer["better"] == c.task.shown[0] for c in made[:1])


@pytest.mark.parametrize(("kind", "answers"), [("rank", ["2,0", "0"]), ("mark", ["right", "wrong"])])
def test_the_other_kinds(tmp_path: Path, kind: str, answers: list[str]) -> None:
    source, db = write_rows(tmp_path / "rows.jsonl", 2, 3), tmp_path / "c.sqlite"
    options = ["--db", str(db), "--annotator", "ann", "--kind", kind, "--repeats", "0"]
    with serving(source, *options) as (links, _), person(links["ann"]) as ann:
        for answer in answers:
            page = ann.get("/").text
            assert f'data-kind="{kind}"' in page
            assert ann.post("/choose", data={"task": task_of(page), "answer": "first"}).status_code == 422
            assert ann.post("/choose", data={"task": task_of(page), "answer": answer}).status_code == 200
    made = Choices(db).choices()
    assert [c.task.kind for c in made] == [kind] * 2
    if kind == "rank":
        assert made[0].answer == {"order": [made[0].task.shown[2], made[0].task.shown[0]]}


def test_what_the_page_confirmed_survives_kill_9(tmp_path: Path) -> None:
    source, db = write_rows(tmp_path / "rows.jsonl", 30), tmp_path / "c.sqlite"
    options = ["--db", str(db), "--annotator", "ann", "--repeats", "0"]
    for round_ in (1, 2):
        with serving(source, *options) as (links, process), person(links["ann"]) as ann:
            for _ in range(7):
                task = task_of(ann.get("/").text)
                assert (
                    ann.post("/choose", data={"task": task, "answer": "second"}, follow_redirects=False).status_code
                    == 303
                )
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert len(Choices(db).choices()) == 7 * round_
    result = CliRunner().invoke(app, ["label", "export", "--db", str(db), "--out", str(tmp_path / "p.jsonl"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rankings"] == 14


def test_ctrl_c_is_how_it_ends(tmp_path: Path) -> None:
    """No failure: what stands after it in a script is done."""
    source = write_rows(tmp_path / "rows.jsonl")
    with serving(source, "--db", str(tmp_path / "c.sqlite"), "--annotator", "ann") as (_, process):
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stdout is not None and process.stdout.read() == ""


def test_beyond_this_machine_only_if_told_and_with_a_token(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl")
    with serving(source, "--db", str(tmp_path / "c.sqlite"), "--host", "0.0.0.0", "--annotator", "ann") as (
        links,
        process,
    ):
        assert any("everybody who can reach this machine" in line for line in process.said)  # type: ignore[attr-defined]
        base = links["ann"].partition("/?")[0].replace("0.0.0.0", "127.0.0.1")
        with httpx.Client(base_url=base, trust_env=False) as client:
            assert client.get("/", headers={"host": "label.example.org"}).status_code == 403
            assert client.get(f"/?{links['ann'].partition('?')[2]}").status_code == 303
    with serving(source, "--db", str(tmp_path / "d.sqlite"), "--annotator", "ann") as (links, _):
        port = int(links["ann"].split(":")[2].partition("/")[0])
        listening = Path("/proc/net/tcp").read_text() if Path("/proc/net/tcp").exists() else f"0100007F:{port:04X}"
        assert f"0100007F:{port:04X}" in listening and f"00000000:{port:04X}" not in listening


def test_import_and_export_commands(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "x", "chosen": "a", "rejected": "b", "annotator": "ann"}\n{"prompt": 1}\n')
    db = str(tmp_path / "c.sqlite")
    result = CliRunner().invoke(app, ["label", "import", "--pairs", str(pairs), "--db", db, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) | {"rows_set_aside": []} == {
        "added": 1,
        "read": 1,
        "set_aside": 1,
        "rows_set_aside": [],
    }
    result = CliRunner().invoke(app, ["label", "export", "--db", db, "--out", str(tmp_path / "out.jsonl"), "--json"])
    facts = json.loads(result.stdout)
    assert (facts["rankings"], facts["agreement"]) == (1, {"alpha": None, "units": 0})
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert (row["responses"], row["ranks"], row["annotator"]) == (["a", "b"], [1.0, 2.0], "ann")


def test_export_of_two_files_parts_prompts_not_rows(tmp_path: Path) -> None:
    """Every choice is in one of them; two choices about one prompt, and about its near-copy, in the same."""
    long = "please tell me how I can change the address of a parcel that was sent two days ago from the shop"
    prompts = [
        *(f"{word} {long[: 9 * i]}" for i, word in enumerate(("why", "who", "when", "how"))),
        long,
        f"{long} now",
    ]
    rows = [{"prompt": p, "chosen": f"a{i}", "rejected": "b", "annotator": str(i)} for i in (0, 1) for p in prompts]
    pairs, db = tmp_path / "pairs.jsonl", tmp_path / "c.sqlite"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = CliRunner().invoke
    assert run(app, ["label", "import", "--pairs", str(pairs), "--db", str(db)]).exit_code == 0
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    command = ["label", "export", "--db", str(db), "--out", str(train), "--json"]
    result = run(app, [*command, "--test", str(test), "--test-share", "0.5"])
    assert result.exit_code == 0, result.output
    sides = [[json.loads(line) for line in path.read_text().splitlines()] for path in (train, test)]
    facts = json.loads(result.stdout)
    assert [facts["rankings"], facts["test_rankings"]] == [len(side) for side in sides]
    assert sum(map(len, sides)) == len(rows)
    asked = [{row["messages"][0]["content"] for row in side} for side in sides]
    assert all(asked) and not asked[0] & asked[1]
    assert any({long, f"{long} now"} <= side for side in asked)
    for other in (train, db):
        assert run(app, [*command, "--test", str(other)]).exit_code != 0
    assert Choices(db).choices()


def test_export_of_two_files_needs_two_prompts(tmp_path: Path) -> None:
    pairs, db = tmp_path / "pairs.jsonl", tmp_path / "c.sqlite"
    pairs.write_text('{"prompt": "x", "chosen": "a", "rejected": "b"}\n')
    run = CliRunner().invoke
    assert run(app, ["label", "import", "--pairs", str(pairs), "--db", str(db)]).exit_code == 0
    files = ["--out", str(tmp_path / "train.jsonl"), "--test", str(tmp_path / "test.jsonl")]
    result = run(app, ["label", "export", "--db", str(db), *files])
    assert result.exit_code == 1 and "all choices are about one prompt" in result.output
    assert not list(tmp_path.glob("t*.jsonl"))


def test_a_user_without_a_name_is_asked_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr("getpass.getuser", nobody)
    result = CliRunner().invoke(app, ["label", "start", str(write_rows(tmp_path / "rows.jsonl"))])
    assert result.exit_code == 2 and "--annotator: expected a name" in result.output


def test_bad_commands(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["label", "export", "--db", str(tmp_path / "none"), "--out", "x"])
    assert result.exit_code == 1 and "there is no such file" in result.output
    Choices(tmp_path / "empty.sqlite").close()
    result = CliRunner().invoke(app, ["label", "export", "--db", str(tmp_path / "empty.sqlite"), "--out", "x"])
    assert result.exit_code == 1 and "no choice that says something yet" in result.output
    result = CliRunner().invoke(app, ["label", "start", str(tmp_path / "nothing.jsonl")])
    assert result.exit_code == 1 and "cannot be read" in result.output
