"""The GPU's decoder without a GPU: its kernels run in Triton's interpreter, its steps one kernel at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import random_model

pytest.importorskip("triton", reason="Triton is not installed")

from opentao.engines.captured import PAGE, CapturedDecoder, PagedCache, Room, rounded
from opentao.engines.group import GroupEngine
from opentao.engines.paged_attention import attend_own, attend_prompts, slots_for
from opentao.models import load_tokenizer
from opentao.policy import LoadedPolicy, Policy
from opentao.types import Prompt, SamplingPlan, Strategy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("H", "Hk", "D"), [(6, 2, 16), (4, 4, 20), (9, 3, 64)])
@pytest.mark.parametrize("splits", [1, 3])
def test_attention_equals_one_softmax(H: int, Hk: int, D: int, splits: int) -> None:
    """Prompts of one to several pages, some splits of them empty; rows with no own token, with few, with two blocks."""
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(DEVICE)

    prompt_tokens, of_row, own = [70, 3, 200], [0, 0, 1, 2, 2], [0, 5, 70, 1, 64]
    table = torch.tensor([[5, 1, 0, 0], [3, 0, 0, 0], [0, 2, 4, 6]], dtype=torch.int32, device=DEVICE)
    k, v = random(7, Hk, PAGE, D), random(7, Hk, PAGE, D)
    kept_k, kept_v = random(6, Hk, 80, D), random(6, Hk, 80, D)
    q, new_k, new_v = random(5, H, 1, D), random(5, Hk, 1, D), random(5, Hk, 1, D)
    slots = torch.tensor([2, 0, 5, 1, 3], dtype=torch.int32, device=DEVICE)
    width = slots_for(2, H // Hk)
    tiles = torch.full((4, 1 + width), -1, dtype=torch.int32, device=DEVICE)
    for tile, (place, rows) in enumerate({0: [0, 1], 1: [2], 2: [3, 4]}.items()):
        tiles[tile, : 1 + len(rows)] = torch.tensor([place, *rows])
    lengths = torch.tensor(prompt_tokens, dtype=torch.int32, device=DEVICE)
    parts = attend_prompts(q, k, v, table, lengths, tiles, 0.25, splits)
    own_L = torch.tensor(own, dtype=torch.int32, device=DEVICE)
    out = attend_own(q, (new_k, new_v), (kept_k, kept_v), slots, own_L, parts, 0.25)
    for row in range(5):
        pages = table[of_row[row]].long()
        seen = [
            torch.cat(
                [
                    x[pages].transpose(1, 2).flatten(0, 1)[: prompt_tokens[of_row[row]]],  # [P, Hk, D]
                    kept[slots[row], :, : own[row]].transpose(0, 1),
                    new[row].transpose(0, 1),
                ]
            ).repeat_interleave(H // Hk, 1)
            for x, kept, new in ((k, kept_k, new_k), (v, kept_v, new_v))
        ]
        expected = torch.nn.functional.scaled_dot_product_attention(
            q[row].transpose(0, 1).transpose(0, 1), *(x.transpose(0, 1) for x in seen), scale=0.25
        )
        torch.testing.assert_close(out[row], expected[:, 0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(kept_k[slots[row], :, own[row]], new_k[row, :, 0])


def engine_of(family: str, tiny_model_dir: Path, **settings: Any) -> GroupEngine:
    engine = GroupEngine(**settings)
    model = random_model(family, torch.float32, vocab_size=400, head_dim=16).to(DEVICE)
    model.generation_config.eos_token_id = [2, *range(5, 400, 40)]
    engine.loaded = LoadedPolicy(
        Policy(base=family, path=None, kind="base", hash=family), model, load_tokenizer(str(tiny_model_dir))
    )
    return engine


INSTRUCTION = (
    "You read what customers write and answer as briefly as you can, politely, and never with a question. " * 2
)
TEXTS = ("My parcel is late.", "Hi", "How do I change my password? The link has expired.", "Refund me", "It crashes")
STRATEGIES = (
    Strategy(name="plain"),
    Strategy(name="short", template="{prompt} Be brief."),
    Strategy(name="start", answer_prefix="My"),
)


def test_draws_what_the_cpu_decoder_draws(tiny_model_dir: Path) -> None:
    """Few rows, so that groups wait for others; a shared start over a page long; tails and prefixes."""
    plan = SamplingPlan(group_size=3, max_new_tokens=4, temperature=1.0, strategies=STRATEGIES)
    prompts = [Prompt.from_text(INSTRUCTION + text) for text in TEXTS[:3]]
    found = []
    for paged in (False, True):
        engine = engine_of("llama", tiny_model_dir, batch_responses=4, paged=paged)
        groups = {g.prompt.id: g for g in engine.sample(prompts, plan)}
        found.append([r for p in prompts for r in groups[p.id].responses])
    assert isinstance(engine.captured, CapturedDecoder)
    assert [r.tokens_R for r in found[0]] == [r.tokens_R for r in found[1]]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.sampler_logprobs_R, theirs.sampler_logprobs_R, atol=1e-4, rtol=1e-4)


def test_pages_and_slots_come_back(tiny_model_dir: Path) -> None:
    engine = engine_of("llama", tiny_model_dir, batch_responses=4, cache_tokens=400, paged=True)
    plan = SamplingPlan(group_size=2, max_new_tokens=3)
    list(engine.sample([Prompt.from_text(t) for t in TEXTS], plan))
    decoder = engine.captured
    assert decoder is not None
    assert sorted(decoder.free) == list(range(decoder.room.pages))
    assert sorted(decoder.slots) == sorted(decoder.places) == list(range(decoder.room.rows))
    next(iter(engine.sample([Prompt.from_text(t) for t in TEXTS], plan)))  # given up half-way
    list(engine.sample([Prompt.from_text(t) for t in TEXTS[:3]], plan))
    assert engine.captured is decoder  # which has room for that
    list(engine.sample([Prompt.from_text(" ".join(TEXTS * 3))], SamplingPlan(group_size=2, max_new_tokens=9)))
    assert engine.captured is not decoder


@pytest.mark.parametrize(("count", "most", "expected"), [(1, 500, 8), (13, 500, 16), (33, 500, 48), (400, 500, 500)])
def test_rounded(count: int, most: int, expected: int) -> None:
    assert rounded(count, most) == expected


def test_cache_tells_its_bytes() -> None:
    room = Room(rows=3, own_tokens=5, slots=8, pages=4, longest=2)
    cache = PagedCache(room, torch.device("cpu"))
    keys = torch.zeros(1, 2, 10, 16)
    cache._allocate(keys, keys)
    assert cache.num_bytes == 2 * 4 * 2 * 16 * (4 * PAGE + 4 * 5)
