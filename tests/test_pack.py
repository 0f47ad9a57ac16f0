"""Packed rows against the ordinary forward: values and gradients in float64, plans, fallbacks, the self-check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import in_float64, plain_logprobs, random_model, random_sequences
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from opentao import long_prompt, pack, packed_attention, rows
from opentao.errors import ModelError
from opentao.pack import check_head, check_packing, group_logprobs, row_logprobs, rows_for, shares_prompt
from opentao.packed_attention import FLEX_ATTENTION
from opentao.rows import (
    MIN_PREFIX,
    Row,
    Sequences,
    common_prefix,
    plain_rows,
    plan_rows,
    sharing_pays,
    whole_groups,
)

Shape = list[tuple[int, list[int]]]  # prompt length and the responses' lengths of each group

exhaustive = settings(max_examples=60, deadline=None, phases=set(Phase) - {Phase.explain})  # explaining takes minutes
shapes = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 6), min_size=1, max_size=5)), min_size=1, max_size=3
)


@pytest.fixture(scope="module")
def llama() -> Any:
    return in_float64(random_model("llama"))


def least_row(groups: Sequence[Sequences]) -> int:
    """The smallest row limit that these groups allow."""
    return max(len(g.prompt_P) + len(r) for g in groups for r in g.responses_NR)


def by_flex(model: Any, row: Row) -> list[Tensor]:
    """A row's log-probs through FlexAttention, uncompiled."""
    hidden = pack.hidden_states(model, row, FLEX_ATTENTION)
    logits = pack.head_logits(model, hidden[row.sources])
    logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(row.targets)[:, None])[:, 0]
    return list(logprobs.split(row.sizes))


def by_response(rows: list[Row], values: list[list[Tensor]]) -> dict[tuple[int, int], Tensor]:
    return {o: v for row, own in zip(rows, values, strict=True) for o, v in zip(row.owners, own, strict=True)}


def gradients(model: Any, logprobs: dict[tuple[int, int], Tensor]) -> list[Tensor]:
    """Gradients of a sum in which every token has a weight of its own."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for key in sorted(logprobs):
        weight = torch.randn(len(logprobs[key]), generator=generator, dtype=torch.float64)
        total = total + (weight * logprobs[key]).sum()
    return list(torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad]))


def assert_packed_is_plain(
    model: Any, groups: list[Sequences], rows: list[Row], temperature: float, chunk: int, tolerance: float = 1e-11
) -> None:
    """`tolerance`: more than 1e-11 where norms go through float32."""
    packed = by_response(rows, [row_logprobs(model, row, temperature, chunk) for row in rows])
    plain = {(g, i): lp for g, s in enumerate(groups) for i, lp in enumerate(plain_logprobs(model, s, temperature))}
    assert packed.keys() == plain.keys()
    for key, expected in plain.items():
        torch.testing.assert_close(packed[key], expected, atol=tolerance / 10, rtol=tolerance / 10)
    for ours, theirs in zip(gradients(model, packed), gradients(model, plain), strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@exhaustive
@given(
    shape=shapes,
    room=st.integers(0, 30),
    temperature=st.sampled_from([1.0, 0.7]),
    chunk=st.sampled_from([1, 3, 512]),
    seed=st.integers(0, 9),
)
def test_packed_equals_plain(llama: Any, shape: Shape, room: int, temperature: float, chunk: int, seed: int) -> None:
    groups = random_sequences(shape, seed)
    assert_packed_is_plain(llama, groups, plan_rows(groups, least_row(groups) + room), temperature, chunk)


@pytest.mark.parametrize(
    ("shape", "row_tokens", "owners"),
    [
        ([(4, [3, 5, 1])], 64, [[(0, 0), (0, 1), (0, 2)]]),  # one group, unequal lengths
        ([(4, [1, 1, 1])], 64, [[(0, 0), (0, 1), (0, 2)]]),  # nothing but one-token responses
        ([(1, [2, 2])], 64, [[(0, 0), (0, 1)]]),  # the shortest prompt there is
        ([(3, [2, 2]), (2, [4]), (5, [1, 3])], 64, [[(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]]),  # groups share a row
        ([(4, [3, 3, 3, 3, 3])], 10, [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4)]]),  # split; the last row left over
        ([(4, [3, 3, 3]), (2, [3])], 10, [[(0, 0), (0, 1)], [(0, 2)], [(1, 0)]]),  # 7 + 5 tokens do not fit 10
        ([(4, [3, 3, 3]), (2, [1])], 10, [[(0, 0), (0, 1)], [(0, 2), (1, 0)]]),  # 7 + 3 do: a split group shares
    ],
)
def test_layouts(llama: Any, shape: Shape, row_tokens: int, owners: list[list[tuple[int, int]]]) -> None:
    groups = random_sequences(shape)
    rows = plan_rows(groups, row_tokens)
    assert [row.owners for row in rows] == owners
    assert_packed_is_plain(llama, groups, rows, 1.0, 512)


@exhaustive
@given(shape=shapes, common=st.integers(1, 20), room=st.integers(0, 90), seed=st.integers(0, 9))
def test_packed_equals_plain_where_prompts_start_alike(
    llama: Any, shape: Shape, common: int, room: int, seed: int
) -> None:
    """What the prompts of a row have in common is computed once for the whole row."""
    groups = random_sequences(shape, seed, common)
    assert_packed_is_plain(llama, groups, plan_rows(groups, least_row(groups) + room), 1.0, 512)


@pytest.mark.parametrize("common", [MIN_PREFIX - 1, MIN_PREFIX])
def test_a_common_start_stands_in_a_row_once(llama: Any, common: int) -> None:
    groups = random_sequences([(3, [2, 4]), (5, [1]), (2, [3, 3])], common=common)
    whole = sum(g.num_tokens for g in groups)
    [row] = plan_rows(groups, 200)
    assert len(row.tokens_T) == (whole - 2 * common if common >= MIN_PREFIX else whole)
    assert_packed_is_plain(llama, groups, [row], 0.7, 3)
    alone, *_ = plan_rows(groups, common + 9)  # one group to a row: nothing to share
    assert len(alone.tokens_T) == groups[0].num_tokens


def test_prompts_that_are_the_same_or_the_start_of_one_another(llama: Any) -> None:
    """Each keeps a token of its own, where its first response token is predicted."""
    [one] = random_sequences([(20, [2, 3])])
    longer = Sequences(prompt_P=(*one.prompt_P, 7, 8), responses_NR=((9, 4), (5,)))
    for groups in ([one, one], [one, longer], [longer, one, longer]):
        [row] = plan_rows(groups, 200)
        assert len(row.tokens_T) == sum(g.num_tokens for g in groups) - (len(groups) - 1) * 19
        assert_packed_is_plain(llama, groups, [row], 1.0, 512)


def test_a_response_that_was_cut_has_no_special_place() -> None:
    """With its stop token or cut at max_new_tokens: the last token is trained on like any other."""
    stopped = Sequences(prompt_P=(5, 6), responses_NR=((7, 8, 2),))
    cut = Sequences(prompt_P=(5, 6), responses_NR=((7, 8, 9),))
    [one], [other] = plan_rows([stopped], 9), plan_rows([cut], 9)
    assert (one.targets, other.targets) == ([7, 8, 2], [7, 8, 9])
    assert one.sources == other.sources == [1, 2, 3]
    assert one.ends == [4]


def test_row_by_hand() -> None:
    [row] = plan_rows([Sequences(prompt_P=(5, 6), responses_NR=((7, 8), (9,)))], 9)
    assert row.tokens_T == [5, 6, 7, 8, 9]
    assert row.positions_T == [0, 1, 2, 3, 2]
    assert row.part_T == [0, 0, 1, 1, 2]
    assert row.sources == [1, 2, 1]  # the prompt's last token predicts the first of each response
    assert row.targets == [7, 8, 9]
    assert row.ends == [3, 4]


@settings(max_examples=100, deadline=None)
@given(shape=shapes, room=st.integers(0, 40), common=st.sampled_from([0, 4, 30]))
def test_plans_hold_every_response_once_and_keep_the_limit(shape: Shape, room: int, common: int) -> None:
    groups = random_sequences(shape, common=common)
    limit = least_row(groups) + room
    rows = plan_rows(groups, limit)
    assert [o for row in rows for o in row.owners] == [(g, i) for g, (_, R) in enumerate(shape) for i in range(len(R))]
    assert all(0 < len(row.tokens_T) <= limit for row in rows)
    for row in rows:
        assert row.sizes == [len(groups[g].responses_NR[i]) for g, i in row.owners]
        assert row.targets == [t for g, i in row.owners for t in groups[g].responses_NR[i]]
        assert all(
            row.tokens_T[e] == groups[g].responses_NR[i][-1] for e, (g, i) in zip(row.ends, row.owners, strict=True)
        )


@given(shape=shapes, room=st.integers(1, 60))
def test_whole_groups_are_never_split(shape: Shape, room: int) -> None:
    groups = random_sequences(shape)
    batches = whole_groups(groups, room)
    assert [i for batch in batches for i in batch] == list(range(len(groups)))
    assert all(len(batch) == 1 or sum(groups[i].num_tokens for i in batch) <= room for batch in batches)


def test_what_cannot_fit_a_row_is_an_error() -> None:
    groups = random_sequences([(4, [2, 7])])
    with pytest.raises(ValueError, match=r"prompt of 4 and a response of 7 tokens do not fit row_tokens = 10"):
        plan_rows(groups, 10)


def test_rows_for_widens_the_row_to_the_longest_response(llama: Any) -> None:
    rows = list(rows_for(llama, random_sequences([(4, [2, 7, 1])]), 5))
    assert [len(row.tokens_T) for row in rows] == [6, 11, 5]


def test_the_plain_layout_where_sharing_would_lose(llama: Any) -> None:
    """A tiny prompt, one long response and some short ones: padded to the longest they are more work than they save."""
    [lopsided] = random_sequences([(2, [400, 3, 3, 3])])
    assert not sharing_pays(lopsided, 32)
    rows = list(rows_for(llama, [lopsided], 4096))
    assert [row.owners for row in rows] == [[(0, i)] for i in range(4)]
    assert_packed_is_plain(llama, [lopsided], rows, 1.0, 512)
    usual = random_sequences([(62, [64] * 8), (842, [64] * 8), (20, [60, 10, 30, 5])])
    assert all(sharing_pays(group, 576) for group in usual)
    assert sharing_pays(random_sequences([(400, [400, 3, 3, 3])])[0], 576)  # a long prompt makes up for it


def test_no_groups_no_rows(llama: Any) -> None:
    assert plan_rows([], 8) == [] == list(plain_rows([]))
    assert list(group_logprobs(llama, [])) == []


@pytest.mark.parametrize("row_tokens", [1, 12, 25, 2048])
def test_group_logprobs_come_in_order_whatever_the_rows(llama: Any, row_tokens: int) -> None:
    groups = random_sequences([(4, [3, 5, 1]), (2, [6]), (6, [2, 2, 2, 2])])
    found = list(group_logprobs(llama, groups, row_tokens=row_tokens, temperature=0.7))
    assert [g for g, _ in found] == [0, 1, 2]
    for g, logprobs in found:
        for ours, theirs in zip(logprobs, plain_logprobs(llama, groups[g], 0.7), strict=True):
            torch.testing.assert_close(ours, theirs.detach())
            assert not ours.requires_grad


def test_packing_leaves_the_model_as_it_was(llama: Any) -> None:
    before = llama.config._attn_implementation
    row_logprobs(llama, plan_rows(random_sequences([(4, [3, 5])]), 64)[0])
    assert llama.config._attn_implementation == before != packed_attention.PACKED_ATTENTION


def test_common_prefix() -> None:
    assert common_prefix([(1, 2, 3), (1, 2)]) == 2
    assert common_prefix([(1,), (2,)]) == 0
    assert common_prefix([(4, 5)]) == 2


# ---------------------------------------------------------------------------------------------------- families

PACKED = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "phi3",
    "gemma",
    "gemma3_text",
    "olmo2",
    "gpt2",
    "gpt_neox",
    "cohere",
    "granite",
    "deepseek_v2",
]


@pytest.mark.parametrize("family", PACKED)
def test_packing_is_exact_for(family: str) -> None:
    """Also heads with a scale after them (cohere, granite) and values narrower than keys (deepseek)."""
    model = random_model(family)
    groups = random_sequences([(6, [3, 5, 1]), (3, [4, 2])])
    assert shares_prompt(model, 64)
    [row] = rows_for(model, groups, 64)
    with torch.no_grad():
        packed = by_response([row], [row_logprobs(model, row)])
        for g, sequences in enumerate(groups):
            for i, expected in enumerate(plain_logprobs(model, sequences)):
                # deepseek turns its keys in float32, whatever the model's precision
                torch.testing.assert_close(packed[g, i], expected, atol=1e-6 if "deepseek" in family else 1e-10, rtol=0)


@pytest.mark.parametrize("family", [*PACKED, "gemma2", "falcon_h1", "hyperclovax", "recurrent_gemma"])
def test_logits_are_the_models_own(family: str) -> None:
    """Whatever a family does after its head."""
    own = {"falcon_h1": {"lm_head_multiplier": 0.04}, "hyperclovax": {"logits_scaling": 8.0}}
    check_head(random_model(family, torch.float32, **own.get(family, {})))


@pytest.mark.parametrize("family", PACKED)
def test_packing_under_autocast(family: str) -> None:
    """bf16 products, whatever dtype a family's norms and rotations leave queries, keys and values in."""
    model = random_model(family, torch.float32)
    [sequences] = random_sequences([(6, [3, 5, 1])])
    [row] = rows_for(model, [sequences], 64)
    with torch.autocast("cpu", torch.bfloat16):
        packed = row_logprobs(model, row)
        with torch.no_grad():
            plain = plain_logprobs(model, sequences)
    torch.stack([lp.float().sum() for lp in packed]).sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    exact = plain_logprobs(model, sequences)
    for own, same, true in zip(packed, plain, exact, strict=True):
        # not further from fp32 than a few times what the plain layout in bf16 is
        assert float((own.detach() - true).abs().max()) <= 0.1 + 4 * float((same - true).abs().max())


@pytest.mark.parametrize("limit", [0, 150, 10**9])
def test_fused_and_explicit_attention_agree(llama: Any, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, whichever blocks are small enough to make their scores outright."""
    monkeypatch.setattr(packed_attention, "SMALL_SCORES", limit)
    groups = random_sequences([(20, [3, 5, 1]), (18, [4, 2]), (19, [1, 9])], common=MIN_PREFIX)
    assert_packed_is_plain(llama, groups, list(rows_for(llama, groups, 4096)), 1.0, 7)


@pytest.mark.parametrize("limit", [0, 10**9])
@pytest.mark.parametrize("common", [0, MIN_PREFIX])
@pytest.mark.parametrize("shape", [[(40, [3, 5, 1, 9])], [(20, [7])], [(30, [3, 5]), (4, [2, 2, 30]), (90, [1])]])
def test_responses_that_look_at_a_long_prompt_apart(
    llama: Any, shape: Shape, common: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_attention, "SMALL_SCORES", limit)
    monkeypatch.setattr(packed_attention, "LONG_PROMPT", 1)
    calls: list[Tensor] = []
    real = long_prompt.attend_responses
    monkeypatch.setattr(long_prompt, "attend_responses", lambda *args: calls.append(args[0]) or real(*args))
    groups = random_sequences(shape, common=common)
    assert_packed_is_plain(llama, groups, plan_rows(groups, 4096), 1.0, 512)
    assert calls or len(shape) == 1 == len(shape[0][1])  # one response is plain causal


@pytest.mark.parametrize("family", ["qwen3", "gemma", "deepseek_v2"])
def test_long_prompts_of_other_families(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Normed queries, one key head for all, values narrower than keys (which go the other way)."""
    monkeypatch.setattr(packed_attention, "LONG_PROMPT", 1)
    groups = random_sequences([(40, [3, 5, 1, 9])])
    assert_packed_is_plain(random_model(family), groups, plan_rows(groups, 4096), 1.0, 512, tolerance=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 3, 512])
@pytest.mark.parametrize("family", ["llama", "cohere", "granite"])
def test_gradients_under_a_head_that_is_not_trained(family: str, chunk: int, temperature: float) -> None:
    """The slope of each token's log-prob is made in the forward pass, also through a scale after the head."""
    model = random_model(family)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        embedding.requires_grad_(False)
    groups = random_sequences([(6, [3, 5]), (4, [1])])
    assert_packed_is_plain(model, groups, plan_rows(groups, 64), temperature, chunk, tolerance=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("common", [0, MIN_PREFIX])
def test_flex_attention_sees_the_same(llama: Any, common: int) -> None:
    """What a GPU uses, here uncompiled and without its backward pass, which no CPU has."""
    groups = random_sequences([(20, [3, 5, 1]), (1, [4, 2]), (19, [1, 9])], common=common)
    [row] = rows_for(llama, groups, 4096)
    with torch.no_grad():
        for flex, parts in zip(by_flex(llama, row), row_logprobs(llama, row), strict=True):
            torch.testing.assert_close(flex, parts, atol=1e-9, rtol=1e-9)


NOT_SHARED = {
    "gemma2": {},  # caps attention scores
    "mamba": {},  # state space
    "mamba2": {},
    "lfm2": {},  # convolutions
    "qwen3_next": {},  # linear attention
    "bloom": {},  # does not go through the attention interface, ALiBi
    "gpt_oss": {},  # attention sinks
    "mistral": {"sliding_window": 8},  # shorter than the row
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma3_text": {"sliding_window": 8},
    "phi3": {"sliding_window": 8},
}


@pytest.mark.parametrize("family", NOT_SHARED)
def test_the_plain_layout_where_prompts_cannot_be_shared(family: str) -> None:
    dtype = torch.float32 if family in ("mamba", "mamba2", "qwen3_next", "gpt_oss") else torch.float64
    model = random_model(family, dtype, **NOT_SHARED[family])
    groups = random_sequences([(6, [3, 5, 1]), (3, [4, 2])])
    assert not shares_prompt(model, 16)
    assert all(len(row.owners) == 1 for row in rows_for(model, groups, 16))
    with torch.no_grad():
        for g, logprobs in group_logprobs(model, groups, row_tokens=16):
            for ours, theirs in zip(logprobs, plain_logprobs(model, groups[g]), strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_window_as_wide_as_the_row_is_no_window() -> None:
    model = random_model("mistral", sliding_window=16)
    assert shares_prompt(model, 16)
    assert not shares_prompt(model, 17)
    assert shares_prompt(random_model("qwen2", use_sliding_window=False, sliding_window=8), 1000)


# ---------------------------------------------------------------------------------------------------- the self-check


def test_check_passes_on_a_sound_model(llama: Any) -> None:
    [sequences] = random_sequences([(6, [3, 5, 1])])
    assert check_packing(llama, sequences) < 1e-5


def test_check_stops_on_a_wrong_mask(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Leaking(packed_attention.SegmentLayout):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.mask = torch.ones_like(self.mask)  # a token sees the ones after it

    monkeypatch.setattr(packed_attention, "SegmentLayout", Leaking)
    [sequences] = random_sequences([(6, [3, 5, 1])])
    with pytest.raises(ModelError, match=r"llama: packed and plain log-probs differ by [\d.]+ nats \(allowed 0.01\)"):
        check_packing(llama, sequences)
    assert llama.config._attn_implementation != packed_attention.PACKED_ATTENTION


@pytest.mark.parametrize("shape", [(6, [4]), (3, [2, 2, 2, 200])])
def test_check_looks_at_packed_rows_even_of_one_response(
    llama: Any, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, list[int]]
) -> None:
    """One response alone, or unequal ones, would go by the model's own attention; training packs them with others."""
    [sequences] = random_sequences([shape])
    assert check_packing(llama, sequences) < 1e-5
    through = []
    real = pack.row_layout
    monkeypatch.setattr(pack, "row_layout", lambda *args: through.append(1) or real(*args))
    check_packing(llama, sequences)
    assert through


def test_check_stops_on_nan() -> None:
    model = random_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    [sequences] = random_sequences([(6, [3, 5])])
    with pytest.raises(ModelError, match="differ by nan nats"):
        check_packing(model, sequences)


def test_an_attention_that_is_not_told_of_the_layout_is_an_error() -> None:
    """Some families take our attention but do not hand arguments on to it."""
    model = random_model("nemotron")
    assert not shares_prompt(model, 16)
    [row] = plan_rows(random_sequences([(4, [3, 5])]), 64)
    with pytest.raises(ModelError, match="nemotron: does not hand arguments to its attention"):
        row_logprobs(model, row)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_turn_with_the_rows_length_are_not_shared(kind: str) -> None:
    """Another group in the row would change a short group's log-probs."""
    factors = {"long_factor": [4.0] * 4, "short_factor": [1.0] * 4} if kind == "longrope" else {"factor": 2.0}
    given = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    given |= {"num_attention_heads": 4, "max_position_embeddings": 256}
    usual = LlamaForCausalLM(LlamaConfig(**given))
    rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 64} | factors
    turning = LlamaForCausalLM(LlamaConfig(**given, rope_parameters=rope))
    assert shares_prompt(usual, 100)
    assert not shares_prompt(turning, 100)


def test_rows_are_built_as_they_are_asked_for(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round's rows together take many times the memory of its tokens."""
    built = []
    build = rows._build_row
    monkeypatch.setattr(rows, "_build_row", lambda *given: built.append(1) or build(*given))
    groups = random_sequences([(4, [3, 5])] * 6)
    found = group_logprobs(llama, groups, row_tokens=12)
    next(found)
    assert len(built) == 1
    assert len(list(found)) == 5 and len(built) == 6
