"""What only a GPU can show: captured decoding, FlexAttention compiled, Liger's kernels, a whole run on the device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import plain_logprobs, random_model, random_sequences
from tiny import tiny_config, write_prompts

from opentao import liger, loop
from opentao.config import Config
from opentao.engines.group import GroupEngine
from opentao.engines.precision import Int8Linear
from opentao.models import load_tokenizer
from opentao.optimise import autocast
from opentao.pack import group_logprobs, row_logprobs, rows_for
from opentao.packed_attention import FLEX_ATTENTION, PACKED_ATTENTION
from opentao.policy import LoadedPolicy, Policy
from opentao.progress import Progress
from opentao.rows import MIN_PREFIX, Sequences
from opentao.types import Group, Prompt, SamplingPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TEXTS = ("My parcel is late.", "Hi", "How do I change my password? The link in the mail has expired. Please help me!")
GREEDY = SamplingPlan(group_size=2, temperature=0, max_new_tokens=40)


def engine_of(model: Any, tiny_model_dir: Path, **settings: Any) -> GroupEngine:
    engine = GroupEngine(**settings)
    policy = Policy(base="llama", path=None, kind="base", hash="llama")
    engine.loaded = LoadedPolicy(policy, model.cuda(), load_tokenizer(str(tiny_model_dir)))
    return engine


def sampled(engine: GroupEngine, plan: SamplingPlan, times: int = 1) -> list[Group]:
    prompts = [Prompt.from_text(f"{text} {i}") for i in range(times) for text in TEXTS]
    groups = {g.prompt.id: g for g in engine.sample(prompts, plan)}
    return [groups[p.id] for p in prompts]


@pytest.mark.parametrize("common", [0, MIN_PREFIX])
@pytest.mark.parametrize("attention", [FLEX_ATTENTION, PACKED_ATTENTION])
def test_packed_rows_equal_plain_ones(common: int, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients in fp32; FlexAttention wants heads of at least 16."""
    monkeypatch.setattr("opentao.pack.GPU_ATTENTION", attention)
    model = random_model("llama", torch.float32, head_dim=16).cuda()
    groups = random_sequences([(150, [30, 5, 1]), (7, [40, 2])], common=common)
    [row] = rows_for(model, groups, 4096)
    packed = row_logprobs(model, row)
    plain = [lp for s in groups for lp in plain_logprobs(model, s)]
    for ours, theirs in zip(packed, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    weights = [p for p in model.parameters() if p.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(torch.cat(packed).sum(), weights),
        torch.autograd.grad(torch.cat(plain).sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_greedy_is_what_transformers_generates(family: str, paged: bool, tiny_model_dir: Path) -> None:
    model = random_model(family, torch.float32, vocab_size=400, head_dim=16)
    engine = engine_of(model, tiny_model_dir, batch_responses=4, paged=paged)
    for group in sampled(engine, GREEDY, times=3):
        ids = torch.tensor([group.prompt_tokens_P], device="cuda")
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
        assert {r.tokens_R for r in group.responses} == {tuple(out[0, ids.shape[1] :].tolist())}
    if paged:
        assert engine.captured is not None
        assert engine.captured.graphs


def test_graphs_draw_what_single_kernels_draw(tiny_model_dir: Path) -> None:
    """Many groups that come and go, prompts of several pages; the third call has only graphs."""
    plan = SamplingPlan(group_size=8, max_new_tokens=60)
    model = random_model("llama", torch.float32, vocab_size=400, head_dim=16)
    model.generation_config.eos_token_id = [2, *range(5, 400, 40)]
    engine = engine_of(model, tiny_model_dir, batch_responses=48)
    found = []
    for paged in (False, True, True, True):
        engine.paged = paged
        found.append([r.tokens_R for g in sampled(engine, plan, times=8) for r in g.responses])
    same = [sum(a == b for a, b in zip(found[0], other, strict=True)) / len(found[0]) for other in found[1:]]
    assert min(same) > 0.97  # a sum in another order may turn a draw that was on the edge
    assert found[2] == found[3]
    assert engine.captured is not None
    assert engine.captured.capture and engine.captured.graphs  # else both were single kernels


def test_bf16_logprobs_are_near_the_learners(tiny_model_dir: Path) -> None:
    model = random_model("llama", torch.float32, vocab_size=400, head_dim=16)
    learner = random_model("llama", torch.float32, vocab_size=400, head_dim=16).cuda()
    engine = engine_of(model.bfloat16(), tiny_model_dir)
    groups = sampled(engine, SamplingPlan(group_size=4, max_new_tokens=30))
    packed = [
        Sequences(prompt_P=g.prompt_tokens_P, responses_NR=tuple(r.tokens_R for r in g.responses)) for g in groups
    ]
    for i, logprobs in group_logprobs(learner, packed):
        for response, learned in zip(groups[i].responses, logprobs, strict=True):
            sampler = torch.tensor(response.sampler_logprobs_R)
            assert float((sampler - learned.cpu()).abs().mean()) < 0.1


@pytest.mark.parametrize("rows", [1, 16, 40])
def test_int8_linear(rows: int) -> None:
    linear = torch.nn.Linear(64, 48).cuda().bfloat16()
    x = torch.randn(rows, 64, device="cuda").bfloat16()
    with torch.inference_mode():
        torch.testing.assert_close(Int8Linear(linear)(x), linear(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_liger_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs and gradients with Liger's kernels, against transformers' layers, through the packed row."""
    pytest.importorskip("liger_kernel")
    groups = random_sequences([(150, [30, 5, 1])])
    plain = random_model(family, torch.float32, head_dim=16).cuda()
    monkeypatch.setenv("OPENTAO_LIGER", "0")
    assert not liger.patch(plain)
    values = gradients(plain, groups)
    monkeypatch.setenv("OPENTAO_LIGER", "1")
    patched = random_model(family, torch.float32, head_dim=16).cuda()
    assert liger.patch(patched)
    for ours, theirs in zip(gradients(patched, groups), values, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)


def gradients(model: Any, groups: Sequence[Sequences]) -> list[torch.Tensor]:
    """Log-probs, then the gradient of their sum."""
    [row] = rows_for(model, groups, 4096)
    logprobs = torch.cat(row_logprobs(model, row))
    return [logprobs.detach(), *torch.autograd.grad(logprobs.sum(), list(model.parameters()))]


def test_autocast_gradients_are_near_fp32() -> None:
    model = random_model("llama", torch.float32, head_dim=16).cuda()
    groups = random_sequences([(150, [30, 5, 1]), (7, [40, 2])])
    true = torch.cat([g.flatten() for g in gradients(model, groups)[1:]])
    with autocast(model):
        near = torch.cat([g.flatten() for g in gradients(model, groups)[1:]])
    assert float((near - true).norm() / true.norm()) < 0.1


def test_whole_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Prompts to report on the device, then once more with nothing left to do."""
    config = Config.model_validate(tiny_config(tiny_model_dir, write_prompts(tmp_path / "prompts.jsonl")))
    summary = loop.run(config, tmp_path / "run", Progress(quiet=True))
    policy = tmp_path / "run" / "round-1" / "policy" / "model.safetensors"
    made = policy.stat().st_mtime_ns
    assert (tmp_path / "run" / "report.html").exists()
    assert loop.run(config, tmp_path / "run", Progress(quiet=True))["verdict"] == summary["verdict"]
    assert policy.stat().st_mtime_ns == made
