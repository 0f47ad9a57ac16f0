"""The run directory: round trips, atomic writes, the manifest, the lock, a full disk."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opentao.errors import StoreError
from opentao.store import (
    Run,
    attach_scores,
    file_hash,
    groups_to_table,
    prompts_to_table,
    scores_to_table,
    table_to_groups,
    table_to_prompts,
)
from opentao.types import NAN, Failure, Group, Prompt, Response, Score


def test_the_keys_of_a_tool_keep_their_order() -> None:
    """A chat template writes them as they come."""
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"z": 1, "a": 2}}}
    [back] = table_to_prompts(prompts_to_table([Prompt(messages=({"role": "user", "content": "x"},), tools=(tool,))]))
    assert json.dumps(back.tools) == json.dumps((tool,))


def group(text: str = "Hello?", num: int = 2) -> Group:
    prompt = Prompt(
        messages=({"role": "system", "content": "Be kind."}, {"role": "user", "content": text}),
        tools=({"type": "function", "function": {"name": "f", "parameters": {}}},),
        meta={"label": "größer 😀", "n": 3, "deep": {"a": [1, None]}},
    )
    responses = tuple(
        Response(
            id=f"{text}-{i}",
            text=f"line\n{i} \x00",
            tokens_R=(7, i, 2),
            sampler_logprobs_R=(-0.5, -0.25, -2.0),  # exact in 32 bits
            finish="length" if i else "stop",
            strategy="think",
            seed=2**62 + i,
            policy="9a1b",
        )
        for i in range(num)
    )
    return Group(prompt=prompt, prompt_tokens_P=(1, 5), responses=responses)


def failed() -> Group:
    return Group(prompt=Prompt.from_text("too long"), failure=Failure(kind="prompt_too_long", message="9 > 8"))


class TestRoundTrips:
    def test_prompts(self) -> None:
        prompts = [group().prompt, Prompt.from_text("plain")]
        assert table_to_prompts(prompts_to_table(prompts)) == prompts

    def test_groups(self, tmp_path: Path) -> None:
        groups = [group(), failed(), group("no responses", num=0)]
        with Run(tmp_path) as run:
            run.write_table("groups/0.parquet", "key", groups_to_table(groups))
            assert table_to_groups(run.read_table("groups/0.parquet")) == groups

    def test_no_groups(self) -> None:
        assert table_to_groups(groups_to_table([])) == []

    def test_unscored_is_nan_in_memory_and_null_on_disk(self, tmp_path: Path) -> None:
        broken = Score(value=NAN, error="timeout: 30 s")
        scored = group().with_scores(
            {"judge": (broken, Score(value=0.0)), "exact": (Score(value=1.0),) * 2}, (NAN, 0.5)
        )
        with Run(tmp_path) as run:
            run.write_table("scores/0.parquet", "key", scores_to_table([scored, failed()]))
            table = run.read_table("scores/0.parquet")
        values = {(r["response_id"], r["scorer"]): r["value"] for r in table.to_pylist()}
        assert values[("Hello?-0", "judge")] is None
        assert values[("Hello?-0", "reward")] is None
        assert values[("Hello?-1", "judge")] == 0.0
        [again, _] = attach_scores([group(), failed()], table)
        assert math.isnan(again.rewards_N[0])
        assert again.rewards_N[1] == 0.5
        assert again.scores["judge"][0].error == "timeout: 30 s"
        assert again.scores["exact"] == (Score(value=1.0),) * 2

    def test_a_response_without_a_row_is_unscored(self) -> None:
        one = group(num=1).with_scores({"judge": (Score(value=1.0),)}, (1.0,))
        [two] = attach_scores([group(num=2)], scores_to_table([one]))
        assert two.scores["judge"][0] == Score(value=1.0)
        assert two.scores["judge"][1].error == "missing: no row"
        assert two.scored == (0,)

    def test_scores_are_joined_by_id_in_any_order(self) -> None:
        groups = [group(t).with_scores({}, (i, i + 0.5)) for i, t in enumerate(("a", "b"))]
        joined = attach_scores([group("b"), group("a")], scores_to_table(groups))
        assert [g.rewards_N for g in joined] == [(1.0, 1.5), (0.0, 0.5)]


def fails_half_way(path: Path) -> None:
    path.write_text("half of the new")
    raise RuntimeError("power")


def folder_of(**files: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.mkdir()
        for name, text in files.items():
            (path / name).write_text(text)

    return write


class TestCommit:
    def test_failed_write_leaves_the_old_file(self, tmp_path: Path) -> None:
        with Run(tmp_path) as run:
            run.write_json("a.json", "old", 1)
            with pytest.raises(RuntimeError):
                run.commit("a.json", "new", fails_half_way)
            assert run.have("a.json", "old")
            assert run.read_json("a.json") == 1
        assert not list(tmp_path.glob(".*"))

    def test_failed_write_of_a_folder_leaves_the_old_one(self, tmp_path: Path) -> None:
        def fails(path: Path) -> None:
            folder_of(weights="new")(path)
            raise RuntimeError("power")

        with Run(tmp_path) as run:
            run.commit("policy", "old", folder_of(weights="old"))
            with pytest.raises(RuntimeError):
                run.commit("policy", "new", fails)
            assert run.have("policy", "old")
            run.commit("policy", "new", folder_of(other="new"))
        assert [p.name for p in (tmp_path / "policy").iterdir()] == ["other"]

    def test_killed_while_writing(self, tmp_path: Path) -> None:
        """SIGKILL between the first byte and the rename: the old file stands, the next owner removes the rest."""
        code = """
            import os, signal, sys
            from opentao.store import Run
            def write(path):
                path.write_text("half")
                os.kill(os.getpid(), signal.SIGKILL)
            with Run(sys.argv[1]) as run:
                run.write_json("a.json", "old", 1)
                run.commit("a.json", "new", write)
        """
        assert python(code, tmp_path).wait() == -signal.SIGKILL
        assert (tmp_path / ".a.json.part").exists()
        with Run(tmp_path) as run:
            assert not (tmp_path / ".a.json.part").exists()
            assert run.have("a.json", "old")
            run.write_json("a.json", "new", 2)
            assert run.read_json("a.json") == 2

    @pytest.mark.parametrize("moment", ["moved", "renamed", "entered"])
    def test_killed_while_a_folder_is_replaced(self, tmp_path: Path, moment: str) -> None:
        """No rename replaces a folder. Whenever the kill comes, the old one or the new one stands, whole."""
        code = f"""
            import os, signal, sys
            from opentao import store
            moment = {moment!r}
            def die(*_): os.kill(os.getpid(), signal.SIGKILL)
            def folder(text):
                def write(path):
                    path.mkdir()
                    (path / "weights").write_text(text)
                return write
            with store.Run(sys.argv[1]) as run:
                run.commit("policy", "old", folder("old"))
                if moment == "moved":
                    rename = store.Path.rename
                    store.Path.rename = lambda self, to: rename(self, to) if self.name == "policy" else die()
                if moment == "renamed":
                    store.Run._enter = die
                if moment == "entered":
                    enter = store.Run._enter
                    store.Run._enter = lambda *given: (enter(*given), die())
                run.commit("policy", "new", folder("new"))
        """
        assert python(code, tmp_path).wait() == -signal.SIGKILL
        stands = "new" if moment == "entered" else "old"
        with Run(tmp_path) as run:
            assert run.have("policy", stands)
            assert (tmp_path / "policy/weights").read_text() == stands
            assert not list(tmp_path.glob(".policy*"))
            run.commit("policy", "next", folder_of(weights="next"))
            assert run.have("policy", "next")

    def test_key_is_what_it_was_made_from(self, tmp_path: Path) -> None:
        with Run(tmp_path) as run:
            run.write_json("a.json", "k1", 1)
            assert run.have("a.json")
            assert run.have("a.json", "k1")
            assert not run.have("a.json", "k2")
            assert not run.have("b.json")

    def test_json_has_no_nan(self, tmp_path: Path) -> None:
        with Run(tmp_path) as run, pytest.raises(ValueError):
            run.write_json("a.json", "k", {"mean": NAN})

    def test_discarded_is_forgotten(self, tmp_path: Path) -> None:
        with Run(tmp_path) as run:
            run.commit("round-1/checkpoint", "k", folder_of(a="1"))
            run.write_json("round-1/x.json", "k", 1)
            run.discard("round-1/checkpoint")
            run.discard("round-1/never-there")
            assert run.names("round-1/") == ["round-1/x.json"]
        with Run(tmp_path) as run:
            assert run.names("round-1/") == ["round-1/x.json"]
            assert not run.have("round-1/checkpoint")
        assert not (tmp_path / "round-1" / "checkpoint").exists()


class TestManifest:
    def test_torn_last_line_is_cut_off(self, tmp_path: Path) -> None:
        with Run(tmp_path) as run:
            run.write_json("a.json", "k", 1)
        manifest = tmp_path / "manifest.jsonl"
        whole = manifest.read_bytes()
        manifest.write_bytes(whole + b'{"path": "b.json", "ke')
        with Run(tmp_path, read_only=True) as run:  # a reader changes nothing
            assert run.names("") == ["a.json"]
        assert manifest.read_bytes() != whole
        with Run(tmp_path) as run:
            assert run.names("") == ["a.json"]
            run.write_json("c.json", "k", 3)
        with Run(tmp_path) as run:
            assert run.read_json("c.json") == 3

    @pytest.mark.parametrize("line", ["not JSON", '{"path": "a.json"}', "[1]", '{"key": "k", "sha256": "0"}'])
    def test_damaged_line(self, tmp_path: Path, line: str) -> None:
        with Run(tmp_path) as run:
            run.write_json("a.json", "k", 1)
        with (tmp_path / "manifest.jsonl").open("a") as file:
            file.write(line + "\n")
        with pytest.raises(StoreError, match=r"manifest\.jsonl:2: not a manifest entry"), Run(tmp_path):
            pass

    def test_last_entry_counts(self, tmp_path: Path) -> None:
        for value in (1, 2):
            with Run(tmp_path) as run:
                run.write_json("a.json", f"k{value}", value)
        with Run(tmp_path) as run:
            assert run.have("a.json", "k2")
            assert not run.have("a.json", "k1")
            assert run.read_json("a.json") == 2

    @pytest.mark.parametrize("damage", ["changed", "lost"])
    def test_changed_file(self, tmp_path: Path, damage: str) -> None:
        with Run(tmp_path) as run:
            run.write_json("a.json", "k", 1)
        if damage == "changed":
            (tmp_path / "a.json").write_text("2\n")
        else:
            (tmp_path / "a.json").unlink()
        with Run(tmp_path) as run:
            assert not run.have("a.json", "k")
            with pytest.raises(StoreError, match=r"a\.json: missing, or changed since it was written"):
                run.read_json("a.json")
            run.write_json("a.json", "k", 3)  # a changed input is made again
            assert run.read_json("a.json") == 3

    def test_changed_folder(self, tmp_path: Path) -> None:
        for change in (
            lambda p: (p / "b").write_text("x"),
            lambda p: (p / "a").unlink(),
            lambda p: (p / "a").rename(p / "c"),
        ):
            with Run(tmp_path) as run:
                run.commit("policy", "k", folder_of(a="1"))
            change(tmp_path / "policy")
            with Run(tmp_path) as run:
                assert not run.have("policy")

    def test_file_that_is_not_in_it_is_not_trusted(self, tmp_path: Path) -> None:
        with Run(tmp_path) as run:
            (tmp_path / "a.json").write_text("1")
            assert not run.have("a.json")

    def test_no_such_directory(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="no such run directory"), Run(tmp_path / "absent", read_only=True):
            pass
        assert not (tmp_path / "absent").exists()


def test_file_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    folder_of(a="1", b="2")(tmp_path / "x")
    folder_of(a="2", b="1")(tmp_path / "y")
    folder_of(b="2", a="1")(tmp_path / "z")
    assert file_hash(tmp_path / "x") == file_hash(tmp_path / "z") != file_hash(tmp_path / "y")


# ------------------------------------------------------------------------------------------------- the lock


def python(code: str, *args: Path | str) -> subprocess.Popen[str]:
    lines = code.splitlines()
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    script = "\n".join(line[indent:] for line in lines)
    return subprocess.Popen([sys.executable, "-c", script, *map(str, args)], stdout=subprocess.PIPE, text=True)


HOLD = """
    import sys, time
    from opentao.store import Run
    with Run(sys.argv[1]) as run:
        run.write_json("a.json", "k", 1)
        print("locked", flush=True)
        time.sleep(600)
"""


def test_parts_of_another_run_below_are_left_alone(tmp_path: Path) -> None:
    """It may be live: only its own writer knows what was given up."""
    with Run(tmp_path / "inner") as inner:
        inner.write_json("a.json", "k", 1)
    parts = [tmp_path / where / ".x.parquet.part" for where in ("inner", "round-1")]
    for part in parts:
        part.parent.mkdir(exist_ok=True)
        part.touch()
    with Run(tmp_path):
        assert [part.exists() for part in parts] == [True, False]


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = python(HOLD, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_second_writer_is_refused_and_told_the_owner(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(StoreError, match=rf"in use by another process: .*{holder.pid}") as caught, Run(tmp_path):
        pass
    assert "\n" not in str(caught.value)
    with Run(tmp_path, read_only=True) as run:  # readers are welcome
        assert run.read_json("a.json") == 1


def test_lock_of_a_killed_process_is_taken_over(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with Run(tmp_path) as run:
        assert run.read_json("a.json") == 1
        assert json.loads((tmp_path / "owner.json").read_text())["pid"] == os.getpid()


# ------------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """256 KiB; skipped where file systems cannot be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)]
    if not sys.platform.startswith("linux") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)  # lazily: a traceback may hold a file


def many_groups() -> list[Group]:
    rng = random.Random(0)
    tokens = tuple(rng.randrange(2**31) for _ in range(200_000))  # does not compress
    response = Response(id="r", text="", tokens_R=tokens, sampler_logprobs_R=(), finish="stop")
    return [Group(prompt=Prompt.from_text("a"), responses=(response,))]


def write_safetensors(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path.mkdir()
    save_file({"weight": torch.rand(500_000)}, path / "model.safetensors")


@pytest.mark.parametrize("what", ["text", "parquet", "safetensors"])
def test_full_disk_is_one_kind_of_error_and_loses_nothing(small_disk: Path, what: str) -> None:
    writes: dict[str, Callable[[Run], Path]] = {
        "text": lambda run: run.write_json("x", "new", "x" * 500_000),
        "parquet": lambda run: run.write_table("x", "new", groups_to_table(many_groups())),
        "safetensors": lambda run: run.commit("x", "new", write_safetensors),
    }
    with Run(small_disk) as run:
        run.write_json("x", "old", 1)
        with pytest.raises(OSError) as caught:
            writes[what](run)
        assert caught.value.errno == errno.ENOSPC
        assert run.have("x", "old")
    with Run(small_disk) as run:
        assert run.read_json("x") == 1
        run.write_json("y", "k", "x" * 100_000)  # the half-written part was removed
    assert not list(small_disk.glob(".*"))


def test_full_disk_where_nothing_can_be_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Run(tmp_path) as run:
        run.write_json("x", "old", 1)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                run.write_json("x", "new", 2)
        assert run.have("x", "old")
    with Run(tmp_path) as run:
        assert run.read_json("x") == 1
