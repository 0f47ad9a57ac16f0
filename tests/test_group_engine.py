"""The group engine against plain transformers: tokens, distribution, log-probs, stops, strategies, truncation."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import random_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opentao.engines import group as engine_module
from opentao.engines import memory as memory_module
from opentao.engines import shared as shared_module
from opentao.engines.batch import without
from opentao.engines.drawing import draw, truncate
from opentao.engines.group import GroupEngine
from opentao.engines.memory import free_bytes
from opentao.engines.plain import PlainDecoder
from opentao.engines.shared import SHARED_ATTENTION, SharedDecoder
from opentao.errors import ModelError
from opentao.models import load_tokenizer
from opentao.pack import row_logprobs
from opentao.policy import LoadedPolicy, Policy, encode_prompt, load_policy
from opentao.rows import Sequences, common_prefix, plan_rows
from opentao.types import PLAIN, Group, Prompt, ReportingEngine, SamplingPlan, Strategy

TEXTS = ("My parcel is late.", "Hi", "How do I change my password? The link in the mail has expired. Please help me!")
PROMPTS = [Prompt.from_text(text) for text in TEXTS]


@pytest.fixture(autouse=True)
def _no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opentao.policy.native_bf16", lambda device: False)


@pytest.fixture
def engine(tiny_model_dir: Path) -> GroupEngine:
    made = GroupEngine()
    made.load(Policy.of_base(str(tiny_model_dir)))
    return made


@pytest.fixture
def editable(engine: GroupEngine) -> GroupEngine:
    """With weights as the learner has them, not in the layout that multiplies faster."""
    engine.loaded = load_policy(loaded_of(engine).policy)
    return engine


def loaded_of(engine: GroupEngine) -> LoadedPolicy:
    assert engine.loaded is not None
    return engine.loaded


def set_stops(engine: GroupEngine, stops: Sequence[int]) -> None:
    """More tokens that end an answer, so that a random model stops now and then."""
    loaded_of(engine).model.generation_config.eos_token_id = list(stops)


MANY_STOPS = [2, *range(5, 400, 9)]


def sampled(engine: GroupEngine, plan: SamplingPlan, prompts: Sequence[Prompt] = PROMPTS) -> list[Group]:
    groups = {g.prompt.id: g for g in engine.sample(prompts, plan)}
    return [groups[p.id] for p in prompts]


def tokens_of(groups: Sequence[Group]) -> list[list[tuple[int, ...]]]:
    return [[r.tokens_R for r in g.responses] for g in groups]


def generated(engine: GroupEngine, prompt: Sequence[int], plan: SamplingPlan) -> tuple[int, ...]:
    """What transformers makes of a prompt, greedy."""
    model = loaded_of(engine).model
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=plan.max_new_tokens,
        pad_token_id=0,
    )
    return tuple(out[0, len(prompt) :].tolist())


def asked(engine: GroupEngine, prompt: Prompt, strategy: Strategy = PLAIN) -> list[int]:
    return encode_prompt(loaded_of(engine).tokenizer, strategy.apply(prompt.messages), prompt.tools)


def learner_logprobs(engine: GroupEngine, prompt: Sequence[int], response: Any, temperature: float) -> Tensor:
    [row] = plan_rows([Sequences(prompt_P=tuple(prompt), responses_NR=(response.tokens_R,))], 10_000)
    with torch.no_grad():
        [logprobs] = row_logprobs(loaded_of(engine).model, row, temperature)
    return logprobs


def assert_learner_agrees(engine: GroupEngine, plan: SamplingPlan, groups: Sequence[Group]) -> None:
    for group in groups:
        for i, response in enumerate(group.responses):
            prompt = asked(engine, group.prompt, plan.strategies[i % len(plan.strategies)])
            expected = learner_logprobs(engine, prompt, response, plan.temperature or 1.0)
            torch.testing.assert_close(torch.tensor(response.sampler_logprobs_R), expected, atol=2e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("stops", [[2], MANY_STOPS])
def test_greedy_is_what_transformers_generates(engine: GroupEngine, stops: list[int]) -> None:
    set_stops(engine, stops)
    plan = SamplingPlan(group_size=2, temperature=0, max_new_tokens=24)
    groups = sampled(engine, plan)
    for group in groups:
        expected = generated(engine, asked(engine, group.prompt), plan)
        assert [r.tokens_R for r in group.responses] == [expected] * 2
        assert group.prompt_tokens_P == tuple(asked(engine, group.prompt))
    assert_learner_agrees(engine, plan, groups)


OTHERS = {
    "gpt2": {},  # positions learned, no scaling handed on
    "mistral": {"sliding_window": 16},
    "gemma2": {},
    "bloom": {},
    "lfm2": {},
    "qwen3_next": {},
    "mamba": {},
    "gpt_oss": {},
    "deepseek_v2": {},  # its cache holds something else than keys and values
}


@pytest.mark.parametrize("family", OTHERS)
def test_greedy_of_other_families(family: str, tiny_model_dir: Path) -> None:
    """Where keys and values cannot be shared, the plain decoder; rows leave its batch as they finish."""
    model = random_model(family, torch.float32, vocab_size=400, **OTHERS[family])
    engine = GroupEngine()
    policy = Policy(base=family, path=None, kind="base", hash=family)
    engine.loaded = LoadedPolicy(policy, model, load_tokenizer(str(tiny_model_dir)))
    set_stops(engine, MANY_STOPS)
    greedy = SamplingPlan(group_size=2, temperature=0, max_new_tokens=8)
    for group in sampled(engine, greedy):
        assert {r.tokens_R for r in group.responses} == {generated(engine, group.prompt_tokens_P, greedy)}
    plan = SamplingPlan(group_size=5, max_new_tokens=16)
    groups = sampled(engine, plan)
    assert len({len(r.tokens_R) for g in groups for r in g.responses}) > 4
    assert_learner_agrees(engine, plan, groups)


SYSTEM = "You sort support tickets. Reply with one word: billing, bug, account, delivery, cancellation or sales."


@pytest.mark.parametrize("apart", [1, 1000])
def test_a_common_start_of_prompts_is_run_once(
    engine: GroupEngine, monkeypatch: pytest.MonkeyPatch, apart: int
) -> None:
    """Same tokens and log-probs as each prompt alone, one prompt being the start of all others.

    The common start is attended by itself, or copied to each prompt if it is short.
    """
    for module in (shared_module, engine_module):
        monkeypatch.setattr(module, "ROOT_APART", apart)
    prompts = [
        Prompt(messages=({"role": "system", "content": SYSTEM}, {"role": "user", "content": text})) for text in TEXTS
    ]
    plan = SamplingPlan(group_size=2, temperature=0, max_new_tokens=12)
    fed: list[int] = []
    forward = shared_module.run_prompts

    def counted(model: Any, prompts: list[list[int]], *args: Any) -> Any:
        fed.append(sum(map(len, prompts)))
        return forward(model, prompts, *args)

    monkeypatch.setattr(shared_module, "run_prompts", counted)
    groups = sampled(engine, plan, prompts)
    lengths = [len(asked(engine, p)) for p in prompts]
    start = common_prefix([asked(engine, p) for p in prompts])
    assert start >= 16 and sum(fed) == start + sum(n - start for n in lengths)
    for prompt, found in zip(prompts, groups, strict=True):
        assert [r.tokens_R for r in found.responses] == [generated(engine, asked(engine, prompt), plan)] * 2
    assert_learner_agrees(engine, plan, groups)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 50, 1001])
def test_inverse_cdf_against_a_plain_cumulative_sum(vocabulary: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(400, vocabulary, generator=generator) * 4
    logits[:, ::3] = -math.inf if vocabulary > 2 else 0.0
    uniform = torch.rand(400, generator=generator)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-24])
    tokens, logprobs = draw(logits, uniform, SamplingPlan(temperature=temperature))
    exact = (logits.double() / temperature).softmax(-1)
    ends = exact.cumsum(-1)
    at = tokens[:, None]
    assert (exact.gather(-1, at) > 0).all()
    slack = 1e-5  # of fp32 sums
    assert (uniform < ends.gather(-1, at)[:, 0] + slack).all()
    assert (uniform > (ends - exact).gather(-1, at)[:, 0] - slack).all()
    torch.testing.assert_close(logprobs.double(), exact.gather(-1, at)[:, 0].log(), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- distribution


def assert_distributed(observed: Counter[int], expected_V: Tensor) -> None:
    """Chi-square at about 1e-4 (Wilson & Hilferty's approximation); rare tokens count as one cell."""
    n = sum(observed.values())
    cells = [v for v in range(len(expected_V)) if n * expected_V[v] >= 8]
    pairs = [(observed[v], n * float(expected_V[v])) for v in cells]
    rest = n - sum(o for o, _ in pairs), n - sum(e for _, e in pairs)
    if rest[1] >= 5:
        pairs.append(rest)
    else:
        assert rest[0] <= rest[1] + 12
    statistic = sum((o - e) ** 2 / e for o, e in pairs)
    k = len(pairs) - 1
    assert k >= 2
    assert statistic < k * (1 - 2 / (9 * k) + 3.72 * math.sqrt(2 / (9 * k))) ** 3


def exact_distribution(engine: GroupEngine, tokens: Sequence[int], temperature: float) -> Tensor:
    with torch.no_grad():
        logits = loaded_of(engine).model(torch.tensor([list(tokens)])).logits[0, -1]
    return (logits / temperature).softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_follow_the_models_distribution(editable: GroupEngine, temperature: float) -> None:
    """The first token, and the second one given the two most frequent first ones."""
    with torch.no_grad():
        loaded_of(editable).model.lm_head.weight.mul_(2)  # some tokens frequent, some rare
    plan = SamplingPlan(group_size=4000, temperature=temperature, max_new_tokens=2, seed=1)
    [group] = sampled(editable, plan, PROMPTS[:1])
    first = Counter(r.tokens_R[0] for r in group.responses)
    assert_distributed(first, exact_distribution(editable, group.prompt_tokens_P, temperature))
    for token, _ in first.most_common(2):
        second = Counter(r.tokens_R[1] for r in group.responses if r.tokens_R[0] == token and len(r.tokens_R) > 1)
        assert_distributed(second, exact_distribution(editable, [*group.prompt_tokens_P, token], temperature))


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.6), (6, 0.8)])
def test_truncated_samples_follow_the_truncated_distribution(engine: GroupEngine, top_k: int, top_p: float) -> None:
    plan = SamplingPlan(group_size=3000, max_new_tokens=1, top_k=top_k, top_p=top_p)
    [group] = sampled(engine, plan, PROMPTS[:1])
    full = exact_distribution(engine, group.prompt_tokens_P, 1.0)
    kept = truncate(full[None].clone(), top_k, top_p)[0]
    observed = Counter(r.tokens_R[0] for r in group.responses)
    assert all(kept[token] > 0 for token in observed)
    assert_distributed(observed, kept / kept.sum())
    # the log-probs stay those of the whole distribution
    for response in group.responses[:20]:
        assert response.sampler_logprobs_R[0] == pytest.approx(float(full[response.tokens_R[0]].log()), abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_learners(engine: GroupEngine, temperature: float) -> None:
    set_stops(engine, MANY_STOPS)
    plan = SamplingPlan(group_size=6, temperature=temperature, max_new_tokens=20)
    groups = sampled(engine, plan)
    assert len({len(r.tokens_R) for g in groups for r in g.responses}) > 5
    assert_learner_agrees(engine, plan, groups)


# ---------------------------------------------------------------------------------------------------- stops


def test_stop_tokens_are_kept_and_finish_says_how_it_ended(engine: GroupEngine) -> None:
    set_stops(engine, MANY_STOPS)
    plan = SamplingPlan(group_size=16, max_new_tokens=6)
    responses = [r for g in sampled(engine, plan) for r in g.responses]
    for r in responses:
        assert 1 <= len(r.tokens_R) == len(r.sampler_logprobs_R) <= 6
        assert not set(r.tokens_R[:-1]) & set(MANY_STOPS)
        assert r.finish == ("stop" if r.tokens_R[-1] in MANY_STOPS else "length")
        assert r.finish == "stop" or len(r.tokens_R) == 6
    assert {r.finish for r in responses} == {"stop", "length"}
    assert any(r.finish == "stop" and len(r.tokens_R) == 6 for r in responses)  # on the last token there is


def test_the_tokenizers_end_token_stops_too(editable: GroupEngine) -> None:
    loaded_of(editable).model.generation_config.eos_token_id = None
    model = loaded_of(editable).model
    with torch.no_grad():
        model.lm_head.weight[2] = model.lm_head.weight.mean(0)
    head = torch.nn.Linear(32, 400)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias[2] = 50.0
    model.set_output_embeddings(head)
    [group] = sampled(editable, SamplingPlan(group_size=2, max_new_tokens=5), PROMPTS[:1])
    assert tokens_of([group]) == [[(2,), (2,)]]
    assert [r.text for r in group.responses] == ["", ""]  # text is without special tokens


def test_stop_strings(engine: GroupEngine) -> None:
    plan = SamplingPlan(group_size=16, max_new_tokens=12)
    unstopped = sampled(engine, plan)
    stopped = sampled(engine, replace(plan, stop=("e", "4")))
    decode = loaded_of(engine).tokenizer.decode
    ends = 0
    for before, after in zip(unstopped, stopped, strict=True):
        for long, short in zip(before.responses, after.responses, strict=True):
            assert short.tokens_R == long.tokens_R[: len(short.tokens_R)]  # the same stream, cut
            assert not any(s in decode(short.tokens_R[:-1], skip_special_tokens=True) for s in ("e", "4"))
            whole = decode(short.tokens_R, skip_special_tokens=True)
            hit = any(s in whole for s in ("e", "4"))  # the token that completes it is kept, its text is not
            assert short.text == re.split("[e4]", whole)[0]
            assert short.finish == ("stop" if hit or short.tokens_R[-1] == 2 else "length")
            ends += hit
    assert ends > 10


def test_a_stop_string_that_is_a_special_token(engine: GroupEngine) -> None:
    """No text ever holds it: some base models end their turns with such a token, which is not their end token."""
    tokenizer = loaded_of(engine).tokenizer
    [special] = [t for t, i in tokenizer.get_added_vocab().items() if i == 1]
    plan = SamplingPlan(group_size=64, max_new_tokens=40, temperature=3.0)
    assert any(1 in tokens for group in tokens_of(sampled(engine, plan)) for tokens in group)
    for group in sampled(engine, replace(plan, stop=(special,))):
        for response in group.responses:
            assert 1 not in response.tokens_R[:-1]
            assert response.tokens_R[-1] != 1 or response.finish == "stop"


def test_other_logits_than_the_models_are_refused(engine: GroupEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opentao.pack.head_logits", lambda model, hidden: 0.5 * model.get_output_embeddings()(hidden))
    policy = loaded_of(engine).policy
    engine.release()
    with pytest.raises(ModelError, match="would sample from other logits than the model's"):
        engine.load(policy)


# ---------------------------------------------------------------------------------------------------- seeds


def test_a_response_does_not_depend_on_its_batch(engine: GroupEngine) -> None:
    set_stops(engine, MANY_STOPS)
    plan = SamplingPlan(group_size=5, max_new_tokens=16, seed=3)
    together = tokens_of(sampled(engine, plan))
    alone = [tokens_of(sampled(engine, plan, [p]))[0] for p in PROMPTS]
    assert together == alone
    assert tokens_of(sampled(engine, plan, PROMPTS[::-1]))[::-1] == together
    for size, prefill in ((1, 1), (10, 64), (1000, 1)):
        engine.batch_responses, engine.prefill_tokens = size, prefill
        assert tokens_of(sampled(engine, plan)) == together


def test_a_smaller_group_is_the_start_of_a_larger_one(engine: GroupEngine) -> None:
    plan = SamplingPlan(group_size=6, max_new_tokens=8)
    six, two = (tokens_of(sampled(engine, replace(plan, group_size=n))) for n in (6, 2))
    assert two == [group[:2] for group in six]


def test_seeds_differ_between_responses_prompts_and_plans(engine: GroupEngine) -> None:
    plan = SamplingPlan(group_size=4, max_new_tokens=8)
    groups = sampled(engine, plan)
    responses = [r for g in groups for r in g.responses]
    assert len({r.seed for r in responses}) == len({r.id for r in responses}) == len(responses) == 12
    assert len({r.tokens_R for r in responses}) == 12
    assert tokens_of(sampled(engine, plan)) == tokens_of(groups)
    assert tokens_of(sampled(engine, replace(plan, seed=1))) != tokens_of(groups)
    assert {r.policy for r in responses} == {loaded_of(engine).policy.hash}


# ---------------------------------------------------------------------------------------------------- strategies

NEAR = (PLAIN, Strategy(name="brief", template="{prompt} Be brief."), Strategy(name="cut", template="{prompt}"))
FAR = (
    PLAIN,
    Strategy(
        name="shots", examples=({"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"})
    ),
    Strategy(name="role", system="Answer with a JSON object, and with nothing else. Count: 0 1 2 3 4 5 6 7 8 9."),
)
SWAPPED = (PLAIN, Strategy(name="swap", replace={"My parcel": "One parcel of ours", "Hi": "Hello"}))


def count_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    real = SharedDecoder.enter

    def spy(self: SharedDecoder, prompts: list[Any], *args: Any) -> Tensor:
        seen.append(len(prompts))
        return real(self, prompts, *args)

    monkeypatch.setattr(SharedDecoder, "enter", spy)
    return seen


@pytest.mark.parametrize(
    ("strategies", "num_blocks"), [((PLAIN,), 3), (NEAR, 3), (FAR, 9)], ids=["plain", "near", "far"]
)
@pytest.mark.parametrize("stops", [[2], MANY_STOPS])
def test_every_strategy_is_answered_as_it_was_asked(
    engine: GroupEngine,
    monkeypatch: pytest.MonkeyPatch,
    strategies: tuple[Strategy, ...],
    num_blocks: int,
    stops: list[int],
) -> None:
    """Strategies that differ in a few tokens share one prefix and have tails of their own; long ones are apart."""
    seen = count_blocks(monkeypatch)
    set_stops(engine, stops)
    greedy = SamplingPlan(group_size=7, temperature=0, max_new_tokens=12, strategies=strategies)
    for group in sampled(engine, greedy):
        for i, response in enumerate(group.responses):
            strategy = strategies[i % len(strategies)]
            assert response.strategy == strategy.name
            assert response.tokens_R == generated(engine, asked(engine, group.prompt, strategy), greedy)
        assert group.prompt_tokens_P == tuple(asked(engine, group.prompt))  # training sees the plain prompt
    assert seen == [num_blocks]
    plan = replace(greedy, temperature=0.9)
    assert_learner_agrees(engine, plan, sampled(engine, plan))


def test_some_prompts_share_and_some_do_not(engine: GroupEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_blocks(monkeypatch)
    plan = SamplingPlan(group_size=3, max_new_tokens=8, strategies=(NEAR[1], FAR[2], FAR[1]))
    mixed = [*PROMPTS, Prompt.from_text("Thank you")]
    assert_learner_agrees(engine, plan, sampled(engine, plan, mixed))
    plan = replace(plan, strategies=SWAPPED, group_size=4)
    assert_learner_agrees(engine, plan, sampled(engine, plan, mixed))
    assert seen == [12, 4]


def test_more_strategies_than_responses(engine: GroupEngine) -> None:
    plan = SamplingPlan(group_size=2, max_new_tokens=4, strategies=FAR)
    groups = sampled(engine, plan)
    assert [[r.strategy for r in g.responses] for g in groups] == [["plain", "shots"]] * 3
    assert_learner_agrees(engine, plan, groups)


def test_an_answer_prefix_is_part_of_the_response(engine: GroupEngine) -> None:
    """Its tokens come first, with the policy's own log-probs of them; the rest is sampled after it."""
    prefix = '{"category": "'
    start = tuple(loaded_of(engine).tokenizer.encode(prefix, add_special_tokens=False))
    strategies = (PLAIN, Strategy(name="json", answer_prefix=prefix))
    plan = SamplingPlan(group_size=6, max_new_tokens=20, strategies=strategies)
    groups = sampled(engine, plan)
    for group in groups:
        forced = group.responses[1::2]
        assert all(r.text.startswith(prefix) and r.tokens_R[: len(start)] == start for r in forced)
        assert len({r.tokens_R for r in forced}) == 3
        assert all(len(r.tokens_R) <= 20 for r in forced)
        assert not any(r.text.startswith(prefix) for r in group.responses[::2])
    assert_learner_agrees(engine, plan, groups)
    without = sampled(engine, replace(plan, strategies=(PLAIN, Strategy(name="x"))))
    assert [r.tokens_R for g in groups for r in g.responses[::2]] == [
        r.tokens_R for g in without for r in g.responses[::2]
    ]


def test_an_answer_prefix_on_a_template_with_a_tail(engine: GroupEngine) -> None:
    strategies = (PLAIN, Strategy(name="both", template="{prompt} Be brief.", answer_prefix="It is"), NEAR[1])
    plan = SamplingPlan(group_size=6, max_new_tokens=10, strategies=strategies)
    groups = sampled(engine, plan)
    assert all(r.text.startswith("It is") for g in groups for r in g.responses if r.strategy == "both")
    assert_learner_agrees(engine, plan, groups)


def test_an_answer_prefix_longer_than_the_answer_may_be(engine: GroupEngine) -> None:
    strategy = Strategy(name="json", answer_prefix='{"category": "billing", "priority":')
    start = tuple(loaded_of(engine).tokenizer.encode(strategy.answer_prefix, add_special_tokens=False))
    [group] = sampled(engine, SamplingPlan(group_size=2, max_new_tokens=3, strategies=(strategy,)), PROMPTS[:1])
    assert tokens_of([group]) == [[start[:3]] * 2]
    assert [r.finish for r in group.responses] == ["length"] * 2


# ---------------------------------------------------------------------------------------------------- failures


def test_a_prompt_that_is_too_long_fails_alone(engine: GroupEngine) -> None:
    plan = SamplingPlan(group_size=2, max_new_tokens=8)
    long = Prompt.from_text("late " * 600)
    groups = sampled(engine, plan, [PROMPTS[0], long, PROMPTS[1]])
    size = len(asked(engine, long))
    assert groups[1].failure is not None
    assert groups[1].failure.kind == "prompt_too_long"
    assert groups[1].failure.message == f"{size} tokens; the context leaves 504 beside 8 new ones"
    assert groups[1].responses == ()
    assert tokens_of([groups[0], groups[2]]) == tokens_of(sampled(engine, plan, PROMPTS[:2]))


def test_the_longest_prompt_that_fits(engine: GroupEngine) -> None:
    prompt = Prompt.from_text("late " * 40)
    size = len(asked(engine, prompt))
    fits = SamplingPlan(group_size=1, max_new_tokens=512 - size)
    assert sampled(engine, fits, [prompt])[0].failure is None
    assert sampled(engine, replace(fits, max_new_tokens=513 - size), [prompt])[0].failure is not None


def test_tool_calls_as_logs_have_them(engine: GroupEngine) -> None:
    """Arguments are JSON texts there; templates go through them. What is no object there fails alone."""
    tokenizer = loaded_of(engine).tokenizer
    each = "{% for m in messages if m.tool_calls %}{% for c in m.tool_calls %}"
    arguments = "{% for k, v in c.function.arguments|items %}{{ k }}={{ v }};{% endfor %}"
    tokenizer.chat_template = f"{each}{arguments}{{% endfor %}}{{% endfor %}}{tokenizer.chat_template}"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "b"}]

    def prompt(arguments: Any) -> Prompt:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return Prompt(messages=(turns[0], turns[1] | {"tool_calls": [call]}, turns[2]))

    logged, given, broken = (prompt(a) for a in ('{"n": 1}', {"n": 1}, "n = 1"))
    groups = {g.prompt.id: g for g in engine.sample([logged, given, broken], SamplingPlan(group_size=1))}
    assert groups[logged.id].prompt_tokens_P == groups[given.id].prompt_tokens_P
    assert "n=1;" in tokenizer.decode(groups[given.id].prompt_tokens_P)
    failure = groups[broken.id].failure
    assert failure is not None and (failure.kind, failure.message[:10]) == ("chat_template", "TypeError:")


def test_a_prompt_that_the_chat_template_refuses_fails_alone(engine: GroupEngine) -> None:
    tokenizer = loaded_of(engine).tokenizer
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn, please') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    bad = Prompt(messages=({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}))
    good, failed = sampled(engine, SamplingPlan(group_size=1, max_new_tokens=4), [PROMPTS[0], bad])
    assert good.failure is None
    assert failed.failure is not None
    assert (failed.failure.kind, failed.failure.message) == ("chat_template", "no system turn, please")


def test_no_prompts_and_no_policy() -> None:
    assert list(GroupEngine().sample([], SamplingPlan())) == []
    with pytest.raises(RuntimeError, match="load a policy before sampling"):
        list(GroupEngine().sample(PROMPTS, SamplingPlan()))


# ---------------------------------------------------------------------------------------------------- decoders


def test_both_decoders_give_the_same_tokens(engine: GroupEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    set_stops(engine, MANY_STOPS)
    greedy = SamplingPlan(group_size=6, temperature=0, max_new_tokens=16, strategies=NEAR)
    plans = [greedy, replace(greedy, temperature=1.0), replace(greedy, temperature=1.0, strategies=FAR)]
    shared = [sampled(engine, plan) for plan in plans]
    used: list[str] = []
    real = PlainDecoder.enter
    monkeypatch.setattr(PlainDecoder, "enter", lambda *args: used.append("plain") or real(*args))
    monkeypatch.setattr(engine_module, "shares_prompt", lambda model, length: False)
    plain = [sampled(engine, plan) for plan in plans]
    assert used == ["plain"] * 3
    for ours, theirs, plan in zip(plain, shared, plans, strict=True):
        assert tokens_of(ours) == tokens_of(theirs)
        assert_learner_agrees(engine, plan, ours)


def test_decoding_leaves_the_model_as_it_was(engine: GroupEngine) -> None:
    before = loaded_of(engine).model.config._attn_implementation
    sampled(engine, SamplingPlan(group_size=2, max_new_tokens=3))
    assert loaded_of(engine).model.config._attn_implementation == before != SHARED_ATTENTION
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_a_policy_is_loaded_once(engine: GroupEngine, tiny_model_dir: Path) -> None:
    before = loaded_of(engine)
    engine.load(Policy.of_base(str(tiny_model_dir)))
    assert loaded_of(engine) is before


# ---------------------------------------------------------------------------------------------------- continuous

LONG = " ".join(TEXTS[2] for _ in range(6))
MANY = [Prompt.from_text(f"{text} {n}") for n in range(4) for text in (*TEXTS, LONG)]


def entries(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows that are live already, rows that enter) at every entry."""
    seen: list[tuple[int, int]] = []
    real = SharedDecoder.enter

    def spy(self: SharedDecoder, prompts: list[Any], counts: list[int]) -> Tensor:
        seen.append((len(self.cache.places), sum(counts)))
        return real(self, prompts, counts)

    monkeypatch.setattr(SharedDecoder, "enter", spy)
    return seen


@pytest.mark.parametrize("strategies", [(PLAIN,), NEAR, FAR], ids=["plain", "near", "far"])
def test_groups_enter_while_others_are_decoded(
    engine: GroupEngine, monkeypatch: pytest.MonkeyPatch, strategies: tuple[Strategy, ...]
) -> None:
    """Short and long prompts, early and late ends, rows that are given away again and again: the same tokens."""
    set_stops(engine, MANY_STOPS)
    plan = SamplingPlan(group_size=5, max_new_tokens=24, seed=5, strategies=strategies)
    alone = [tokens_of(sampled(engine, plan, [p]))[0] for p in MANY]
    seen = entries(monkeypatch)
    engine.batch_responses = 20
    groups = sampled(engine, plan, MANY)
    assert tokens_of(groups) == alone
    assert_learner_agrees(engine, plan, groups)
    assert sum(live > 0 for live, _ in seen) >= 3  # they did not wait for an empty batch
    assert all(live + new <= 20 for live, new in seen)


def test_a_small_budget_of_keys_and_values_is_kept(engine: GroupEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    set_stops(engine, MANY_STOPS)
    plan = SamplingPlan(group_size=4, max_new_tokens=16, seed=2)
    unbounded = tokens_of(sampled(engine, plan, MANY))
    used: list[int] = []
    real = shared_module.SharedCache.begin_step

    def spy(self: shared_module.SharedCache, device: torch.device) -> Tensor:
        used.append(self.prompt_tokens + self.rows * self.own_tokens)
        return real(self, device)

    monkeypatch.setattr(shared_module.SharedCache, "begin_step", spy)
    for budget in (1200, 500):
        used.clear()
        engine.cache_tokens = budget
        assert tokens_of(sampled(engine, plan, MANY)) == unbounded
        assert 0.3 * budget < max(used) <= budget
    engine.cache_tokens = 1  # less than one response needs: one at a time, not none
    assert tokens_of(sampled(engine, plan, MANY)) == unbounded


def test_a_group_larger_than_the_batch_is_decoded_in_parts(engine: GroupEngine) -> None:
    plan = SamplingPlan(group_size=11, max_new_tokens=6)
    whole = tokens_of(sampled(engine, plan))
    engine.batch_responses = 4
    assert tokens_of(sampled(engine, plan)) == whole


def test_groups_are_handed_out_as_they_are_finished(engine: GroupEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model may be used between two groups, and two samplings may run at once."""
    set_stops(engine, MANY_STOPS)
    engine.batch_responses = 8
    plan = SamplingPlan(group_size=4, max_new_tokens=12)
    seen = entries(monkeypatch)
    first = iter(engine.sample(MANY, plan))
    found = {(g := next(first)).prompt.id: g}
    assert len(seen) < len(MANY) / 2  # far from all are even begun
    second = sampled(engine, replace(plan, seed=1), MANY[:3])
    expected = generated(engine, asked(engine, MANY[0]), replace(plan, temperature=0))
    assert len(expected) > 0
    found |= {g.prompt.id: g for g in first}
    engine.batch_responses = 256
    assert tokens_of([found[p.id] for p in MANY]) == tokens_of(sampled(engine, plan, MANY))
    assert tokens_of(second) == tokens_of(sampled(engine, replace(plan, seed=1), MANY[:3]))


def test_a_benchmark_may_go_on_after_the_end(engine: GroupEngine) -> None:
    set_stops(engine, MANY_STOPS)
    engine.ignore_end = True
    groups = sampled(engine, SamplingPlan(group_size=4, max_new_tokens=9))
    assert {len(r.tokens_R) for g in groups for r in g.responses} == {9}


@given(st.lists(st.booleans(), max_size=30))
def test_rows_that_stay_are_kept_once_and_few_move(gone: list[bool]) -> None:
    order = without(gone)
    assert sorted(order) == [row for row, is_gone in enumerate(gone) if not is_gone]
    moved = [i for i, row in enumerate(order) if row != i]
    assert len(moved) <= sum(gone) and all(gone[i] for i in moved)


def test_free_memory_is_that_of_the_container(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:  50 kB\n")
    cpu = torch.device("cpu")
    assert free_bytes(cpu, tmp_path, tmp_path / "none") == 50 * 1024
    for name, text in (
        ("memory.max", "40000\n"),
        ("memory.current", "30000\n"),
        ("memory.stat", "inactive_file 5000\n"),
    ):
        (tmp_path / name).write_text(text)
    assert free_bytes(cpu, tmp_path, tmp_path) == 15000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(cpu, tmp_path, tmp_path) == 50 * 1024
    assert free_bytes(cpu, tmp_path / "none", tmp_path) == memory_module.UNKNOWN


def test_bytes_of_a_token(engine: GroupEngine) -> None:
    assert (
        memory_module.cache_token_bytes(loaded_of(engine).model) == 2 * 2 * 2 * 8 * 4
    )  # K and V, layers, heads, 8, fp32


# ---------------------------------------------------------------------------------------------------- drawing


def brute_truncate(mass: Sequence[int], top_k: int, top_p: float) -> list[int]:
    """Largest first, one by one, until `top_k` are kept or they hold `top_p` of what top_k allows."""
    order = sorted(range(len(mass)), key=lambda i: -mass[i])[: top_k or len(mass)]
    total = sum(mass[i] for i in order)
    kept: list[int] = []
    for i in order:
        kept.append(i)
        if sum(mass[j] for j in kept) >= top_p * total:
            break
    return [mass[i] if i in kept else 0 for i in range(len(mass))]


@given(
    mass=st.lists(st.integers(1, 1000), min_size=1, max_size=12, unique=True),
    top_k=st.integers(0, 14),
    eighths=st.integers(1, 8),
)
def test_truncate_against_brute_force(mass: list[int], top_k: int, eighths: int) -> None:
    found = truncate(torch.tensor([mass], dtype=torch.float32), top_k, eighths / 8)
    assert found[0].tolist() == brute_truncate(mass, top_k, eighths / 8)


def test_truncate_takes_each_row_by_itself() -> None:
    mass = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 90.0, 8.0]])
    assert truncate(mass.clone(), 0, 0.7).tolist() == [[4, 3, 0, 0], [0, 0, 90, 0]]
    assert truncate(mass.clone(), 2, 1.0).tolist() == [[4, 3, 0, 0], [0, 0, 90, 8]]


def test_draw_is_the_inverse_of_the_distribution_function() -> None:
    """Probabilities 1/2, 0, 1/4, 1/4: a number below 0.5 draws token 0, below 0.75 token 2, else token 3."""
    numbers = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 1 - 2**-24])
    logits = torch.tensor([2.0, 0.0, 1.0, 1.0]).log().expand(6, 4)
    tokens, logprobs = draw(logits, numbers, SamplingPlan(temperature=1.0))
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]
    assert logprobs.exp().tolist() == pytest.approx([0.5, 0.5, 0.25, 0.25, 0.25, 0.25])
    forced = torch.tensor([-1, 3, -1, 0, -1, -1])
    assert draw(logits, numbers, SamplingPlan(), forced)[0].tolist() == [0, 3, 2, 0, 3, 3]
    # at temperature 0.5 the odds are squared: 4, 0, 1, 1
    assert draw(logits, numbers, SamplingPlan(temperature=0.5))[1][0].exp() == pytest.approx(2 / 3)
    # greedy: the best token, its log-prob at temperature 1
    tokens, logprobs = draw(logits, numbers, SamplingPlan(temperature=0))
    assert tokens.tolist() == [0] * 6
    assert logprobs[0].exp() == pytest.approx(0.5)


def test_a_forced_token_has_its_log_prob_however_improbable() -> None:
    tokens, logprobs = draw(torch.tensor([[0.0, -200.0]]), torch.tensor([0.5]), SamplingPlan(), torch.tensor([1]))
    assert (tokens.tolist(), logprobs.tolist()) == ([1], [-200.0])


def test_a_token_without_mass_is_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf]]).expand(3, 3)
    tokens, _ = draw(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]), SamplingPlan())
    assert tokens.tolist() == [1, 1, 1]
    plan = SamplingPlan(top_k=1)
    tokens, _ = draw(torch.tensor([[1.0, 3.0, 2.0]]).expand(3, 3), torch.tensor([0.0, 0.5, 1 - 2**-24]), plan)
    assert tokens.tolist() == [1, 1, 1]


@pytest.mark.parametrize("vocabulary", [7, 400])
def test_logits_that_are_no_numbers_give_a_token_and_no_log_prob(vocabulary: int) -> None:
    """Never an index out of range, which on a GPU would be the end of the process."""
    logits = torch.full((2, vocabulary), math.nan)
    tokens, logprobs = draw(logits, torch.tensor([0.3, 0.9]), SamplingPlan())
    assert all(0 <= token < vocabulary for token in tokens.tolist())
    assert all(map(math.isnan, logprobs.tolist()))


def test_a_model_that_gives_no_numbers_says_so(editable: GroupEngine) -> None:
    with torch.no_grad():
        loaded_of(editable).model.lm_head.weight.fill_(math.nan)
    with pytest.raises(ModelError, match="logits are not finite at token 1 of a response"):
        sampled(editable, SamplingPlan(group_size=2, max_new_tokens=4), PROMPTS[:1])


def test_progress_is_told_while_groups_are_made(engine: GroupEngine) -> None:
    told: list[tuple[float, int]] = []
    engine.on_progress = lambda groups, tokens: told.append((groups, tokens))
    plan = SamplingPlan(group_size=2, max_new_tokens=6)
    groups = sampled(engine, plan)
    assert isinstance(engine, ReportingEngine)
    assert told == sorted(told) and len(told) >= 5
    assert told[0] == (pytest.approx(2 * len(PROMPTS) / 6), 2 * 2 * len(PROMPTS))  # the prompt's token, one more
    assert told[-1] == (len(PROMPTS), sum(len(r.tokens_R) for g in groups for r in g.responses))
