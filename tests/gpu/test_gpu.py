"""What only a GPU can show: FlexAttention compiled, forwards and backwards, and the group decoder on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import plain_logprobs, random_model, random_sequences

from opentao.engines.group import GroupEngine
from opentao.models import load_tokenizer
from opentao.pack import row_logprobs, rows_for
from opentao.policy import LoadedPolicy, Policy
from opentao.rows import MIN_PREFIX
from opentao.types import Prompt, SamplingPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TEXTS = ("My parcel is late.", "Hi", "How do I change my password? The link in the mail has expired. Please help me!")


@pytest.mark.parametrize("common", [0, MIN_PREFIX])
def test_packed_rows_equal_plain_ones(common: int) -> None:
    """Values and gradients in fp32; FlexAttention wants heads of at least 16."""
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


def test_greedy_is_what_transformers_generates(tiny_model_dir: Path) -> None:
    model = random_model("llama", torch.float32, vocab_size=400).cuda()
    engine = GroupEngine(batch_responses=4)
    policy = Policy(base="llama", path=None, kind="base", hash="llama")
    engine.loaded = LoadedPolicy(policy, model, load_tokenizer(str(tiny_model_dir)))
    plan = SamplingPlan(group_size=2, temperature=0, max_new_tokens=16)
    for group in engine.sample([Prompt.from_text(text) for text in TEXTS], plan):
        ids = torch.tensor([group.prompt_tokens_P], device="cuda")
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
        assert {r.tokens_R for r in group.responses} == {tuple(out[0, ids.shape[1] :].tolist())}
