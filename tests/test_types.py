"""The nouns: ids, checks, what a strategy does to a prompt, seeds."""

from __future__ import annotations

import dataclasses
import math

import pytest

from opentao.types import (
    NAN,
    PLAIN,
    Group,
    Prompt,
    Response,
    SamplingPlan,
    Score,
    Strategy,
    content_hash,
    response_id,
)

TOOL = {"type": "function", "function": {"name": "lookup"}}


def response(number: int = 0) -> Response:
    return Response(id=f"r{number}", text="Hi", tokens_R=(5, 2), sampler_logprobs_R=(-0.5, -1.0), finish="stop")


def group(*rewards: float) -> Group:
    responses = tuple(response(i) for i in range(len(rewards)))
    return Group(prompt=Prompt.from_text("Hello?"), responses=responses, rewards_N=rewards)


class TestPrompt:
    def test_id_is_pinned(self) -> None:
        """A change of the hash would orphan every run directory."""
        assert Prompt.from_text("My parcel is late.").id == "6400427d6c87afd2"

    def test_id_is_of_messages_and_tools_only(self) -> None:
        plain = Prompt.from_text("Where is it?")
        assert Prompt.from_text("Where is it?", label="delivery").id == plain.id
        assert dataclasses.replace(plain, tools=(TOOL,)).id != plain.id
        assert Prompt.from_text("Where is it").id != plain.id

    def test_id_does_not_depend_on_the_order_of_keys(self) -> None:
        one = Prompt(messages=({"role": "user", "content": "a"},))
        assert Prompt(messages=({"content": "a", "role": "user"},)).id == one.id

    def test_text_is_the_last_user_turn(self) -> None:
        turns = ("user", "first"), ("assistant", "reply"), ("user", "second"), ("tool", "result")
        assert Prompt(messages=tuple({"role": r, "content": c} for r, c in turns)).text == "second"
        assert Prompt(messages=({"role": "system", "content": "x"},)).text == ""


def test_content_hash_tells_parts_apart() -> None:
    assert content_hash("ab", "c") != content_hash("a", "bc")
    assert content_hash(1) != content_hash("1")
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})


def test_response_id_is_of_all_that_determines_it() -> None:
    parts = {"prompt_id": "p", "policy": "h", "strategy": "plain", "seed": 1}
    changed = [parts | {name: "other" if name != "seed" else 2} for name in parts]
    assert len({response_id(**p) for p in [parts, *changed]}) == 5


class TestGroup:
    def test_unscored_is_nan_and_left_out(self) -> None:
        assert group(0.0, NAN, 1.0).scored == (0, 2)
        assert not Score(value=NAN, error="timeout: 30 s").scored
        assert Score(value=0.0).scored

    @pytest.mark.parametrize(
        ("rewards", "informative"),
        [((0.0, 1.0), True), ((1.0, 1.0), False), ((1.0, NAN), False), ((NAN, NAN), False), ((1.0, NAN, 0.5), True)],
    )
    def test_informative_needs_two_different_rewards(self, rewards: tuple[float, ...], informative: bool) -> None:
        assert group(*rewards).informative is informative

    def test_never_half_scored(self) -> None:
        pair = group(1.0, 0.0)
        with pytest.raises(ValueError, match="judge has 1 values for 2 responses"):
            pair.with_scores({"judge": (Score(value=1.0),)}, (1.0, 0.0))
        with pytest.raises(ValueError, match="rewards_N has 3 values for 2 responses"):
            pair.with_scores({}, (1.0, 0.0, 0.0))

    def test_without_rewards_nothing_is_scored(self) -> None:
        bare = Group(prompt=Prompt.from_text("a"), responses=(response(),))
        assert bare.scored == ()
        assert not bare.informative

    def test_cannot_be_changed(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            group(1.0).rewards_N = (2.0,)  # type: ignore[misc]


class TestStrategy:
    CHAT = (
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "red, green or blue?"},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "red, green?"},
    )

    def test_plain_changes_nothing(self) -> None:
        assert PLAIN.apply(self.CHAT) == list(self.CHAT)

    def test_template_and_replace_meet_the_last_user_turn_only(self) -> None:
        asked = Strategy(name="x", template="{prompt}\nThink.", replace={"red, green": "green, red"}).apply(self.CHAT)
        assert [m["content"] for m in asked] == ["Be kind.", "red, green or blue?", "Red.", "green, red?\nThink."]

    def test_template_takes_braces_in_the_prompt_as_they_are(self) -> None:
        asked = Strategy(name="x", template="Q: {prompt}").apply(({"role": "user", "content": '{"a": "{prompt}"}'},))
        assert asked[0]["content"] == 'Q: {"a": "{prompt}"}'

    def test_system_is_replaced_or_added_and_examples_come_before(self) -> None:
        example = ({"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"})
        few_shot = Strategy(name="x", system="Answer.", examples=example)
        assert few_shot.apply(self.CHAT) == [{"role": "system", "content": "Answer."}, *example, *self.CHAT[1:]]
        assert few_shot.apply(self.CHAT[1:]) == few_shot.apply(self.CHAT)

    def test_the_prompt_itself_stays(self) -> None:
        prompt = Prompt(messages=self.CHAT)
        before = prompt.id
        Strategy(name="x", template="{prompt}!", system="No.").apply(prompt.messages)
        assert prompt.id == before


class TestSamplingPlan:
    def test_seeds_differ_by_plan_prompt_and_index_and_fit_64_bits(self) -> None:
        plan = SamplingPlan(seed=3)
        seeds = {plan.response_seed(p, i) for p in ("a", "b") for i in range(100)}
        assert len(seeds) == 200
        assert seeds.isdisjoint({SamplingPlan(seed=4).response_seed("a", i) for i in range(100)})
        assert all(0 <= s < 2**63 for s in seeds)

    def test_a_seed_does_not_depend_on_the_size_of_the_group(self) -> None:
        small, large = SamplingPlan(group_size=2), SamplingPlan(group_size=64)
        assert small.response_seed("a", 1) == large.response_seed("a", 1)

    @pytest.mark.parametrize(("settings", "truncated"), [({}, False), ({"top_p": 0.9}, True), ({"top_k": 5}, True)])
    def test_truncated(self, settings: dict[str, float], truncated: bool) -> None:
        assert SamplingPlan(**settings).truncated is truncated


def test_nan_is_not_zero() -> None:
    assert math.isnan(NAN)
