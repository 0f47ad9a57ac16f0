"""The fake engine keeps the protocol that real engines keep."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from opentao.engines.fake import STOP, FakeEngine
from opentao.types import Engine, Prompt, Response, SamplingPlan, Strategy, response_id

PROMPTS = [Prompt.from_text("one"), Prompt.from_text("two")]


def responses(engine: Engine, plan: SamplingPlan, prompts: list[Prompt] = PROMPTS) -> list[Response]:
    return [r for group in engine.sample(prompts, plan) for r in group.responses]


def test_same_seed_same_responses_in_any_company() -> None:
    engine = FakeEngine(["a", "b", "c"])
    plan = SamplingPlan(group_size=6, seed=1)
    first = list(engine.sample(PROMPTS, plan))
    assert list(engine.sample(PROMPTS[::-1], plan)) == first[::-1]
    assert len({r.text for r in first[0].responses}) > 1
    assert responses(engine, SamplingPlan(group_size=6, seed=2)) != [r for g in first for r in g.responses]


def test_tokens_are_bytes_and_a_stop() -> None:
    [group] = FakeEngine(["é"]).sample([Prompt.from_text("hi")], SamplingPlan(group_size=1))
    assert bytes(group.prompt_tokens_P) == b"user: hi\n"
    assert group.responses[0].tokens_R == (0xC3, 0xA9, STOP)
    assert len(group.responses[0].sampler_logprobs_R) == 3
    assert group.responses[0].finish == "stop"


def test_cut_at_the_limit_there_is_no_stop_token() -> None:
    exact, cut = (responses(FakeEngine(["abcd"]), SamplingPlan(group_size=1, max_new_tokens=n))[0] for n in (5, 4))
    assert (exact.text, exact.finish, exact.tokens_R[-1]) == ("abcd", "stop", STOP)
    assert (cut.text, cut.finish, cut.tokens_R) == ("abcd", "length", tuple(b"abcd"))


@pytest.mark.parametrize(
    ("stop", "text", "tokens"), [(("d",), "abc", b"abcd"), (("cd", "b"), "a", b"ab"), (("z",), "abcdef", b"abcdef")]
)
def test_stop_strings_end_a_response(stop: tuple[str, ...], text: str, tokens: bytes) -> None:
    """The token that completes one is kept, the text ends before it."""
    [response] = responses(FakeEngine(["abcdef"]), SamplingPlan(group_size=1, stop=stop), PROMPTS[:1])
    assert (response.text, response.finish) == (text, "stop")
    assert response.tokens_R == (*tokens, *([STOP] if stop == ("z",) else []))


def test_load_names_the_policy() -> None:
    engine = FakeEngine(["a"])
    engine.load(SimpleNamespace(hash="9a1b"))
    [response, _] = responses(engine, SamplingPlan(group_size=1))
    assert response.policy == "9a1b"
    assert response.id == response_id(PROMPTS[0].id, "9a1b", "plain", response.seed)


def test_strategies_in_turn_change_what_is_asked_and_never_the_plain_prompt() -> None:
    strategies = (Strategy(), Strategy(name="loud", template="{prompt}!", answer_prefix="Yes. "))
    plan = SamplingPlan(group_size=3, strategies=strategies)
    [group] = FakeEngine(lambda prompt, seed: prompt.text).sample(PROMPTS[:1], plan)
    assert [(r.strategy, r.text) for r in group.responses] == [
        ("plain", "one"),
        ("loud", "Yes. one!"),
        ("plain", "one"),
    ]
    assert bytes(group.prompt_tokens_P) == b"user: one\n"


def test_greedy_is_one_answer() -> None:
    engine = FakeEngine(lambda prompt, seed: str(seed))
    assert {r.text for r in responses(engine, SamplingPlan(temperature=0.0, seed=5))} == {"0"}


def test_with_a_models_tokenizer_its_token_ids(tiny_model_dir) -> None:
    from opentao.models import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_model_dir))
    [group] = FakeEngine(["The parcel is late."], tokenizer).sample(PROMPTS[:1], SamplingPlan(group_size=1))
    assert group.responses[0].tokens_R[-1] == tokenizer.eos_token_id
    assert group.responses[0].text == "The parcel is late."
    assert tokenizer.decode(group.prompt_tokens_P) == "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
