"""Training: the same gradient whatever the rows, LoRA and its reference, stops, resuming to the same bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import in_float64, plain_logprobs, random_model
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from opentao.bestofn import target_log_ratio
from opentao.config import Config, GenerateConfig, TrainConfig
from opentao.errors import ModelError, ScoreError, TrainError
from opentao.objectives import OBJECTIVES, Totals
from opentao.optimise import NO_CHECKPOINT, Checkpoint, batches, num_steps, optimise, rate
from opentao.policy import Policy, load_for_training, recompute_activations
from opentao.progress import Progress
from opentao.rows import Sequences
from opentao.session import Session
from opentao.store import Run, file_hash
from opentao.train import (
    Example,
    _credit,
    accumulate,
    attach_reference,
    examples_of,
    micro_batches,
    plain_draws,
    sampler_mismatch,
    train,
    train_policy,
)
from opentao.types import NAN, Failure, Group, Prompt, Response

TEMPERATURE = 0.8
PLAIN = {"objective": "regress", "schedule": "constant", "epochs": 1}
INSTRUCTION = tuple(range(100, 118))  # what every prompt starts with: computed once a row


@pytest.fixture(autouse=True)
def _no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opentao.policy.native_bf16", lambda device: False)
    monkeypatch.setattr("opentao.optimise.native_bf16", lambda device: False)


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path) -> Policy:
    return Policy.of_base(str(tiny_model_dir))


def group_of(seed: int, rewards: list[float], *, longest: int = 8) -> Group:
    """Random tokens of unequal lengths, random sampler log-probs."""
    rng = np.random.default_rng(seed)
    responses = []
    for i in range(len(rewards)):
        tokens = tuple(int(t) for t in rng.integers(3, 400, rng.integers(1, longest + 1)))
        logprobs = tuple(float(x) for x in rng.uniform(-6, -1, len(tokens)))
        responses.append(
            Response(id=f"{seed}-{i}", text="", tokens_R=tokens, sampler_logprobs_R=logprobs, finish="stop")
        )
    return Group(
        prompt=Prompt.from_text(f"prompt {seed}"),
        prompt_tokens_P=(*INSTRUCTION, *(int(t) for t in rng.integers(3, 400, 5))),
        responses=tuple(responses),
        rewards_N=tuple(rewards),
    )


def some_groups(number: int = 5) -> list[Group]:
    rng = np.random.default_rng(7)
    groups = [group_of(seed, [float(r) for r in rng.permutation(4)]) for seed in range(number - 1)]
    return [*groups, group_of(number, [1.0, NAN, 1.0, 0.0, 2.0])]


# ---------------------------------------------------------------------------------------------------- gradients


def step_gradients(model: Any, examples: list[Example], config: TrainConfig) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = accumulate(model, examples, OBJECTIVES[config.objective], config, TEMPERATURE)
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def by_plain_forward(model: Any, examples: list[Example], config: TrainConfig) -> tuple[float, dict[str, Tensor]]:
    """The same step with one ordinary forward pass a response and one backward pass for everything."""
    model.zero_grad()
    totals = Totals(num_groups=len(examples), num_tokens=sum(e.num_tokens for e in examples))
    credits = [_credit(e, plain_logprobs(model, e.sequences, TEMPERATURE)) for e in examples]
    loss = torch.stack([OBJECTIVES[config.objective].loss(c, totals, config) for c in credits]).sum()
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module", params=["full", "lora"])
def exact_model(request: pytest.FixtureRequest, base: Policy) -> tuple[str, Any]:
    """The tiny model in float64, off its starting point, so that no gradient is zero by construction."""
    with pytest.MonkeyPatch.context() as patch:  # layers in oneDNN's layout, on CPUs without bf16, know no float64
        patch.setattr("opentao.policy.packs", lambda model: False)
        loaded = load_for_training(base, TrainConfig(method=request.param), seed=0)
    in_float64(loaded.model)
    return request.param, loaded.model


def move(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.02)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_rows_never_change_the_gradient(exact_model: tuple[str, Any], objective: str) -> None:
    """From one row for all groups down to rows that split every group (the chain-rule path), against plain forwards."""
    method, model = exact_model
    wide = TrainConfig(objective=objective, method=method, target_n=4, clip=5.0, row_tokens=4096)
    examples = examples_of(some_groups(), wide)
    attach_reference(model, examples, wide, TEMPERATURE, lambda tokens: None)
    move(model, seed=1)
    expected_loss, expected = by_plain_forward(model, examples, wide)
    assert expected and all(g.abs().max() > 0 for g in expected.values())
    for row_tokens in (4096, 100, 16, 1):
        config = wide.model_copy(update={"row_tokens": row_tokens})
        loss, found = step_gradients(model, examples, config)
        assert loss == pytest.approx(expected_loss, rel=1e-12, abs=1e-12)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-13, rtol=1e-9, msg=name)


def test_small_rows_do_split_groups(exact_model: tuple[str, Any]) -> None:
    """What the test above claims: several rows a group at 16 tokens, several groups a row at 100."""
    _, model = exact_model
    examples = examples_of(some_groups(), TrainConfig(objective="regress"))
    split = list(micro_batches(model, examples, 16))
    assert all(len(own) == 1 for own, _ in split) and max(len(rows) for _, rows in split) >= 3
    shared = list(micro_batches(model, examples, 100))
    assert max(len(own) for own, _ in shared) >= 2 and all(len(rows) == 1 for own, rows in shared if len(own) > 1)


def test_a_model_that_cannot_share_prompts_trains_alike() -> None:
    """Plain rows, one response each, are the chain-rule path too."""
    config = TrainConfig(objective="regress", target_n=4, row_tokens=64)
    model = in_float64(random_model("llama", vocab_size=400))
    examples = examples_of(some_groups(), config)
    attach_reference(model, examples, config, TEMPERATURE, lambda tokens: None)
    move(model, seed=1)
    _, expected = by_plain_forward(model, examples, config)
    model.config.attn_logit_softcapping = 1e9  # as Gemma 2 says it; Llama itself does nothing with it
    assert all(len(row.owners) == 1 for _, rows in micro_batches(model, examples, 64) for row in rows)
    _, found = step_gradients(model, examples, config)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-13, rtol=1e-9, msg=name)


def test_distill_in_a_group_larger_than_its_threshold(base: Policy) -> None:
    """256 responses, best of 2: no weight reaches 0.01, and yet there is a loss."""
    config = TrainConfig(objective="distill", target_n=2)
    examples = examples_of([group_of(0, [float(i) for i in range(256)], longest=2)], config)
    model = load_for_training(base, config, seed=0).model
    assert accumulate(model, examples, OBJECTIVES["distill"], config, 1.0) > 0


@pytest.mark.parametrize("method", ["full", "lora"])
def test_recomputed_activations_give_the_same_gradient(base: Policy, method: str) -> None:
    """Packed rows too: what attention is told of the layout arrives a second time."""
    found, computed = [], []
    for again in (False, True):
        config = TrainConfig(method=method, objective="distill", gradient_checkpointing=again)
        model = load_for_training(base, config, seed=0).model
        calls: list[int] = []
        layer = next(m for m in model.modules() if isinstance(m, LlamaDecoderLayer))
        layer.input_layernorm.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        found.append(step_gradients(model, examples_of(some_groups(), config), config))
        computed.append(len(calls))
    assert computed == [1, 2]
    assert found[0][0] == found[1][0] and found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-7, rtol=1e-6, msg=name)


def test_activations_of_a_model_with_dropout_are_not_recomputed() -> None:
    with pytest.raises(ModelError, match=r"gradient_checkpointing: gpt2 has dropout \((attn|embd|resid)_pdrop\)"):
        recompute_activations(random_model("gpt2"))


# ---------------------------------------------------------------------------------------------------- LoRA


def test_only_the_adapter_is_trained(base: Policy) -> None:
    loaded = load_for_training(base, TrainConfig(method="lora"), seed=0)
    trained = {n for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    layers = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    config = TrainConfig(method="lora", objective="distill")
    accumulate(loaded.model, examples_of(some_groups(), config), OBJECTIVES["distill"], config, 1.0)
    assert {n for n, p in loaded.model.named_parameters() if p.grad is not None} == trained
    assert all(p.requires_grad for p in load_for_training(base, TrainConfig(method="full"), seed=0).model.parameters())


def test_token_embeddings_can_be_left_as_they_are(base: Policy) -> None:
    config = TrainConfig(train_embeddings=False, objective="distill")
    model = load_for_training(base, config, seed=0).model
    assert not any(p.requires_grad for p in model.get_input_embeddings().parameters())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_policy(
        model,
        examples_of(some_groups(), config),
        config,
        seed=0,
        temperature=TEMPERATURE,
        checkpoint=NO_CHECKPOINT,
        on_step=lambda metrics: None,
    )
    same = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert same == {n for n in before if "embed_tokens" in n}


def test_the_adapter_switched_off_is_the_base(base: Policy) -> None:
    config = TrainConfig(method="lora")
    examples, again = examples_of(some_groups(), config), examples_of(some_groups(), config)
    full = load_for_training(base, TrainConfig(method="full"), seed=0)
    attach_reference(full.model, examples, config, TEMPERATURE, lambda tokens: None)
    loaded = load_for_training(base, config, seed=0)
    move(loaded.model, seed=2)
    with loaded.reference():
        attach_reference(loaded.model, again, config, TEMPERATURE, lambda tokens: None)
    for ours, theirs in zip(again, examples, strict=True):
        torch.testing.assert_close(ours.ref_logprobs, theirs.ref_logprobs)
    attach_reference(loaded.model, again, config, TEMPERATURE, lambda tokens: None)  # switched on again
    assert (torch.cat(again[0].ref_logprobs) - torch.cat(examples[0].ref_logprobs)).abs().max() > 0.01


def test_the_adapters_first_weights_come_from_the_seed(base: Policy) -> None:
    config = TrainConfig(method="lora")
    one, same, other = (load_for_training(base, config, seed=s).model.state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------------------------------------- which groups


def test_only_informative_groups_are_trained_on() -> None:
    failed = Group(prompt=Prompt.from_text("too long"), failure=Failure(kind="prompt_too_long", message="9 > 8"))
    groups = [
        group_of(0, [0.0, 1.0]),
        group_of(1, [0.5, 0.5, 0.5]),  # all equal
        group_of(2, [NAN, 1.0]),  # nothing to compare with
        group_of(3, [NAN, NAN]),
        group_of(4, [0.5, NAN, 0.5]),
        failed,
        replace(group_of(5, [0.0, 1.0]), rewards_N=()),  # never scored
        group_of(6, [1.0, NAN, 0.0]),
    ]
    first, second = examples_of(groups, TrainConfig(objective="regress"))
    assert first.sequences.prompt_P == groups[0].prompt_tokens_P
    assert second.chosen == [0, 2]
    assert second.sequences.responses_NR == (groups[7].responses[0].tokens_R, groups[7].responses[2].tokens_R)
    assert first.num_tokens == sum(len(r.tokens_R) for r in groups[0].responses)


def test_prefer_computes_two_responses() -> None:
    [example] = examples_of([group_of(0, [0.5, 0.0, 1.0, NAN])], TrainConfig(objective="prefer"))
    assert example.chosen == [2, 1]
    assert len(example.sequences.responses_NR) == len(example.sampler_logprobs) == 2


def test_keep_trains_on_the_responses_whose_rewards_vary_most() -> None:
    group = group_of(0, [0.5, 0.0, 0.9, NAN, 0.6, 1.0])
    keep = {"strategy": "max_variance", "responses": 3}
    [kept] = examples_of([group], TrainConfig.model_validate({"objective": "regress", "keep": keep}))
    assert kept.chosen == [1, 2, 5]
    assert len(kept.rewards_N) == 6  # credit comes from the whole group
    [all_] = examples_of([group], TrainConfig(objective="regress"))
    assert all_.chosen == [0, 1, 2, 4, 5]
    target = target_log_ratio(kept.rewards_N, 16, 2.0)
    credit = _credit(kept, [torch.zeros(1)] * 3)
    assert credit.like(target).tolist() == pytest.approx([float(target[i]) for i in (1, 2, 5)])
    few = examples_of([group], TrainConfig.model_validate({"keep": keep, "objective": "prefer"}))[0]
    assert few.chosen == [5, 1]  # fewer than may be kept: as the objective had them


# ---------------------------------------------------------------------------------------------------- steps


def test_every_epoch_sees_every_item_once() -> None:
    steps = list(batches(range(7), epochs=3, size=3, seed=1))
    assert [len(step) for step in steps] == [3, 3, 1] * 3 == [len(s) for s in batches(range(7), 3, 3, 2)]
    assert len(steps) == num_steps(7, 3, 3)
    epochs = [[i for step in steps[e : e + 3] for i in step] for e in (0, 3, 6)]
    assert all(sorted(order) == list(range(7)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert steps == list(batches(range(7), 3, 3, 1)) != list(batches(range(7), 3, 3, 2))


def test_the_gradient_is_clipped_and_its_norm_told() -> None:
    """Gradient (30, 40): norm 50, clipped to 1; AdamW's first step is lr in each direction, whatever the size."""
    model = torch.nn.Linear(2, 1, bias=False)
    start = model.weight.detach().clone()

    def step(batch: list[int]) -> tuple[float, int]:
        loss = (model.weight @ torch.tensor([30.0, 40.0])).sum()
        loss.backward()
        return float(loss.detach()), 3

    config = TrainConfig(learning_rate=0.25, max_grad_norm=1.0)
    [metrics] = optimise(model, [[1, 2]], step, config, NO_CHECKPOINT, lambda m: None)
    assert (metrics.step, metrics.groups, metrics.tokens) == (0, 2, 3)
    assert metrics.grad_norm == pytest.approx(50)
    assert model.weight.grad.tolist() == [pytest.approx([0.6, 0.8], abs=1e-6)]
    assert (start - model.weight).tolist() == [pytest.approx([0.25, 0.25], abs=1e-6)]


@pytest.mark.parametrize("total", [1, 2, 7, 10, 11, 35, 100])
def test_a_linear_schedule_rises_to_its_peak_and_falls_to_the_last_step(total: int) -> None:
    rates = [rate("linear", step, total) for step in range(total)]
    top = int(np.argmax(rates))
    assert rates[top] == 1.0
    assert 0 <= top <= max(0, 0.1 * total)
    assert all(a < b for a, b in pairwise(rates[: top + 1]))
    assert all(a > b for a, b in pairwise(rates[top:]))
    assert 0 < rates[-1] <= max(2 / total, 0.1)
    assert {rate("constant", step, total) for step in range(total)} == {1.0}


@pytest.mark.parametrize("total", [1, 2, 7, 10, 11, 100])
def test_a_cooldown_is_constant_for_half_of_the_steps_and_then_falls(total: int) -> None:
    rates = [rate("cooldown", step, total) for step in range(total)]
    assert all(r == 1.0 for r in rates[: total // 2 + 1])
    assert all(a > b for a, b in pairwise(rates[total // 2 + 1 :]))
    assert 0 < rates[-1] <= 2 / total


def test_the_schedule_sets_the_size_of_each_step() -> None:
    """AdamW under a constant gradient moves by the learning rate: ten steps of 0.1 x rate, so 0.1 x their sum."""
    model = torch.nn.Linear(1, 1, bias=False)
    start = float(model.weight.detach())

    def step(batch: list[int]) -> tuple[float, int]:
        loss = model.weight.sum()
        loss.backward()
        return float(loss.detach()), 1

    config = TrainConfig(learning_rate=0.1, schedule="linear", max_grad_norm=10.0)
    optimise(model, [[i] for i in range(10)], step, config, NO_CHECKPOINT, lambda m: None)
    assert start - float(model.weight.detach()) == pytest.approx(
        0.1 * sum(rate("linear", i, 10) for i in range(10)), rel=1e-4
    )


# ---------------------------------------------------------------------------------------------------- the stage


def open_stage(run: Run, base: Policy, **settings: Any) -> Session:
    """What `train` needs of a session."""
    config = Config.model_validate(
        {
            "model": base.base,
            "prompts": {"path": "prompts.jsonl"},
            "scorers": [{"type": "length", "args": {"max_words": 9}}],
            "generate": {"temperature": TEMPERATURE},
            "train": PLAIN | {"prompts_per_step": 2, "learning_rate": 1e-3, "target_n": 4, **settings},
        }
    )
    progress = Progress(quiet=True)
    return Session(
        run=run,
        config=config,
        progress=progress,
        engine=None,  # type: ignore[arg-type]
        scorers=[],
        audit=None,
        train_prompts=[],
        heldout=[],
        scorers_key="",
        audit_key="",
    )


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run(tmp_path / "run") as opened:
        yield opened


def test_loss_goes_down_and_the_policy_is_a_plain_folder(run: Run, base: Policy) -> None:
    policy, facts = train(open_stage(run, base, epochs=20, prompts_per_step=5), 1, base, some_groups())
    assert facts == facts | {"groups": 5, "informative": 5, "steps": 20}
    assert facts["loss_last"] < facts["loss_first"] / 2
    assert (policy.kind, policy.path) == ("full", run.path("round-1/policy"))
    assert policy.hash != base.hash
    assert {p.suffix for p in policy.path.iterdir()} <= {".safetensors", ".json", ".jinja"}  # no pickle
    assert not run.have("round-1/checkpoint")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_round_starts_at_its_own_reference(run: Run, base: Policy, method: str) -> None:
    """At the first step Δ = 0, so the loss is the variance of the targets: no model in it.

    In round 1 the reference of a LoRA run is the base with the adapter off, in round 2 the policy of round 1.
    """
    groups = some_groups()
    spreads = [np.nanvar(target_log_ratio(np.array(g.rewards_N), 4, 2.0)) for g in groups]
    policy = base
    for round_ in (1, 2):
        session = open_stage(run, base, method=method, prompts_per_step=5, epochs=3)
        policy, facts = train(session, round_, policy, groups)
        assert facts["loss_first"] == pytest.approx(np.mean(spreads), rel=1e-4)
        assert facts["loss_last"] < facts["loss_first"]
        assert policy.kind == method


def test_no_informative_group_no_step(run: Run, base: Policy) -> None:
    session = open_stage(run, base)
    policy, facts = train(session, 1, base, [group_of(0, [0.5, 0.5]), group_of(1, [NAN, NAN])])
    assert policy is base
    assert facts == facts | {"groups": 2, "informative": 0, "steps": 0}
    assert session.progress.notes == ["round 1: all rewards are equal in every group: no step taken, policy unchanged"]
    assert not run.path("round-1/policy").exists()


def test_a_scorer_that_failed_is_no_reason_to_drop_a_policy(run: Run, base: Policy) -> None:
    session = open_stage(run, base)
    train(session, 1, base, some_groups())
    with pytest.raises(ScoreError):
        train(session, 1, base, [group_of(0, [NAN, NAN])])
    assert run.path("round-1/policy").exists()


def test_a_loss_that_is_not_a_number_stops_and_saves_nothing(run: Run, base: Policy) -> None:
    groups = some_groups()
    broken = replace(groups[0].responses[1], sampler_logprobs_R=(NAN,) * len(groups[0].responses[1].tokens_R))
    groups[0] = replace(groups[0], responses=(groups[0].responses[0], broken, *groups[0].responses[2:]))
    with pytest.raises(
        TrainError, match=r"step \d: loss nan, gradient norm nan: training stopped, last good policy kept"
    ):
        train(open_stage(run, base, objective="online"), 1, base, groups)
    assert not run.path("round-1/policy").exists()
    assert not run.have("round-1/policy") and not run.have("round-1/steps.json")


def test_nothing_is_trained_twice(run: Run, base: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, facts = train(open_stage(run, base), 1, base, some_groups())
    monkeypatch.setattr("opentao.train._train_round", lambda *args: pytest.fail("trained again"))
    assert train(open_stage(run, base), 1, base, some_groups()) == (policy, facts)
    colder = open_stage(run, base)  # log-probs are taken at the sampling temperature
    colder.config = colder.config.model_copy(update={"generate": GenerateConfig(temperature=0.5)})
    for changed in (colder, open_stage(run, base, epochs=2)):
        with pytest.raises(BaseException, match="trained again"):
            train(changed, 1, base, some_groups())
    with pytest.raises(BaseException, match="trained again"):
        train(open_stage(run, base), 1, base, some_groups(4))


def test_the_learner_may_have_a_temperature_of_its_own(base: Policy, tmp_path: Path) -> None:
    """It stands for that of sampling wherever the learner takes log-probs."""
    hashes = []
    for name, settings, sampling in (("own", {"temperature": 0.5}, 0.8), ("same", {}, 0.5), ("other", {}, 0.8)):
        with Run(tmp_path / name) as run:
            session = open_stage(run, base, **settings)
            session.config = session.config.model_copy(update={"generate": GenerateConfig(temperature=sampling)})
            train(session, 1, base, some_groups())
            hashes.append(file_hash(run.path("round-1/policy") / "model.safetensors"))
    assert hashes[0] == hashes[1] != hashes[2]


class Killed(BaseException):
    """As good as SIGKILL: nothing in the package catches it."""


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("steps_before", [1, 2, 5])
def test_resumed_training_ends_with_the_same_bytes(
    run: Run, base: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, steps_before: int
) -> None:
    settings = {"method": method, "epochs": 3, "save_every_steps": 2}  # 9 steps
    with Run(tmp_path / "unbroken") as other:
        whole = open_stage(other, base, **settings)
        unbroken, facts = train(whole, 1, base, some_groups())

    computed: list[int] = []
    real = accumulate

    def killing(*args: Any) -> float:
        if len(computed) == steps_before:
            raise Killed
        computed.append(1)
        return real(*args)

    monkeypatch.setattr("opentao.train.accumulate", killing)
    with pytest.raises(Killed):
        train(open_stage(run, base, **settings), 1, base, some_groups())
    assert run.have("round-1/checkpoint") == (steps_before >= 2)

    computed.clear()
    monkeypatch.setattr("opentao.train.accumulate", lambda *args: computed.append(1) or real(*args))
    session = open_stage(run, base, **settings)
    resumed, same_facts = train(session, 1, base, some_groups())
    assert len(computed) == 9 - steps_before // 2 * 2  # what the checkpoint held is not computed again
    before = sum(metrics["tokens"] for metrics in run.read_json("round-1/steps.json")[: 9 - len(computed)])
    made = session.progress.tokens["train"]
    assert made == whole.progress.tokens["train"] - before  # nor counted as if this start had made it
    assert same_facts == facts
    assert resumed.hash == unbroken.hash
    weights = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    assert file_hash(resumed.path / weights) == file_hash(unbroken.path / weights)
    assert not run.have("round-1/checkpoint")


@pytest.mark.parametrize("at", ["LoadedPolicy.save", "Checkpoint.discard"])
def test_a_kill_around_the_last_write_is_mended(
    run: Run, base: Policy, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def killed(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(f"opentao.train.{at}", killed)
        with pytest.raises(Killed):
            train(open_stage(run, base), 1, base, some_groups())
    policy, facts = train(open_stage(run, base), 1, base, some_groups())
    assert facts["steps"] == 3
    assert policy.path is not None and (policy.path / "model.safetensors").exists()


def test_a_checkpoint_of_other_inputs_is_not_used(run: Run, base: Policy) -> None:
    config = TrainConfig(objective="distill", learning_rate=1e-3, prompts_per_step=2)
    examples = examples_of(some_groups(), config)

    def trained(key: str, every: int) -> dict[str, Tensor]:
        model = load_for_training(base, config, seed=0).model
        checkpoint = Checkpoint(run=run, name="checkpoint", key=key, every=every)
        train_policy(
            model, examples, config, seed=0, temperature=1.0, checkpoint=checkpoint, on_step=lambda metrics: None
        )
        return {n: p.detach().clone() for n, p in model.named_parameters()}

    first = trained("a", every=3)
    saved = load_file(run.path("checkpoint") / "state.safetensors")
    assert all(torch.equal(saved[f"weight/{name}"], weight) for name, weight in first.items())
    again = trained("b", every=100)
    assert all(torch.equal(again[name], weight) for name, weight in first.items())
    assert not run.have("checkpoint", "b")


def test_a_checkpoint_knows_weights_that_got_no_gradient(run: Run) -> None:
    """A tower for images, of a model that is only given text: it has no moments, and goes on without."""

    class Towers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.images = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)

    config = TrainConfig(learning_rate=0.1, schedule="constant")

    def train_to(steps: int, name: str) -> Towers:
        torch.manual_seed(0)
        model = Towers()

        def step(batch: list[int]) -> tuple[float, int]:
            if batch[0] == steps:
                raise Killed
            loss = model.text(torch.tensor([1.0, float(batch[0])])).square().sum()
            loss.backward()
            return float(loss.detach()), 1

        checkpoint = Checkpoint(run=run, name=name, key="k", every=2)
        optimise(model, [[i] for i in range(4)], step, config, checkpoint, lambda m: None)
        return model

    with pytest.raises(Killed):
        train_to(2, "a")
    resumed, whole = train_to(4, "a"), train_to(4, "b")
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_the_sampler_is_measured_on_all_that_it_drew(base: Policy) -> None:
    """Whatever an objective chooses, and whether or not the group is informative; mean of r - 1 - log r by hand."""
    asked = [group_of(0, [0.0, 1.0, 0.5]), group_of(1, [1.0, 1.0])]
    led = replace(asked[0], responses=tuple(replace(r, strategy="led") for r in asked[0].responses))
    draws = plain_draws([led, *asked], ["plain"])
    assert [len(s.responses_NR) for s, _ in draws] == [3, 2]
    assert len(plain_draws(asked * 20, ["plain"])) == 16
    model = load_for_training(base, TrainConfig(), seed=0).model
    found = sampler_mismatch(model, draws, None, TEMPERATURE)
    for group, value in zip(asked, found, strict=True):
        sequences = Sequences(prompt_P=group.prompt_tokens_P, responses_NR=tuple(r.tokens_R for r in group.responses))
        with torch.no_grad():
            learner = torch.cat(plain_logprobs(model, sequences, TEMPERATURE)).double()
        log_r = learner - torch.tensor([x for r in group.responses for x in r.sampler_logprobs_R]).double()
        assert value == pytest.approx(float((log_r.exp() - 1 - log_r).mean()), rel=1e-4)


def test_metrics_of_a_step(run: Run, base: Policy) -> None:
    train(open_stage(run, base, prompts_per_step=5), 1, base, some_groups())
    [metrics] = run.read_json("round-1/steps.json")
    packed = sum(len(g.prompt_tokens_P) + sum(len(g.responses[i].tokens_R) for i in g.scored) for g in some_groups())
    assert metrics == metrics | {"step": 0, "groups": 5, "tokens": packed}
    assert math.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] > 0
