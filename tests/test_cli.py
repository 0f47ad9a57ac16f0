"""The command line's contract: exit status, one line for a failure, one JSON object, the same files everywhere."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_config, write_prompts

from opentao.cli import app
from opentao.store import Run

HERE = Path(__file__).parent
Tree = dict[str, Any]


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def answer(self) -> Tree:
        """The one JSON object on standard output; anything else there fails."""
        assert self.out.count("\n") == 1, self.out
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    @property
    def complaint(self) -> str:
        """The last line of standard error, which is the only one that complains."""
        assert "Traceback" not in self.err
        assert self.err.count("tao: ") == 1, self.err
        return self.err.splitlines()[-1].removeprefix("tao: ")


Tao = Callable[..., Result]


@pytest.fixture
def tao(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tao:
    """Run one command in this process, in an empty directory; what is captured is what reaches the terminal."""
    monkeypatch.chdir(tmp_path)

    def call(*args: object) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            app([str(a) for a in args], prog_name="tao")
        out, err = capfd.readouterr()
        return Result(ended.value.code or 0, out, err)  # type: ignore[arg-type]

    return call


def process(*args: object, cwd: Path) -> subprocess.Popen[str]:
    """The same in a process of its own."""
    paths = (str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", ""))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "opentao.cli", *map(str, args)]
    pipe = subprocess.PIPE
    # Whoever starts pytest in the background of a script hands down "ignore SIGINT"; a person's terminal does not.
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=hear)


@pytest.fixture
def tree(tiny_model_dir: Path, tmp_path: Path) -> Tree:
    """One small round."""
    return tiny_config(tiny_model_dir, write_prompts(tmp_path / "prompts.jsonl")) | {
        "rounds": 1,
        "prompts_per_round": 6,
        "generate": {"group_size": 4, "max_new_tokens": 8, "shard_prompts": 4, "batch_responses": 8},
        "evaluate": {"base_group_size": 4, "group_size": 2, "bootstrap": 200},
    }


@pytest.fixture
def config(tree: Tree, tmp_path: Path) -> Path:
    return write_yaml(tmp_path / "tao.yaml", tree)


def write_yaml(path: Path, tree: Tree) -> Path:
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def weights(run: Path) -> dict[str, str]:
    """sha256 of every policy of a run."""
    return {p.parts[-3]: hashlib.sha256(p.read_bytes()).hexdigest() for p in run.glob("round-*/policy/*.safetensors")}


class TestExitStatus:
    def test_as_a_module(self) -> None:
        done = subprocess.run([sys.executable, "-m", "opentao", "--help"], capture_output=True, text=True, check=True)
        assert "Usage: tao " in done.stdout

    def test_help(self, tao: Tao) -> None:
        result = tao("--help")
        assert result.code == 0
        for name in ("demo", "init", "run", "import", "generate", "score", "train", "evaluate", "report", "show"):
            assert name in result.out
        assert tao("run", "--help").code == 0

    @pytest.mark.parametrize(
        "args",
        [["fly"], ["run"], ["run", "tao.yaml", "--fast"], ["train", "tao.yaml", "--round", "0"], ["reward", "fly"]],
    )
    def test_bad_usage(self, tao: Tao, args: list[str]) -> None:
        result = tao(*args)
        assert result.code == 2
        assert result.out == ""
        assert "Traceback" not in result.err

    @pytest.mark.parametrize("command", ["run", "generate", "score", "train", "evaluate", "doctor"])
    def test_bad_config(self, tao: Tao, config: Path, command: str) -> None:
        config.write_text(config.read_text().replace("rounds:", "round:"))
        result = tao(command, config)
        assert result.code == 2
        assert result.out == ""
        line = next(n for n, text in enumerate(config.read_text().splitlines(), 1) if text.startswith("round:"))
        assert result.complaint.startswith(f"{config}:{line}: round: unknown key; expected one of: model,")

    def test_config_that_is_not_there(self, tao: Tao) -> None:
        result = tao("run", "absent.yaml")
        assert (result.code, result.complaint) == (2, "absent.yaml: cannot be read: No such file or directory")

    def test_bad_override(self, tao: Tao, config: Path) -> None:
        result = tao("run", config, "--set", "train.epochs=many")
        assert result.code == 2
        assert "train.epochs: Input should be a valid integer" in result.complaint

    @pytest.mark.parametrize(
        ("override", "code", "expected"),
        [
            ("prompts.path=absent.jsonl", 1, "absent.jsonl: cannot be read: No such file or directory"),
            ("model=absent/model/folder", 1, "model 'absent/model/folder': expected a built-in name"),
            ("scorers.0.type=magic", 2, "scorer letters (type magic): unknown type; expected one of: citation,"),
            ("scorers.0.args={function: toy_scorers:absent}", 2, "'toy_scorers:absent' cannot be imported"),
        ],
    )
    def test_failure(self, tao: Tao, config: Path, override: str, code: int, expected: str) -> None:
        result = tao("run", config, "--set", override)
        assert result.code == code
        assert expected in result.complaint
        assert result.out == ""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", "no prompt in 0 rows; first problem: there are no rows"),
            ("\n\n", "no prompt in 0 rows"),
            ('{"question": "a"}\n', "no prompt in 1 rows; first problem: line 1: neither `prompt` nor `messages`"),
            ('{"prompt": "one and only"}\n', "1 prompt in 1 cluster of near-duplicates; expected at least 2"),
        ],
    )
    def test_empty_prompt_set(self, tao: Tao, config: Path, tmp_path: Path, text: str, expected: str) -> None:
        (tmp_path / "prompts.jsonl").write_text(text)
        result = tao("run", config)
        assert result.code == 1
        assert expected in result.complaint

    def test_run_directory_that_cannot_be_made(self, tao: Tao, config: Path) -> None:
        result = tao("run", config, "--run", f"{config}/run")
        assert result.code == 1
        assert result.complaint.startswith("Not a directory: ")

    def test_run_directory_in_use(self, tao: Tao, config: Path, tmp_path: Path) -> None:
        with Run(tmp_path / "run"):
            result = tao("run", config, "--run", tmp_path / "run")
        assert result.code == 1
        assert f'in use by another process: {{"pid": {os.getpid()}' in result.complaint

    def test_nan_loss_is_a_result(self, tao: Tao, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The run ends with its verdict: the last good policy is kept, here the base."""
        from opentao.objectives import OBJECTIVES, Objective

        good = OBJECTIVES["distill"]
        broken = Objective(lambda *args: good.loss(*args) * float("nan"), good.choose, good.needs_reference)
        monkeypatch.setitem(OBJECTIVES, "distill", broken)
        result = tao("run", config, "--json")
        assert result.code == 0
        assert result.answer["verdict"] == "keep base"
        assert "loss nan" in result.answer["why"]
        assert "note round 1 is not judged: step 0: loss nan" in result.err
        failed = tao("train", config)  # asked for this stage alone, there is nothing else to give
        assert failed.code == 1
        assert failed.complaint.startswith("step 0: loss nan")


class TestJson:
    def test_run(self, tao: Tao, config: Path, tmp_path: Path) -> None:
        result = tao("run", config, "--run", "out", "--json")
        assert result.code == 0
        assert result.answer == json.loads((tmp_path / "out/summary.json").read_text())
        assert "round 1: train" in result.err

    def test_stages(self, tao: Tao, config: Path) -> None:
        made = tao("generate", config, "--json").answer
        assert made == {"round": 1, "shards": ["round-1/groups/00000.parquet", "round-1/groups/00001.parquet"]}
        assert tao("score", config, "--json").answer == {"round": 1, "groups": 6, "informative": 6, "unscored": {}}
        trained = tao("train", config, "--json").answer
        assert (trained["steps"], trained["groups"], trained["informative"]) == (9, 6, 6)
        assert trained["policy"] == "tao-run/round-1/policy"
        measured = tao("evaluate", config, "--round", 1, "--json").answer
        assert measured["policy"] == trained["policy_hash"]
        assert measured["first_try"]["n"] == 8
        assert tao("evaluate", config, "--json").answer["round"] == 0

    def test_import(self, tao: Tao, tmp_path: Path) -> None:
        (tmp_path / "log.csv").write_text('prompt,label\nWhere is it?,a\n,b\n"Wo, bitte?",c\n')
        result = tao("import", "log.csv", "--out", "p.jsonl", "--json")
        assert result.answer["prompts"] == 2
        assert result.answer["set_aside"] == 1
        lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
        assert lines[1] == {"messages": [{"role": "user", "content": "Wo, bitte?"}], "meta": {"label": "c"}}
        [aside] = [json.loads(line) for line in (tmp_path / "p.set_aside.jsonl").read_text().splitlines()]
        assert aside["line"] == 3
        assert tao("import", "p.jsonl", "--out", "again.jsonl", "--json").answer["prompts"] == 2
        assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "p.jsonl").read_text()

    def test_doctor(self, tao: Tao, config: Path) -> None:
        assert "estimate" not in tao("doctor", "--json").answer
        assert tao("doctor", config, "--json").answer["estimate"]["prompts"]["total"] == 40

    def test_failure_leaves_standard_output_empty(self, tao: Tao, config: Path) -> None:
        for args in (["run", "--set", "prompts.path=absent.jsonl"], ["score"], ["train"], ["evaluate", "--round", "1"]):
            result = tao(args[0], config, *args[1:], "--json")
            assert (result.code, result.out) == (1, "")

    def test_a_scorer_that_prints(self, tao: Tao, config: Path) -> None:
        result = tao("run", config, "--json", "--set", "scorers.0.args.function=toy_scorers:chatty")
        assert result.answer["verdict"]
        assert "debug!" in result.err


class TestForPeople:
    """Without --json: a text on standard output."""

    def test_run_show_report(self, tao: Tao, config: Path, tmp_path: Path) -> None:
        result = tao("run", config)
        assert result.code == 0
        assert "base best of 4" in result.out
        assert "report: tao-run/report.html" in result.out
        shown = tao("show", "tao-run", "--limit", 2)
        assert shown.code == 0
        assert shown.out.count("#1 ") == 2
        assert "letters 0" in shown.out
        inside = tao("show", "tao-run/round-1", "--limit", 1)
        assert inside.out.count("#2 ") == 1
        (tmp_path / "tao-run/report.html").unlink()
        assert tao("report", "tao-run").out.strip() == "tao-run/report.html"
        assert (tmp_path / "tao-run/report.html").exists()

    def test_stages(self, tao: Tao, config: Path) -> None:
        assert tao("generate", config).out == "2 shards in tao-run/round-1/groups\n"
        assert tao("score", config).out == "6 groups scored, 6 informative\n"
        assert tao("train", config).out == "9 steps; policy: tao-run/round-1/policy\n"
        assert "first try 0." in tao("evaluate", config, "--round", "1").out
        assert tao("doctor").code == 0

    def test_nothing_could_be_scored(self, tao: Tao, config: Path) -> None:
        broken = ("--set", "scorers.0.args.function=toy_scorers:broken")
        tao("generate", config, *broken)
        for command in ("score", "train"):
            result = tao(command, config, *broken)
            assert result.code == 1
            assert result.complaint.startswith(
                "round 1: none of 24 answers could be scored (letters: RuntimeError: the "
            )
        for command in ("evaluate", "predict", "run"):
            result = tao(command, config, *broken)
            assert result.code == 1
            assert result.complaint.startswith("base: held-out: none of ")

    def test_import(self, tao: Tao, tmp_path: Path) -> None:
        (tmp_path / "log.csv").write_text("prompt\nWhere is it?\n")
        assert tao("import", "log.csv").out == "1 row of CSV, prompts from key `prompt`\n1 prompts -> prompts.jsonl\n"
        (tmp_path / "x.set_aside.jsonl").write_text('{"prompt": "kept"}\n{"prompt": 1}\n')
        assert "x.set_aside.jsonl: exists already" in tao("import", "x.set_aside.jsonl", "--out", "x.jsonl").complaint
        assert (tmp_path / "x.set_aside.jsonl").exists() and not (tmp_path / "x.jsonl").exists()
        before = (tmp_path / "prompts.jsonl").read_bytes()
        for source in ("log.csv", "prompts.jsonl"):
            result = tao("import", source)
            assert result.code == 1
            assert result.complaint.startswith("prompts.jsonl: exists already and is not overwritten")
        assert (tmp_path / "prompts.jsonl").read_bytes() == before
        result = tao("import", "log.csv", "--out", "absent/p.jsonl")
        assert (result.code, result.complaint) == (1, "No such file or directory: absent/p.jsonl")

    def test_nothing_to_show(self, tao: Tao, tmp_path: Path) -> None:
        assert tao("show", "absent").complaint == "absent: no such run directory"
        (tmp_path / "empty").mkdir()
        assert tao("show", "empty").complaint.startswith("empty: no groups here")
        assert tao("report", "empty").complaint.startswith("empty/summary.json: cannot be read")


class TestStages:
    def test_order(self, tao: Tao, config: Path) -> None:
        groups = "groups as this config makes them; run `tao generate --round 1` first, with the same settings"
        for command in ("score", "train"):
            assert tao(command, config).complaint == f"tao-run: round 1 has no {groups}"
        tao("generate", config)
        cooler = ("--set", "generate.temperature=0.5")
        for command in ("score", "train"):  # nothing is learnt from what other settings made
            complaint = tao(command, config, *cooler).complaint
            assert re.fullmatch(f"tao-run: round 1 has 0 of [12] shards of {groups}", complaint)
            assert tao(command, config, "--set", "generate.batch_responses=2").code == 0  # a memory knob

    def test_a_round_before_the_one_before_it_is_trained(self, tao: Tao, config: Path, tmp_path: Path) -> None:
        expected = "tao-run: round 1 is not trained; run `tao train --round 1` first"
        two = ("--set", "rounds=2", "--set", "prompts_per_round=6")
        assert tao("evaluate", config, *two, "--round", 1).complaint == expected
        for command in ("generate", "score", "train"):
            assert tao(command, config, *two, "--round", 2).complaint == expected
        for command in ("generate", "train"):
            assert tao(command, config, *two).code == 0
        with Run(tmp_path / "tao-run") as run:
            run.discard("round-1/policy")  # as after a kill between the record of steps and the policy
        assert tao("evaluate", config, *two, "--round", 1).complaint == expected

    def test_one_by_one_give_the_policies_of_a_run(self, tao: Tao, config: Path, tmp_path: Path) -> None:
        three = ("--set", "rounds=3", "--set", "train.objective=regress")
        whole = tao("run", config, *three, "--run", "whole", "--json").answer
        for round_ in (1, 2, 3):
            for stage in ("generate", "score", "train", "evaluate"):
                assert tao(stage, config, *three, "--run", "stages", "--round", round_).code == 0
        assert len(weights(tmp_path / "whole")) == 3
        assert weights(tmp_path / "stages") == weights(tmp_path / "whole")
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "stages").rglob("*.parquet")}
        after = tao("run", config, *three, "--run", "stages", "--json").answer
        assert {p: p.stat().st_mtime_ns for p in (tmp_path / "stages").rglob("*.parquet")} == before
        for numbers in (whole, after):
            for round_ in (numbers, numbers["base"], *numbers["rounds"]):
                round_.pop("seconds")
                round_.pop("tokens", None)
        assert after == whole

    def test_score_again_samples_nothing(self, tao: Tao, config: Path, tmp_path: Path) -> None:
        tao("generate", config)
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "tao-run/round-1/groups").iterdir()}
        for function in ("letters", "constant"):
            result = tao("score", config, "--set", f"scorers.0.args.function=toy_scorers:{function}", "--json")
            assert result.answer["informative"] == (6 if function == "letters" else 0)
        assert {p: p.stat().st_mtime_ns for p in (tmp_path / "tao-run/round-1/groups").iterdir()} == before


def test_unreadable_rows_are_set_aside_and_counted(tao: Tao, config: Path, tmp_path: Path) -> None:
    good = (tmp_path / "prompts.jsonl").read_bytes()
    bad = [
        b"{oops",
        b'{"prompt": ""}',
        b'{"text": "no key"}',
        b'{"prompt": "bad \xff byte"}',
        b'{"\\ud800": 1}',
        b"[1]",
    ]
    duplicate = good.splitlines()[0]
    (tmp_path / "prompts.jsonl").write_bytes(good + b"\n".join([*bad, duplicate]) + b"\n")
    summary = tao("run", config, "--json").answer
    aside = summary["set_aside"]
    assert aside["rows"] == len(bad) + 1
    assert sum(aside["reasons"].values()) == aside["rows"]
    rows = [json.loads(line) for line in (tmp_path / "tao-run/set_aside.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rows] == list(range(41, 48))
    assert rows[-1]["reason"] == "duplicate of line 1"
    assert "not valid Unicode" in rows[3]["reason"]
    assert summary["prompts"]["train"] + summary["prompts"]["heldout"] <= 40


def test_init_then_run_on_ones_own_prompts(tao: Tao, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The config of `tao init` as it is, but for the model and sizes that fit a test."""
    write_prompts(tmp_path / "prompts.jsonl")
    assert tao("init").out == "tao.yaml written; edit it, then: tao run tao.yaml\n"
    assert tao("init").complaint == "tao.yaml: exists already and is not overwritten"
    small = {"model": tiny_model_dir, "prompts_per_round": 4, "generate.max_new_tokens": 16, "prompts.max_heldout": 4}
    result = tao("run", "tao.yaml", "--json", *(a for k, v in small.items() for a in ("--set", f"{k}={v}")))
    assert result.code == 0
    assert result.answer["scorers"] == ["json_schema"]
    assert result.answer["audit"] is None
    assert (tmp_path / "tao-run/report.html").exists()


# ------------------------------------------------------------------------------------------------- interruptions


def test_ctrl_c_stops_cleanly_and_resumes_to_the_same_policy(tao: Tao, config: Path, tmp_path: Path) -> None:
    assert tao("run", config, "--run", "whole").code == 0
    slow = write_yaml(tmp_path / "slow.yaml", yaml.safe_load(config.read_text()))
    running = process("run", slow, "--run", "broken", "--set", "scorers.0.args.function=toy_scorers:slow", cwd=tmp_path)
    wait_for("round-1/groups/00001.parquet", tmp_path / "broken", running)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    result = Result(running.returncode, out, err)
    assert (result.code, result.out) == (1, "")
    assert result.complaint == "stopped; the same command goes on from here"
    assert not list((tmp_path / "broken").rglob(".*.part"))
    groups = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "broken/round-1/groups").iterdir()}
    assert tao("run", config, "--run", "broken").code == 0
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "broken/round-1/groups").iterdir()} == groups
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")


def wait_for(name: str, run: Path, running: subprocess.Popen[str], seconds: float = 120.0) -> None:
    """Until the run's manifest holds a file."""
    end, manifest = time.monotonic() + seconds, run / "manifest.jsonl"
    while not (manifest.exists() and name in manifest.read_text()):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < end, f"{name} did not come"
        time.sleep(0.02)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a small file system; skips where that cannot be done."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a small file system cannot be mounted here")
        return folder

    yield mount
    subprocess.run(
        ["umount", "-l", str(folder)], capture_output=True, check=False
    )  # lazily: a traceback may hold a file


@pytest.mark.parametrize("kilobytes", [32, 160, 420])
def test_full_disk(tao: Tao, config: Path, disk: Callable[[int], Path], kilobytes: int) -> None:
    """Full at a shard, at a checkpoint, at the policy: one line; with more room the same command goes on."""
    run = disk(kilobytes) / "run"
    result = tao("run", config, "--run", run)
    assert result.code == 1
    assert result.complaint.startswith("disk full")
    assert not list(run.rglob(".*.part"))
    subprocess.run(["mount", "-o", "remount,size=16m", str(run.parent)], check=True)
    assert tao("run", config, "--run", run).code == 0
    assert tao("run", config, "--run", "elsewhere").code == 0
    assert weights(run) == weights(Path("elsewhere"))


@pytest.mark.parametrize(
    "words", ["CUDA out of memory. Tried to allocate 2 GiB", "DefaultCPUAllocator: can't allocate memory"]
)
def test_out_of_memory_names_what_to_turn_down(
    tao: Tao, config: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    import torch

    def full(*_: object, **__: object) -> None:
        raise (torch.OutOfMemoryError if "CUDA" in words else RuntimeError)(words)

    monkeypatch.setattr("opentao.train.train_policy", full)
    result = tao("run", config)
    assert result.code == 1
    assert result.complaint.startswith("out of memory: lower train.row_tokens or generate.batch_responses")


def test_a_terminal_without_unicode(config: Path, tmp_path: Path) -> None:
    """The last table has a minus sign and dots that latin-1 or ASCII lack."""
    both = """
import sys
from opentao.cli import app
app(sys.argv[1:], standalone_mode=False)
app([*sys.argv[1:], "--json"])
"""
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-c", both, "predict", str(config)]
    done = subprocess.run(command, cwd=tmp_path, env=ascii_only, capture_output=True, check=True)
    *table, line = done.stdout.splitlines()
    assert table
    assert json.loads(line)["first_try"]["n"] == 8


def test_full_disk_where_nothing_can_be_mounted(tao: Tao, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1000))

    def full(_: int) -> None:
        if next(calls) > 20:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = tao("run", config)
    assert (result.code, result.complaint) == (1, "disk full; free some space and run it again")
