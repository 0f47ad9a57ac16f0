"""Scorers that judge an answer by the others of its group: what they say of two policies must compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_loop import go
from tiny import tiny_config, write_prompts

from opentao.bestofn import paired_difference
from opentao.config import Config
from opentao.errors import ConfigError
from opentao.evaluate import company
from opentao.policy import Policy
from opentao.progress import Progress
from opentao.scorers.calibration import Scaled
from opentao.scorers.judge.scorer import Judge
from opentao.scorers.run import is_relative, run_scorer_among, score_groups
from opentao.scorers.verifiers.length import Length
from opentao.scorers.verifiers.majority import Majority
from opentao.scorers.verifiers.sql import Sql
from opentao.session import open_session
from opentao.store import Run, attach_scores, table_to_groups
from opentao.types import Failure, Group, Prompt, Score

Tree = dict[str, Any]


@dataclass(kw_only=True)
class LengthRank:
    """Share of the group's other answers that are shorter, equal ones half: 0.5 on average, whatever they are."""

    name: str
    relative: bool = True
    largest_group: int | None = None

    def score(self, group: Group) -> list[float | None]:
        lengths = np.array([len(r.text) for r in group.responses])
        if len(lengths) < 2:
            return [None] * len(lengths)
        below = (lengths[None, :] < lengths[:, None]).sum(1) + ((lengths[None, :] == lengths[:, None]).sum(1) - 1) / 2
        return (below / (len(lengths) - 1)).tolist()


def few(name: str) -> LengthRank:
    return LengthRank(name=name, largest_group=3)


def group(texts: list[str], prompt: str = "How many?") -> Group:
    return Group.of_texts(Prompt.from_text(prompt), texts)


def values(scores: tuple[Score, ...]) -> list[float]:
    return [s.value for s in scores]


def test_which_are_relative() -> None:
    judges = {
        mode: Judge(name="j", url="http://localhost", model="m", mode=mode, cache="")
        for mode in ("listwise", "pairwise", "pointwise")
    }
    assert [is_relative(j) for j in judges.values()] == [True, True, False]
    assert [judges[m].largest_group for m in judges] == [16, None, None]
    assert is_relative(Majority(name="m")) and not is_relative(Length(name="l", max=1, unit="words"))
    assert is_relative(Sql(name="s", database="x.sqlite"))
    assert not is_relative(Sql(name="s", database="x.sqlite", levels={"runs": 1.0}))
    assert is_relative(Scaled(name="m", scorer=Majority(name="m"), scale=2.0))


def test_each_answer_alone_takes_the_place_of_one_of_the_company() -> None:
    """Company 7 7 7 5. "5" in place of the first: 5 7 7 5, a tie, both win. In place of the last: 7 7 7 5, it loses."""
    others = group(["7", "7", "7", "5"])
    majority = Majority(name="m")
    assert [values(s) for s in run_scorer_among(majority, [group(["5", "7", "9", "5"])], [others])] == [[1, 1, 0, 0]]
    # More answers than places, and a group that agrees with itself alone wins nothing.
    assert values(run_scorer_among(majority, [group(["9"] * 5)], [others])[0]) == [0, 0, 0, 0, 0]


def test_the_companys_own_answers_score_as_they_did() -> None:
    others = group(["a", "bb", "ccc", "a"])
    for scorer in (Majority(name="m"), Majority(name="m", as_share=True), LengthRank(name="r")):
        [own] = score_groups([others], [scorer], {scorer.name: 1.0})
        [among] = score_groups([others], [scorer], {scorer.name: 1.0}, companies=[others])
        assert among.rewards_N == own.rewards_N


def test_only_relative_scorers_are_asked_so() -> None:
    others, own = group(["a b c"] * 3), group(["one", "one two"])
    scorers = [Length(name="length", max=1, unit="words"), LengthRank(name="rank")]
    [found] = score_groups([own], scorers, {"length": 1.0}, companies=[others])
    [plain] = score_groups([own], scorers[:1], {"length": 1.0})
    assert found.scores["length"] == plain.scores["length"]
    assert values(found.scores["rank"]) == [0.0, 1.0]  # 3 and 7 characters beside two answers of 5


def test_failed_groups_and_failed_company() -> None:
    failed = Group(prompt=Prompt.from_text("a"), failure=Failure(kind="prompt_too_long", message="9 > 8"))
    lonely = Group.of_texts(Prompt.from_text("b"), ["x"])
    rank = LengthRank(name="rank")
    nobody = Group(prompt=Prompt.from_text("b"), failure=Failure(kind="prompt_too_long", message="9 > 8"))
    found = run_scorer_among(rank, [failed, lonely, group(["x"])], [group(["y"]), nobody, group(["yy", "zz"])])
    assert found[0] == ()
    assert found[1][0].error == "prompt_too_long: 9 > 8"
    assert values(found[2]) == [0.0]


@pytest.mark.parametrize("num_answers", [2, 6, 30, 120, 300])
@pytest.mark.parametrize("as_share", [False, True])
def test_an_unchanged_policy_gains_nothing(num_answers: int, as_share: bool) -> None:
    """Groups of 16 and of 4, from one distribution: in groups of their own, 4 agree more often by chance."""
    rng = np.random.default_rng(num_answers)
    scorer = Majority(name="m", as_share=as_share, least=1 if as_share else 2)

    def sampled(n: int) -> list[Group]:
        return [group([str(rng.integers(num_answers)) for _ in range(n)], str(i)) for i in range(400)]

    def means(groups: list[Group], companies: list[Group] | None) -> list[float]:
        found = score_groups(groups, [scorer], {"m": 1.0}, companies=companies)
        return [float(np.mean(g.rewards_N)) for g in found]

    base, after = sampled(16), sampled(4)
    fair = paired_difference(means(after, base), means(base, None))
    alone = paired_difference(means(after, None), means(base, None))
    assert fair.n == 400
    assert abs(fair.mean) < 0.03
    if num_answers == 2 or (as_share and num_answers == 6):
        assert alone.low > 0.05  # what it would have been


@pytest.fixture
def tree(tiny_model_dir: Path, tmp_path: Path) -> Tree:
    rank = {"type": "test_relative:LengthRank", "name": "rank"}
    return tiny_config(tiny_model_dir, write_prompts(tmp_path / "prompts.jsonl")) | {
        "rounds": 1,
        "scorers": [rank],
        "audit": {"type": "majority", "args": {"least": 1}},
        "generate": {"group_size": 4, "max_new_tokens": 8},
        "evaluate": {"base_group_size": 8, "group_size": 2, "bootstrap": 200},
    }


def test_a_run_judges_every_policy_among_the_bases_answers(tree: Tree, tmp_path: Path) -> None:
    """By brute force from the files; the base's own mean rank is a half, the greedy answers have a score too."""
    case = go(tmp_path / "run", tree)
    base, own = case.summary["base"], case.summary["rounds"][0]
    assert base["first_try"]["mean"] == pytest.approx(0.5)
    assert own["first_try"]["mean"] != pytest.approx(0.5, abs=1e-6)
    assert own["greedy"]["n"] == base["greedy"]["n"] == own["first_try"]["n"] == case.summary["prompts"]["heldout"]

    with Run(case.directory, read_only=True) as run:
        others = {g.prompt.id: g for g in read(run, "round-0/eval/groups/")}
        assert all(len(g.responses) == 8 for g in others.values())
        for folder in ("round-1/eval/groups/", "round-1/eval/greedy/", "round-0/eval/greedy/"):
            for group_ in read(run, folder):
                for j, response in enumerate(group_.responses):
                    lengths = [len(r.text) for r in others[group_.prompt.id].responses]
                    del lengths[j]
                    own_length = len(response.text)
                    rank = np.mean([(n < own_length) + (n == own_length) / 2 for n in lengths])
                    assert group_.rewards_N[j] == pytest.approx(rank)


def read(run: Run, folder: str) -> list[Group]:
    other = folder.replace("/groups/", "/scores/").replace("/greedy/", "/greedy-scores/")
    names = run.names(folder)
    return [
        group_
        for name in names
        for group_ in attach_scores(
            table_to_groups(run.read_table(name)), run.read_table(other + name.removeprefix(folder))
        )
    ]


def test_canaries_stand_among_the_bases_answers_too(tree: Tree, tmp_path: Path) -> None:
    case = go(tmp_path / "run", tree)
    with Run(case.directory, read_only=True) as run:
        canaries = run.read_json("canaries.json")
        others = read(run, "round-0/eval/groups/")[:16]
    empty = [np.mean([len(r.text) == 0 for r in g.responses[1:]]) / 2 for g in others]  # shorter than all but its like
    assert canaries["empty"] == pytest.approx(empty)


def test_without_relative_scorers_there_is_no_company(tree: Tree, tmp_path: Path) -> None:
    config = Config.model_validate(
        tree | {"scorers": [{"type": "length", "args": {"max": 3, "unit": "words"}}], "audit": None}
    )
    with open_session(config, tmp_path / "run", Progress(quiet=True)) as session:
        assert company(session, Policy.of_base(config.model)) == []


def test_groups_that_a_scorer_cannot_take_are_refused_before_sampling(tree: Tree, tmp_path: Path) -> None:
    config = Config.model_validate(tree | {"scorers": [{"type": "test_relative:few", "name": "rank"}]})
    with (
        pytest.raises(ConfigError, match=r"generate\.group_size: 4 answers, but scorer rank takes at most 3 at once"),
        open_session(config, tmp_path / "run", Progress(quiet=True)),
    ):
        pass
