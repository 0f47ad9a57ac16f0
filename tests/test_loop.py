"""The whole method on a tiny random model: what it leaves behind, resume, and what must end in "keep base"."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORDS, tiny_config, write_prompts

from opentao import loop
from opentao.config import Config
from opentao.engines.fake import FakeEngine
from opentao.errors import BrokenModelError, DataError, ModelError, ScoreError, StoreError
from opentao.objectives import OBJECTIVES, Objective
from opentao.progress import Progress
from opentao.session import open_session
from opentao.store import Run, table_to_groups
from opentao.summary import Summary, read
from opentao.types import Group, Prompt, SamplingPlan

STAGES = {"generate", "score", "train", "evaluate"}
Tree = dict[str, Any]


@dataclass
class Case:
    """One finished run."""

    config: Config
    directory: Path
    summary: Tree
    notes: list[str]

    def files(self) -> dict[str, tuple[int, bytes]]:
        return files(self.directory)


def files(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Everything that is made once: shards and policies, by name, with time and content."""
    found = [p for p in directory.rglob("*") if p.suffix in (".parquet", ".safetensors")]
    return {str(p.relative_to(directory)): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(found)}


def go(directory: Path, tree: Tree, **args: Any) -> Case:
    config = Config.model_validate(tree)
    progress = Progress(quiet=True)
    return Case(config, directory, loop.run(config, directory, progress, **args), progress.notes)


def scored_by(tree: Tree, function: str) -> Tree:
    scorer = {"type": "python", "name": "judge", "args": {"function": f"toy_scorers:{function}"}}
    return tree | {"scorers": [scorer]}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


@pytest.fixture
def tree(tiny_model_dir: Path, prompts: Path) -> Tree:
    """A small run: one round, few responses."""
    return tiny_config(tiny_model_dir, prompts) | {
        "rounds": 1,
        "prompts_per_round": 6,
        "generate": {"group_size": 4, "max_new_tokens": 8, "shard_prompts": 4, "batch_responses": 8},
        "evaluate": {"base_group_size": 4, "group_size": 2, "bootstrap": 200},
    }


@pytest.fixture(scope="module")
def finished(tiny_model_dir: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Two rounds that learn."""
    return go(tmp_path_factory.mktemp("run") / "run", tiny_config(tiny_model_dir, prompts))


def means(value: Any, where: str = "") -> Iterator[tuple[str, Tree]]:
    """Every object with a key "mean", with its place."""
    if isinstance(value, dict):
        if "mean" in value:
            yield where, value
        for key, inner in value.items():
            yield from means(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from means(inner, f"{where}.{i}")


def test_later_rounds_sample_and_train_otherwise(tree: Tree, tmp_path: Path) -> None:
    """And only they are made again when that changes."""
    shown = {"generate": tree["generate"] | {"strategies": [{"name": "start", "answer_prefix": "a"}]}, "rounds": 2}
    train = {"objective": "online", "learning_rate": 1e-3, "epochs": 1}
    tree |= shown | {"later_rounds": {"generate": {"group_size": 3, "strategies": [{"name": "plain"}]}, "train": train}}
    case = go(tmp_path / "run", tree)
    with Run(case.directory, read_only=True) as run:
        first, second = (
            [g for n in run.names(f"round-{k}/groups/") for g in table_to_groups(run.read_table(n))] for k in (1, 2)
        )
        steps = [len(run.read_json(f"round-{k}/steps.json")) for k in (1, 2)]
    assert {(len(g.responses), r.strategy) for g in first for r in g.responses} == {(4, "start")}
    assert {(len(g.responses), r.strategy) for g in second for r in g.responses} == {(3, "plain")}
    informative = [r["train"]["informative"] for r in case.summary["rounds"]]
    per_step = case.config.train.prompts_per_step
    assert steps == [-(-informative[0] // per_step) * case.config.train.epochs, -(-informative[1] // per_step)]

    changed = tree | {"later_rounds": tree["later_rounds"] | {"train": train | {"learning_rate": 2e-3}}}
    before = case.files()
    again = go(case.directory, changed)
    remade = {name for name, file in again.files().items() if before.get(name) != file}
    assert "round-2/policy/model.safetensors" in remade
    assert all(name.startswith(("round-2/policy/", "round-2/eval/")) for name in remade)
    assert again.summary["rounds"][0] == case.summary["rounds"][0]


class TestWhatARunLeaves:
    def test_files(self, finished: Case) -> None:
        there = {str(p.relative_to(finished.directory)) for p in finished.directory.rglob("*") if p.is_file()}
        expected = {"config.yaml", "manifest.jsonl", "summary.json", "report.html", "set_aside.jsonl"}
        expected |= {"prompts/train.parquet", "prompts/heldout.parquet"}
        for k in (1, 2):
            expected |= {f"round-{k}/{name}/00000.parquet" for name in ("groups", "scores")}
            expected |= {
                f"round-{k}/policy/model.safetensors",
                f"round-{k}/policy/config.json",
                f"round-{k}/steps.json",
            }
        expected |= {f"round-{k}/eval.json" for k in (0, 1, 2)}
        assert expected <= there
        assert not [name for name in there if "checkpoint" in name or name.endswith(".part")]

    def test_summary_has_the_contracts_keys(self, finished: Case) -> None:
        summary = json.loads((finished.directory / "summary.json").read_text())
        assert summary == finished.summary
        assert read(Summary, finished.directory / "summary.json").best_round == summary["best_round"]
        assert {"model", "rounds", "base", "verdict", "why"} <= set(summary)
        keys = {"round", "first_try", "best_of", "audit", "kl", "baked_fraction", "tokens", "seconds"}
        for round_ in (summary["base"], *summary["rounds"]):
            assert keys <= set(round_)
            assert set(round_["seconds"]) == set(round_["tokens"]) == STAGES
        assert [r["round"] for r in summary["rounds"]] == [1, 2]
        assert list(summary["base"]["best_of"]) == ["1", "2", "4", "8"]

    def test_every_mean_has_an_interval_and_n(self, finished: Case) -> None:
        found = dict(means(finished.summary))
        assert len(found) > 30
        for where, value in found.items():
            assert set(value) == {"mean", "low", "high", "n"}, where
            trained_on = "sampler_mismatch" in where
            assert value["n"] == (12 if trained_on else finished.summary["prompts"]["heldout"]), where
            assert value["low"] <= value["mean"] <= value["high"], where

    def test_it_learned(self, finished: Case) -> None:
        summary = finished.summary
        assert summary["verdict"] == "promote"
        assert summary["best_round"] == 2
        assert summary["policy"] == "round-2/policy"
        assert summary["rounds"][1]["first_try"]["low"] > summary["base"]["first_try"]["high"]
        assert summary["rounds"][1]["improvement"]["low"] > 0
        assert summary["rounds"][1]["kl"]["mean"] > 0
        assert summary["unscored"] == {}
        assert summary["failures"] == {}

    def test_best_of_one_is_the_first_try(self, finished: Case) -> None:
        for round_ in (finished.summary["base"], *finished.summary["rounds"]):
            assert round_["best_of"]["1"]["mean"] == pytest.approx(round_["first_try"]["mean"])
            curve = [m["mean"] for m in round_["best_of"].values()]
            assert curve == sorted(curve)

    def test_heldout_prompts_are_never_trained_on(self, finished: Case) -> None:
        with Run(finished.directory, read_only=True) as run:
            ids = {
                side: {g.prompt.id for name in run.names(side) for g in table_to_groups(run.read_table(name))}
                for side in ("round-1/groups/", "round-2/groups/", "round-0/eval/groups/")
            }
        one, two, heldout = ids.values()
        assert not (one | two) & heldout
        assert len(one) == len(two) == 12
        assert len(one | two) == 23  # rounds take turns through the training prompts and start again at the end

    def test_responses_say_where_they_come_from(self, finished: Case) -> None:
        with Run(finished.directory, read_only=True) as run:
            groups = [g for n in run.names("round-2/groups/") for g in table_to_groups(run.read_table(n))]
        assert {r.policy for g in groups for r in g.responses} == {finished.summary["rounds"][0]["policy"]}
        assert len({r.id for g in groups for r in g.responses}) == 8 * len(groups)


class NoEngine:
    """An engine that must not be asked."""

    def load(self, policy: Any) -> None:
        raise AssertionError("loaded")

    def sample(self, prompts: Sequence[Prompt], plan: SamplingPlan) -> Iterator[Group]:
        raise AssertionError("sampled")


class TestResume:
    def test_again_makes_nothing(self, finished: Case) -> None:
        before = finished.files()
        again = go(finished.directory, finished.config.model_dump(mode="json"), engine=NoEngine())
        assert again.files() == before
        assert again.summary == finished.summary

    def test_elsewhere_makes_the_same_bytes(self, finished: Case, tmp_path: Path) -> None:
        again = go(tmp_path / "other", finished.config.model_dump(mode="json"))
        assert {n: b for n, (_, b) in again.files().items()} == {n: b for n, (_, b) in finished.files().items()}

    def test_only_what_changed_is_made_again(self, tree: Tree, tmp_path: Path) -> None:
        first = go(tmp_path / "run", tree).files()
        second = go(tmp_path / "run", scored_by(tree, "chance")).files()
        same = {name for name in first if first[name] == second.get(name)}
        assert {n for n in first if n.startswith(("round-1/groups/", "round-0/eval/groups/", "prompts/"))} <= same
        assert "round-1/scores/00000.parquet" not in same
        assert "round-1/policy/model.safetensors" not in same

    def test_knobs_of_memory_change_nothing(self, tree: Tree, tmp_path: Path) -> None:
        """Out of memory, one turns them down and starts again: what is there counts."""
        first = go(tmp_path / "run", tree)
        knobs = {"row_tokens": 256, "gradient_checkpointing": True, "save_every_steps": 1}
        tree |= {"generate": tree["generate"] | {"batch_responses": 2}, "train": tree["train"] | knobs}
        again = go(tmp_path / "run", tree, engine=NoEngine())
        assert again.files() == first.files()

    def test_fewer_prompts_leave_no_stale_shards(self, tree: Tree, tmp_path: Path) -> None:
        go(tmp_path / "run", tree)
        go(tmp_path / "run", tree | {"prompts_per_round": 3})
        with Run(tmp_path / "run", read_only=True) as run:
            assert run.names("round-1/groups/") == ["round-1/groups/00000.parquet"]

    def test_on_another_device_nothing_is_sampled_again(
        self, tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By default a shard is two batches, which are larger on a GPU; the run remembers what they were."""
        tree |= {"generate": {k: v for k, v in tree["generate"].items() if k != "shard_prompts"}}
        monkeypatch.setattr("opentao.generate.default_rows", lambda device: 8)
        before = go(tmp_path / "run", tree).files()
        assert "round-0/eval/groups/00001.parquet" in before
        monkeypatch.setattr("opentao.generate.default_rows", lambda device: 1024)
        assert go(tmp_path / "run", tree).files() == before

    def test_other_answers_have_no_scores_yet(self, tree: Tree, tmp_path: Path) -> None:
        """`tao show` would put them beside the rewards of those before."""
        go(tmp_path / "run", tree)
        changed = Config.model_validate(tree | {"generate": tree["generate"] | {"temperature": 0.7}})
        with open_session(changed, tmp_path / "run", Progress(quiet=True)) as session:
            loop.sample_round(session, 1, loop.policy_before(session, 1))
            assert session.run.names("round-1/groups/") and not session.run.names("round-1/scores/")

    def test_an_empty_record_of_costs_is_none(self, tree: Tree, tmp_path: Path) -> None:
        """What a machine that lost power may leave."""
        go(tmp_path / "run", tree)
        (tmp_path / "run/round-1/spent.json").write_text("")
        assert go(tmp_path / "run", tree).summary["rounds"]

    def test_damaged_shard_is_made_again(self, tree: Tree, tmp_path: Path) -> None:
        case = go(tmp_path / "run", tree)
        before = case.files()
        (tmp_path / "run/round-1/groups/00000.parquet").write_bytes(b"rubbish")
        go(tmp_path / "run", tree)
        assert {n: b for n, (_, b) in case.files().items()} == {n: b for n, (_, b) in before.items()}

    def test_what_could_not_be_scored_at_all_is_scored_again(self, tree: Tree, tmp_path: Path) -> None:
        """The judge was down, with the same config it is there again. Nothing is sampled for it."""
        down = tmp_path / "down"
        down.mkdir()
        flaky = {"type": "toy_scorers:Flaky", "name": "judge", "args": {"down": str(down)}}
        once = {"type": "toy_scorers:Once", "name": "once", "weight": 0.5, "args": {"seen": str(tmp_path / "seen")}}
        tree |= {"scorers": [flaky, once]}
        with pytest.raises(
            ScoreError, match=r"of 32 answers could be scored \(judge: ConnectionError: nobody answers\)"
        ):
            go(tmp_path / "run", tree)
        name = "round-0/eval/groups/00000.parquet"
        sampled = files(tmp_path / "run")[name]
        down.rmdir()
        again = go(tmp_path / "run", tree)
        assert again.summary["unscored"] == {}
        assert again.summary["rounds"][0]["train"]["steps"] > 0
        assert again.files()[name] == sampled
        assert go(tmp_path / "run", tree).files() == again.files()
        tree["scorers"][1]["args"] = {"seen": str(tmp_path / "seen elsewhere")}
        assert go(tmp_path / "other", tree).summary["policy_hash"] == again.summary["policy_hash"]

    def test_another_version_of_a_scorers_code_scores_again(
        self, tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(str(tmp_path))
        module = tmp_path / "own_checks.py"
        scorer = {"type": "python", "name": "own", "args": {"function": "own_checks:rate"}}
        rates = []
        for body in ("0.25", "0.75"):
            module.write_text(f"def rate(prompt, text):\n    return {body}\n")
            sys.modules.pop("own_checks", None)
            rates.append(go(tmp_path / "run", tree | {"scorers": [scorer]}).summary["base"]["first_try"]["mean"])
        assert rates == [0.25, 0.75]

    def test_a_scorer_that_becomes_the_audit_leaves_the_reward(self, tree: Tree, tmp_path: Path) -> None:
        """And the other way round; scores of a run in which it stood elsewhere are not taken for these."""
        [scorer] = tree["scorers"]
        other = {"type": "length", "args": {"max": 3, "unit": "words"}}
        both = tree | {"scorers": [scorer, other], "audit": None}
        parted = tree | {"scorers": [scorer], "audit": other}
        there = [go(tmp_path / "run", t) for t in (both, parted, both)]
        for case, config in zip(there, (both, parted, both), strict=True):
            fresh = go(tmp_path / f"fresh-{len(list(tmp_path.iterdir()))}", config)
            assert case.summary["base"]["first_try"] == fresh.summary["base"]["first_try"]
            assert case.summary["base"]["audit"] == fresh.summary["base"]["audit"]
            assert case.summary["policy_hash"] == fresh.summary["policy_hash"]

    def test_another_audit_scores_no_training_answers_again(self, tree: Tree, tmp_path: Path) -> None:
        audits = [{"type": "length", "args": {"max": most, "unit": "words"}} for most in (3, 4)]
        before, after = (go(tmp_path / "run", tree | {"audit": audit}).files() for audit in audits)
        remade = {name.partition("/")[2] for name in before if before[name] != after[name]}
        assert any(name.startswith("eval/scores/") for name in remade)
        assert not any(name.startswith("scores/") for name in remade)

    def test_a_mistake_in_the_first_config_needs_no_other_directory(self, tree: Tree, tmp_path: Path) -> None:
        for wrong in ({"path": str(tmp_path / "absent.jsonl")}, {"split_by": "nobody"}):
            with pytest.raises(DataError):
                go(tmp_path / "run", tree | {"prompts": tree["prompts"] | wrong})
        with pytest.raises(ModelError):
            go(tmp_path / "run", tree | {"model": str(tmp_path / "absent")})
        assert go(tmp_path / "run", tree).summary["rounds"]

    def test_another_chat_template_samples_again(self, tree: Tree, tmp_path: Path) -> None:
        model = tmp_path / "model"
        shutil.copytree(tree["model"], model)
        tree |= {"model": str(model)}
        name = "round-0/eval/groups/00000.parquet"
        before = go(tmp_path / "run", tree).files()[name]
        template = model / "chat_template.jinja"
        template.write_text(template.read_text().replace("assistant", "agent"))
        assert go(tmp_path / "run", tree).files()[name] != before

    def test_another_task_is_refused(self, tree: Tree, tmp_path: Path) -> None:
        go(tmp_path / "run", tree)
        other = write_prompts(tmp_path / "other.jsonl", 20)
        with pytest.raises(StoreError, match="holds a run of another model or other prompts"):
            go(tmp_path / "run", tree | {"prompts": {"path": str(other)}})


class Killed(BaseException):
    """Nobody handles this one."""


def test_dies_around_every_entry_of_the_manifest(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with the file in place and not yet in the manifest, once right after. `scripts/kill_test.py` kills."""
    enter, died = Run._enter, set[tuple[str, str]]()

    def die(moment: str, name: str) -> None:
        if (moment, name) not in died:
            died.add((moment, name))
            raise Killed

    def dying(self: Run, entry: Tree) -> None:
        die("before", entry["path"])
        enter(self, entry)
        die("after", entry["path"])

    tree |= {"prompts_per_round": 3, "train": tree["train"] | {"epochs": 1, "save_every_steps": 1}}
    whole = go(tmp_path / "whole", tree)
    monkeypatch.setattr(Run, "_enter", dying)
    for _ in range(100):
        try:
            again = go(tmp_path / "killed", tree)
            break
        except Killed:
            pass
    assert len(died) >= 2 * 15
    assert {n: b for n, (_, b) in again.files().items()} == {n: b for n, (_, b) in whole.files().items()}
    assert again.summary["policy_hash"] == whole.summary["policy_hash"]
    assert again.summary["rounds"][0]["train"] == whole.summary["rounds"][0]["train"]


def test_a_kill_loses_no_costs_of_finished_stages(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the first round's evaluation: what it sampled and trained before is in the summary nevertheless."""
    whole = go(tmp_path / "whole", tree).summary["rounds"][0]
    evaluate = loop.evaluate

    def dying(session: Any, round_: int, *args: Any) -> Any:
        if round_ == 1:
            monkeypatch.setattr(loop, "evaluate", evaluate)
            raise Killed
        return evaluate(session, round_, *args)

    monkeypatch.setattr(loop, "evaluate", dying)
    with pytest.raises(Killed):
        go(tmp_path / "killed", tree)
    again = go(tmp_path / "killed", tree).summary["rounds"][0]
    assert again["tokens"] == whole["tokens"]
    assert all(again["tokens"][stage] > 0 and again["seconds"][stage] > 0 for stage in STAGES)
    assert go(tmp_path / "killed", tree).summary["rounds"][0]["seconds"] == again["seconds"]


def test_prompts_that_are_alike_count_together(tree: Tree, tmp_path: Path) -> None:
    """Held-out prompts in pairs that differ in their last word: half as many independent ones."""
    heldout = tmp_path / "heldout.jsonl"
    texts = [" ".join(f"{word}{k}" for word in WORDS) + f" {day}" for k in range(4) for day in ("today", "tomorrow")]
    heldout.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    tree["prompts"] |= {"heldout_path": str(heldout), "near_duplicate": 0.8}
    config = Config.model_validate(tree)
    with open_session(config, tmp_path / "run", Progress(quiet=True)) as session:
        assert session.alike is not None and len(set(session.alike)) == 4
        clusters = session.interval_args["clusters"]
        by_prompt = {p.text: c for p, c in zip(session.heldout, clusters, strict=True)}
        assert all(by_prompt[a] == by_prompt[b] for a, b in zip(texts[::2], texts[1::2], strict=True))
    case = go(tmp_path / "run", tree)
    assert case.summary["intervals_over"] == "clusters of like prompts"
    assert "bootstrap intervals over clusters of like prompts." in (tmp_path / "run/report.html").read_text()


def test_a_trained_run_is_not_asked_whether_to_train(tree: Tree, tmp_path: Path) -> None:
    """A prediction that is called flat asks before anything was trained; a no would be said over a finished verdict."""
    tree |= {"evaluate": tree["evaluate"] | {"base_group_size": 8}, "audit": scored_by(tree, "chance")["scorers"][0]}
    asked: list[str] = []
    case = go(tmp_path, tree, go_on=lambda why: not asked.append(why))
    assert len(asked) == 1 and case.summary["rounds"]
    again = go(tmp_path, tree, go_on=lambda why: False)
    assert again.summary["rounds"] == case.summary["rounds"]


class TestKeepBase:
    def test_reward_by_chance(self, tree: Tree, tmp_path: Path) -> None:
        tree["evaluate"] |= {"confidence": 0.99}
        summary = go(tmp_path, scored_by(tree, "chance")).summary
        assert summary["rounds"][0]["train"]["steps"] > 0
        assert summary["verdict"] == "keep base"
        assert summary["why"].startswith("No round beats the base beyond doubt")
        assert (summary["best_round"], summary["policy"]) == (0, None)

    def test_equal_scores_everywhere(self, tree: Tree, tmp_path: Path) -> None:
        case = go(tmp_path, scored_by(tree, "constant"))
        assert case.summary["why"] == "No step was taken: all rewards are equal in every group."
        assert case.summary["verdict"] == "keep base"
        assert case.summary["base"]["first_try"]["mean"] == 0.5
        assert any("all rewards are equal in every group: no step taken" in note for note in case.notes)

    def test_audit_that_falls(self, tree: Tree, tmp_path: Path) -> None:
        tree["audit"] = {"type": "contains", "args": {"strings": ["honest"]}}
        summary = go(tmp_path, scored_by(tree, "letters"), engine=Gamed()).summary
        assert summary["verdict"] == "keep base"
        assert summary["why"].startswith("Round 1 was stopped as over-optimised: against the base its reward moves")
        assert [r["round"] for r in summary["rounds"]] == [1] and summary["policy"] is None


class Leaves(FakeEngine):
    """After groups of three, the scorer `Flaky` is not there any more."""

    def __init__(self, down: Path) -> None:
        self.down = down
        super().__init__(lambda prompt, seed: "ab1"[seed % 3] * 3)

    def sample(self, prompts: Sequence[Prompt], plan: SamplingPlan) -> Iterator[Group]:
        yield from super().sample(prompts, plan)
        if plan.group_size == 3:
            self.down.mkdir(exist_ok=True)


class TestNothingToCompare:
    """No verdict where nothing was measured: the run ends with an error, and goes on once that is mended."""

    def test_scorer_that_always_raises(self, tree: Tree, tmp_path: Path) -> None:
        with pytest.raises(ScoreError) as error:
            go(tmp_path, scored_by(tree, "broken"))
        assert str(error.value) == (
            "base: held-out: none of 32 answers could be scored (judge: RuntimeError: the judge is down);"
            " what was sampled is kept: mend that and start again"
        )
        assert not (tmp_path / "round-1").exists() and not (tmp_path / "summary.json").exists()
        table = rows(tmp_path, "round-0/eval/scores/00000.parquet")
        assert {row["error"] for row in table if row["scorer"] == "judge"} == {"RuntimeError: the judge is down"}
        assert {row["value"] for row in table if row["scorer"] == "judge"} == {None}
        assert go(tmp_path, scored_by(tree, "letters")).summary["rounds"][0]["train"]["steps"] > 0

    def test_audit_that_always_raises(self, tree: Tree, tmp_path: Path) -> None:
        tree["audit"] = {"type": "python", "args": {"function": "toy_scorers:broken"}}
        with pytest.raises(
            ScoreError, match=r"none of 32 answers could be scored by the audit \(audit: RuntimeError: "
        ):
            go(tmp_path, scored_by(tree, "letters"))

    def test_scorer_that_goes_away(self, tree: Tree, tmp_path: Path) -> None:
        """It scored the base and nothing of the round: no policy of that round, until it is there again."""
        down = tmp_path / "down"
        scorer = {"type": "toy_scorers:Flaky", "name": "judge", "args": {"down": str(down)}}

        tree |= {"scorers": [scorer], "generate": tree["generate"] | {"group_size": 3}}
        engine = Leaves(down)
        with pytest.raises(ScoreError, match=r"^round 1: none of 18 answers could be scored \(judge: "):
            go(tmp_path / "run", tree, engine=engine)
        assert not (tmp_path / "run/round-1/policy").exists()
        down.rmdir()
        assert go(tmp_path / "run", tree, engine=engine).summary["unscored"] == {}

    def test_scorer_that_goes_away_in_a_later_round(self, tree: Tree, tmp_path: Path) -> None:
        """The rounds before it are judged, and it goes on from there."""
        down = tmp_path / "down"
        scorer = {"type": "toy_scorers:Flaky", "name": "judge", "args": {"down": str(down)}}

        tree |= {"scorers": [scorer], "rounds": 2, "later_rounds": {"generate": {"group_size": 3}}}
        engine = Leaves(down)
        summary = go(tmp_path / "run", tree, engine=engine).summary
        assert [r["round"] for r in summary["rounds"]] == [1]
        assert summary["why"].startswith("round 2: none of 18 answers could be scored (judge: ConnectionError: nobody")
        down.rmdir()
        again = go(tmp_path / "run", tree, engine=engine).summary
        assert [r["round"] for r in again["rounds"]] == [1, 2] and again["unscored"] == {}

    def test_no_prompt_can_be_answered(self, tree: Tree, tmp_path: Path) -> None:
        """The tiny model's context is 512 tokens."""
        long = write_prompts(tmp_path / "p.jsonl", 0, tuple(f"{word} " * 600 for word in WORDS))
        with pytest.raises(
            ScoreError, match=r"^base: held-out: none of \d+ prompts could be answered \(prompt_too_long"
        ):
            go(tmp_path / "run", tree | {"prompts": tree["prompts"] | {"path": str(long)}})


class Gamed(FakeEngine):
    """The base's answers are honest and score less; a tuned policy's are not, and score more."""

    def __init__(self) -> None:
        self.loaded: set[str] = set()
        super().__init__(lambda prompt, seed: "honest" + "1" * (seed % 3) if len(self.loaded) < 2 else "flattery")

    def load(self, policy: Any) -> None:
        self.loaded.add(policy.hash)
        super().load(policy)


def rows(directory: Path, name: str) -> list[Tree]:
    with Run(directory, read_only=True) as run:
        return run.read_table(name).to_pylist()


class TestBadInput:
    def test_group_in_which_nothing_is_scored(self, tree: Tree, tmp_path: Path) -> None:
        """Prompts that the scorer cannot judge are counted and left out; the others train."""
        mixed = write_prompts(tmp_path / "p.jsonl", 20, tuple(f"unscorable {w} case" for w in ("one", "two", "three")))
        tree |= {"prompts": tree["prompts"] | {"path": str(mixed)}, "prompts_per_round": 30}
        case = go(tmp_path / "run", scored_by(tree, "letters_or_nothing"))
        summary = case.summary
        train = summary["rounds"][0]["train"]
        num_unscorable = train["groups"] - train["informative"]
        assert 0 < num_unscorable <= 3
        assert train["steps"] > 0
        assert summary["unscored"]["judge"] >= 4 * num_unscorable
        said = (
            f"round 1: score: {4 * num_unscorable} of {4 * train['groups']} answers unscored, most for judge: no_score:"
        )
        assert any(note.startswith(said) for note in case.notes)
        assert summary["base"]["first_try"]["n"] == summary["prompts"]["heldout"] - (3 - num_unscorable)

    def test_prompt_longer_than_the_context(self, tree: Tree, tmp_path: Path) -> None:
        """The tiny model's context is 512 tokens. Such prompts on both sides are counted; the run completes."""
        long = tuple(f"{word} " * 600 for word in ("parcel", "refund", "order", "link", "mail", "price", "late", "app"))
        mixed = write_prompts(tmp_path / "p.jsonl", 20, long)
        tree |= {"prompts": tree["prompts"] | {"path": str(mixed), "max_heldout": 30}, "prompts_per_round": 30}
        case = go(tmp_path / "run", tree)
        summary = case.summary
        train = 28 - summary["prompts"]["heldout"]
        assert summary["prompts"] == {"train": train, "heldout": 28 - train, "sampled": train, "unused": 0}
        heldout = summary["prompts"]["heldout"] - summary["base"]["first_try"]["n"]
        assert 0 < heldout < 8  # both sides have some
        said = f"base: held-out: {heldout} of {28 - train} prompts could not be answered (prompt_too_long {heldout})"
        assert said in case.notes
        assert summary["failures"] == {"prompt_too_long": 2 * heldout + (8 - heldout)}  # two evaluations, one round
        assert summary["rounds"][0]["train"]["steps"] > 0
        assert summary["rounds"][0]["kl"]["n"] == summary["base"]["first_try"]["n"]

    def test_no_audit(self, tree: Tree, tmp_path: Path) -> None:
        summary = go(tmp_path, tree | {"audit": None}).summary
        assert summary["audit"] is None
        assert summary["rounds"][0]["audit"] is None


def test_prompts_that_no_round_reached(tree: Tree, tmp_path: Path) -> None:
    summary = go(tmp_path, tree | {"prompts_per_round": 5, "rounds": 2}).summary
    numbers = summary["prompts"]
    assert numbers["sampled"] == 10
    assert numbers["unused"] == 40 - numbers["heldout"] - 10  # held-out ones over max_heldout are among them
    assert summary["config"] == (tmp_path / "config.yaml").read_text()


def test_weights_that_break_while_they_are_trained(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out when the round is measured; the rounds before it are judged."""
    measure = loop.measure

    def breaking(session: Any, round_: int, *args: Any, **kwargs: Any) -> Any:
        if round_ == 2:
            raise BrokenModelError("the model's logits are not finite")
        return measure(session, round_, *args, **kwargs)

    monkeypatch.setattr(loop, "measure", breaking)
    case = go(tmp_path, tree | {"rounds": 2})
    assert [r["round"] for r in case.summary["rounds"]] == [1]
    assert case.summary["why"].startswith("the model's logits are not finite. ")
    assert "round 2 is not judged: the model's logits are not finite" in case.notes


def test_an_engine_that_breaks_in_a_later_round(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first one it is an error, and no "keep base"; what is measured before another one is judged."""
    sample, breaking = loop.sample_round, 1

    def broken(session: Any, round_: int, policy: Any) -> Any:
        if round_ == breaking:
            raise BrokenModelError("the model's logits are not finite")
        return sample(session, round_, policy)

    monkeypatch.setattr(loop, "sample_round", broken)
    with pytest.raises(BrokenModelError):
        go(tmp_path, tree | {"rounds": 2})
    breaking = 2
    case = go(tmp_path, tree | {"rounds": 2})
    assert [r["round"] for r in case.summary["rounds"]] == [1]
    assert case.summary["why"].startswith("the model's logits are not finite. ")


def test_kl_is_not_measured_on_answers_from_a_cut_distribution(tree: Tree, tmp_path: Path) -> None:
    case = go(tmp_path, tree | {"generate": tree["generate"] | {"top_p": 0.9}})
    assert case.summary["rounds"][0]["kl"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert case.summary["rounds"][0]["first_try"]["n"] > 0
    assert (tmp_path / "report.html").exists()


class TestNotANumber:
    """The loss turns NaN: training stops, the last good policy is kept, the summary says why."""

    @pytest.fixture
    def nan_from(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], bool]], None]:
        def install(now: Callable[[], bool]) -> None:
            good = OBJECTIVES["distill"]

            def loss(credit: Any, totals: Any, config: Any) -> torch.Tensor:
                value = good.loss(credit, totals, config)
                return value * float("nan") if now() else value

            monkeypatch.setitem(OBJECTIVES, "distill", Objective(loss, good.choose, good.needs_reference))

        return install

    def test_in_the_first_round(self, tree: Tree, tmp_path: Path, nan_from: Any) -> None:
        nan_from(lambda: True)
        case = go(tmp_path, tree)
        assert case.summary["verdict"] == "keep base"
        assert case.summary["rounds"] == []
        assert case.summary["why"].startswith("step 0: loss nan")
        spent = json.loads((tmp_path / "round-1/spent.json").read_text())["seconds"]
        before = sum(case.summary["base"]["seconds"].values())
        assert case.summary["seconds"] >= before + sum(spent.values()) > before
        assert "last good policy kept" in case.summary["why"]
        assert not (tmp_path / "round-1/policy").exists()
        assert (tmp_path / "report.html").exists()
        assert any(note.startswith("round 1 is not judged: step 0: loss nan") for note in case.notes)

    def test_in_the_second_round_and_then_no_more(
        self, finished: Case, tmp_path: Path, nan_from: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tree = finished.config.model_dump(mode="json")
        nan_from((tmp_path / "round-1/policy").exists)
        case = go(tmp_path, tree)
        assert [r["round"] for r in case.summary["rounds"]] == [1]
        assert case.summary["rounds"][0]["policy"] == finished.summary["rounds"][0]["policy"]
        assert "loss nan" in case.summary["why"]
        assert not (tmp_path / "round-2/policy").exists()
        monkeypatch.undo()
        again = go(tmp_path, tree)
        assert again.summary["policy_hash"] == finished.summary["policy_hash"]
        assert again.summary["verdict"] == "promote"


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "regress", "row_tokens": 64},
        {"objective": "prefer"},
        {"objective": "online"},
        {"objective": "regress", "method": "lora", "lora": {"rank": 2, "alpha": 4}},
    ],
    ids=lambda s: "-".join(str(v) for v in s.values() if isinstance(v, str)),
)
def test_every_objective_runs_two_rounds(tree: Tree, tmp_path: Path, settings: Tree) -> None:
    tree |= {"rounds": 2, "train": {"learning_rate": 1e-2, "prompts_per_step": 2, "epochs": 1} | settings}
    case = go(tmp_path, tree)
    assert [r["train"]["steps"] for r in case.summary["rounds"]] == [3, 3]
    assert len({r["policy"] for r in (case.summary["base"], *case.summary["rounds"])}) == 3
    assert go(tmp_path, tree, engine=NoEngine()).summary == case.summary


def test_dry_run_with_the_fake_engine(tree: Tree, tmp_path: Path) -> None:
    """The engine is a plug-in: given answers instead of sampled ones, everything else is real."""
    engine = FakeEngine(["letters only", "12345", "half 123", "?"])
    summary = go(tmp_path, tree, engine=engine).summary
    assert summary["rounds"][0]["train"]["steps"] > 0
    assert summary["base"]["best_of"]["4"]["mean"] > summary["base"]["first_try"]["mean"]
