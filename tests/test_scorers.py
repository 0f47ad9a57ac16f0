"""Finding scorers, running them over a group, and making rewards of what they return."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opentao.config import ScorerConfig
from opentao.errors import ConfigError
from opentao.scorers import registry
from opentao.scorers.plugin import MAX_MESSAGE, call_plugin, import_object, unscored
from opentao.scorers.registry import BUILT_IN, build_scorer, known_types
from opentao.scorers.run import combine, run_scorer, run_scorer_many, score_groups, to_score
from opentao.session import _fingerprint
from opentao.store import REWARD, attach_scores, scores_to_table
from opentao.types import NAN, Failure, Group, Prompt, Response, Score

PLUGIN = '''
"""A user's module."""


class Shouting:
    def __init__(self, *, name, mark="!"):
        if not mark:
            raise ValueError("mark: expected one character")
        self.name, self.mark = name, mark

    def score(self, group):
        return [float(r.text.count(self.mark)) for r in group.responses]


def build(name, **args):
    return Shouting(name=name, **args)


def judge(group):
    return [0.0 for _ in group.responses]


def half_built(name):
    return {"name": name}


def misnamed(name):
    return Shouting(name="other")


INSTANCE = Shouting(name="x")
'''


class Fixed:
    """Returns what it was given, or calls it."""

    def __init__(self, values: Any, name: str = "fixed") -> None:
        self.name, self.values = name, values

    def score(self, group: Group) -> Any:
        return self.values(group) if callable(self.values) else self.values


def group_of(num_responses: int, failure: Failure | None = None) -> Group:
    responses = tuple(
        Response(id=f"r{i}", text="Yes!" * i, tokens_R=(1,), sampler_logprobs_R=(-1.0,), finish="stop")
        for i in range(num_responses)
    )
    return Group(prompt=Prompt.from_text("Is it so?"), responses=responses, failure=failure)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module `tao_test_plugin` in a folder of its own."""
    (tmp_path / "tao_test_plugin.py").write_text(PLUGIN)
    yield tmp_path
    sys.modules.pop("tao_test_plugin", None)


def install(folder: Path, dist: str, name: str, target: str) -> None:
    info = folder / f"{dist}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[opentao.scorers]\n{name} = {target}\n")


def refused(match: str, **config: Any) -> str:
    with pytest.raises(ConfigError, match=match) as caught:
        build_scorer(ScorerConfig(**config))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- finding


def test_every_built_in_verifier_can_be_imported() -> None:
    for name, path in BUILT_IN.items():
        if name != "reward_model":
            assert callable(import_object(path))
    assert set(BUILT_IN) <= set(known_types())


def test_importing_the_registry_is_light() -> None:
    import subprocess

    code = (
        "import sys, opentao.scorers.registry; print([m for m in ('torch', 'jsonschema', 'regex') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reward_model_is_imported_late_and_called_with_name_and_args(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def factory(**args: Any) -> Fixed:
        seen.update(args)
        return Fixed([], name=args["name"])

    monkeypatch.setattr(registry, "import_object", {BUILT_IN["reward_model"]: factory}.__getitem__)
    build_scorer(ScorerConfig(type="reward_model", args={"path": "rm"}))
    assert seen == {"name": "reward_model", "path": "rm"}


@pytest.mark.parametrize("target", ["tao_test_plugin:Shouting", "tao_test_plugin:build"])
def test_module_object_in_the_current_directory(target: str, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(plugin)
    path_before = list(sys.path)
    scorer = build_scorer(ScorerConfig(type=target, name="loud", args={"mark": "e"}))
    assert sys.path == path_before
    assert scorer.name == "loud"
    assert [s.value for s in run_scorer(scorer, group_of(3))] == [0.0, 1.0, 2.0]


def test_the_current_directory_leaves_the_path_when_an_import_fails(
    plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plugin / "tao_test_broken.py").write_text("raise RuntimeError('boom')")
    monkeypatch.chdir(plugin)
    path_before = list(sys.path)
    with pytest.raises(RuntimeError, match="boom"):  # a bug of the user's: shown as it is
        import_object("tao_test_broken:x")
    assert sys.path == path_before


def test_entry_point(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(plugin, "loudness", "shouting", "tao_test_plugin:Shouting")
    monkeypatch.syspath_prepend(plugin)
    assert "shouting" in known_types()
    scorer = build_scorer(ScorerConfig(type="shouting", args={"mark": "!"}))
    assert (scorer.name, [s.value for s in run_scorer(scorer, group_of(3))]) == ("shouting", [0.0, 1.0, 2.0])
    install(plugin, "louder", "shouting", "tao_test_plugin:build")
    refused("several installed packages offer it: tao_test_plugin:Shouting, tao_test_plugin:build", type="shouting")


def test_another_version_of_an_installed_scorer_is_another_scorer(
    plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it scored before counts no more."""
    install(plugin, "loudness", "shouting", "tao_test_plugin:Shouting")
    monkeypatch.syspath_prepend(plugin)
    config = ScorerConfig(type="shouting", args={"mark": "!"})
    build_scorer(config)
    before = _fingerprint(config)
    assert _fingerprint(config) == before
    (plugin / "tao_test_plugin.py").write_text(f"{PLUGIN}\n# version 2\n")
    assert _fingerprint(config) != before


def test_another_commit_of_a_hubs_reward_model_is_another_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ScorerConfig(type="reward_model", args={"model": "someone/rewards"})
    found = []
    for commit in ("a" * 40, "b" * 40):
        monkeypatch.setattr("opentao.session.hub_commit", lambda name, commit=commit: commit)
        found.append(_fingerprint(config))
    assert found[0] != found[1]


def test_a_built_in_name_wins_over_an_entry_point(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(plugin, "loudness", "regex", "tao_test_plugin:Shouting")
    monkeypatch.syspath_prepend(plugin)
    assert type(build_scorer(ScorerConfig(type="regex", args={"pattern": "a"}))).__name__ == "Regex"


def test_config_errors(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(plugin)
    message = refused("^scorer jsonschema: unknown type; expected one of: citation, contains, exact", type="jsonschema")
    assert all(name in message for name in BUILT_IN) and "module:object" in message
    refused(r"^scorer q \(type regex\): patern: Unexpected keyword argument; expected args: pattern, full",
            type="regex", name="q", args={"pattern": "a", "patern": "a"})  # fmt: skip
    refused("No module named 'tao_nothing'; known types: citation", type="tao_nothing:x")
    refused("no attribute 'Quiet'", type="tao_test_plugin:Quiet")
    refused("not of the form module:name", type=":x")
    refused("not of the form module:name", type=".tao_test_plugin:x")
    refused("unexpected keyword argument 'volume'; expected args: mark", type="tao_test_plugin:Shouting",
            args={"volume": 3})  # fmt: skip
    refused("mark: expected one character", type="tao_test_plugin:Shouting", args={"mark": ""})
    refused("multiple values for keyword argument 'name'", type="tao_test_plugin:Shouting", args={"name": "x"})
    refused("unexpected keyword argument 'name'; expected args: group", type="tao_test_plugin:judge")
    refused("gave dict without `name` and `score`; expected object", type="tao_test_plugin:half_built")
    refused(
        "its `name` is 'other', expected the name it was given, 'mine'", type="tao_test_plugin:misnamed", name="mine"
    )
    refused("is Shouting, expected a class or function", type="tao_test_plugin:INSTANCE")


def test_the_name_of_the_combined_number_is_reserved() -> None:
    assert registry.RESERVED == REWARD
    refused("'reward' is the name of the combined number", type="regex", name="reward", args={"pattern": "a"})


# --- running


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, 0.5),
        (3, 3.0),
        (True, 1.0),
        (False, 0.0),
        (-0.0, 0.0),
        (Decimal("0.25"), 0.25),
        (np.float32(0.5), 0.5),
        (np.int64(2), 2.0),
        (np.bool_(True), 1.0),
        (np.array(0.5), 0.5),
        (Score(value=0.5), 0.5),
        (Score(value=1), 1.0),
    ],
)
def test_numbers(value: Any, expected: float) -> None:
    score = to_score(value)
    assert score == Score(value=expected)
    assert type(score.value) is float


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (None, "no_score: the scorer returned None"),
        (NAN, "no_score: the scorer returned NaN"),
        (np.float64("nan"), "no_score: the scorer returned NaN"),
        (float("inf"), "not_finite: inf"),
        (float("-inf"), "not_finite: -inf"),
        (Decimal("Infinity"), "not_finite: inf"),
        (10**400, "OverflowError: int too large to convert to float"),
        ("1.0", "not_a_number: the scorer returned str"),
        (b"1", "not_a_number: the scorer returned bytes"),
        ([1.0], "not_a_number: the scorer returned list"),
        (1j, "not_a_number: the scorer returned complex"),
        (Score(value=NAN), "no_score: the scorer returned NaN"),
        (Score(value=float("inf")), "not_finite: inf"),
        (Score(value=None), "no_score: the scorer returned None"),  # type: ignore[arg-type]
        (Score(value=NAN, error="timeout: 30 s"), "timeout: 30 s"),
        (Score(value=0.0, error="timeout: 30 s"), "timeout: 30 s"),  # a failure with a number on it is a failure
        (Score(value=NAN, error="a\nb"), "a b"),
        (Score(value=NAN, error=""), "unknown: no reason given"),
    ],
)
def test_what_is_not_a_number_is_unscored(value: Any, error: str) -> None:
    score = to_score(value)
    assert not score.scored and score.error == error


def test_an_array_in_place_of_a_number() -> None:
    assert to_score(np.array([1.0, 2.0])).error.startswith("TypeError: ")


def test_each_value_stands_alone() -> None:
    found = run_scorer(Fixed([1, None, "x", 0.25]), group_of(4))
    assert [s.value for s in found if s.scored] == [1.0, 0.25]
    assert [s.scored for s in found] == [True, False, False, True]


@pytest.mark.parametrize(
    "values", [np.array([0.5, 1.0]), (0.5, 1.0), {0.5: 0, 1.0: 0}, lambda g: (x for x in (0.5, 1.0))]
)
def test_any_iterable_of_numbers_will_do(values: Any) -> None:
    assert run_scorer(Fixed(values), group_of(2)) == (Score(value=0.5), Score(value=1.0))


@pytest.mark.parametrize("num_values", [0, 1, 3])
def test_wrong_length(num_values: int) -> None:
    found = run_scorer(Fixed([1.0] * num_values), group_of(2))
    assert [s.error for s in found] == [f"wrong_length: {num_values} values for 2 responses"] * 2
    assert not any(s.scored for s in found)


def raising(error: BaseException) -> Callable[[Group], Any]:
    def score(group: Group) -> Any:
        raise error

    return score


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


def late(group: Group) -> Iterator[float]:
    yield 1.0
    raise ZeroDivisionError("late")


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (raising(ValueError("bad\n  answer")), "ValueError: bad answer"),
        (raising(TimeoutError()), "TimeoutError: no message"),
        (raising(ValueError("lone \ud800")), "ValueError: lone \\ud800"),
        (raising(Unprintable()), "Unprintable: <exception str() failed>"),
        (late, "ZeroDivisionError: late"),
        (None, "TypeError: 'NoneType' object is not iterable"),
        (1.0, "TypeError: 'float' object is not iterable"),
    ],
)
def test_a_scorer_that_raises_leaves_its_group_unscored(values: Any, error: str) -> None:
    found = run_scorer(Fixed(values), group_of(2))
    assert [s.error for s in found] == [error] * 2
    assert not any(s.scored for s in found)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes(error: type[BaseException]) -> None:
    with pytest.raises(error):
        run_scorer(Fixed(raising(error())), group_of(1))


def test_messages_are_cut() -> None:
    assert len(unscored("long", "x" * 10_000).error) == MAX_MESSAGE
    assert len(call_plugin(raising(ValueError("x" * 10_000)), group_of(1)).error) == MAX_MESSAGE


def test_groups_with_nothing_to_score() -> None:
    scorer = Fixed(raising(AssertionError("must not be called")))
    assert run_scorer(scorer, group_of(0)) == ()
    failure = Failure(kind="prompt_too_long", message="9001 > 8192")
    assert run_scorer(scorer, group_of(0, failure)) == ()
    assert [s.error for s in run_scorer(scorer, group_of(2, failure))] == ["prompt_too_long: 9001 > 8192"] * 2


# --- combining


def row(*values: float) -> tuple[Score, ...]:
    return tuple(Score(value=v) for v in values)


def same(left: list[float], right: list[float]) -> bool:
    return np.array_equal(left, right, equal_nan=True)


def test_combine_by_hand() -> None:
    scores = {"rm": row(1.0, -2.0, NAN), "length": row(0.5, NAN, 1.0), "audit": row(NAN, 9.0, 9.0)}
    assert same(combine(scores, {"rm": 1.0, "length": 2.0}), [2.0, NAN, NAN])
    assert same(combine(scores, {"rm": 1.0, "length": 0.0}), [1.0, -2.0, NAN])  # weight 0: its gaps do not matter
    assert same(combine(scores, {"length": -1.0}), [-0.5, NAN, -1.0])


def test_nothing_to_combine_is_nan_and_never_0() -> None:
    assert same(combine({"a": row(1.0, 2.0)}, {"a": 0.0}), [NAN, NAN])
    assert same(combine({"a": row(1.0, 2.0)}, {}), [NAN, NAN])
    assert combine({"a": ()}, {"a": 1.0}) == []
    assert combine({}, {}) == []


def test_a_weight_without_scores_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"weights name \['b'\]"):
        combine({"a": row(1.0)}, {"a": 1.0, "b": 0.0})


def test_a_reward_beyond_a_float_is_nan() -> None:
    scores = {"a": row(1e308, 1e308), "b": row(1e308, -1e308)}
    assert same(combine(scores, {"a": 1.0, "b": 1.0}), [NAN, 0.0])
    assert same(combine(scores, {"a": 10.0, "b": 10.0}), [NAN, NAN])


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-10, 10)), min_size=1, max_size=5), st.randoms())
def test_the_order_of_scorers_does_not_matter(terms: list[tuple[float, float]], random: Any) -> None:
    names = [str(i) for i in range(len(terms))]
    scores = {name: row(value) for name, (value, _) in zip(names, terms, strict=True)}
    weights = {name: weight for name, (_, weight) in zip(names, terms, strict=True)}
    shuffled = random.sample(names, len(names))
    assert same(combine(scores, weights), combine(scores, {name: weights[name] for name in shuffled}))


def test_score_group_and_back_from_disk() -> None:
    scorers = [Fixed([0.0, 1.0, None], name="a"), Fixed([1.0, 0.5, 2.0], name="b")]
    [group] = score_groups([group_of(3)], scorers, {"a": 1.0, "b": 2.0})
    assert list(group.scores) == ["a", "b"]
    assert same(list(group.rewards_N), [2.0, 2.0, NAN])
    (joined,) = attach_scores([group_of(3)], scores_to_table([group]))
    assert joined.scores["a"][2].error == "no_score: the scorer returned None"
    assert same(list(joined.rewards_N), [2.0, 2.0, NAN])


def test_score_group_replaces_earlier_scores() -> None:
    [group] = score_groups([group_of(1)], [Fixed([1.0], name="old")], {"old": 1.0})
    [again] = score_groups([group], [Fixed([3.0], name="new")], {"new": 1.0})
    assert list(again.scores) == ["new"] and again.rewards_N == (3.0,)


def test_a_failed_group_can_be_scored_and_stored() -> None:
    failed = group_of(2, Failure(kind="engine_died", message="exit 9"))
    [group] = score_groups([failed], [Fixed([1.0, 1.0])], {"fixed": 1.0})
    assert same(list(group.rewards_N), [NAN, NAN])
    assert scores_to_table([group]).num_rows == 4


def test_two_scorers_of_one_name() -> None:
    with pytest.raises(ValueError, match="must differ"):
        score_groups([group_of(1)], [Fixed([1.0]), Fixed([2.0])], {"fixed": 1.0})


class Together(Fixed):
    """Scores several groups in one call; `broken` says how that call goes wrong."""

    broken: str = ""
    calls = 0

    def score_many(self, groups: Sequence[Group]) -> list[Any]:
        self.calls += 1
        if self.broken == "raises":
            raise RuntimeError("no")
        return [[float(i)] * len(g.responses) for i, g in enumerate(groups)][: 1 if self.broken == "short" else None]


def test_several_groups_in_one_call() -> None:
    scorer = Together([9.0, 9.0])
    failed = group_of(2, Failure(kind="engine_died", message="exit 9"))
    found = run_scorer_many(scorer, [group_of(2), failed, group_of(0), group_of(3)])
    assert [[s.value for s in scores] for scores in found[::3]] == [[0.0, 0.0], [1.0, 1.0, 1.0]]
    assert [s.error for s in found[1]] == ["engine_died: exit 9"] * 2 and found[2] == ()
    assert scorer.calls == 1


@pytest.mark.parametrize("broken", ["raises", "short"])
def test_a_failed_call_for_several_groups_is_made_one_by_one(broken: str) -> None:
    scorer = Together([9.0, 9.0])
    scorer.broken = broken
    found = run_scorer_many(scorer, [group_of(2), group_of(2)])
    assert [[s.value for s in scores] for scores in found] == [[9.0, 9.0]] * 2
    assert scorer.calls == 1
