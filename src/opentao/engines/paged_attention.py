"""Attention of one decoding step on a GPU, as two Triton kernels; neither has a shape that depends on who is decoded.

`attend_prompts`: all rows of a prompt look at its pages in one matrix product, in several parts for long prompts.
`attend_own`: each row writes its new key and value, looks at its own tokens, and merges all parts into one softmax.

What a step reads (pages, lengths, which rows belong together) lies in tensors, so that a captured graph stays right
while rows come and go.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

PAGE = 64  # tokens of a prompt that lie together
OWN_BLOCK = 64  # own tokens in one product
LEAST_QUERIES = 16  # rows of the smallest matrix product
MOST_QUERIES = 64  # of one program

Parts = tuple[Tensor, Tensor, Tensor]
"""Attention over parts of the keys: peak of the scores and sum of exp(scores − peak) [L, H, S], values mixed by the
unnormed softmax [L, H, S, D]; fp32."""


def slots_for(count: int, rep: int) -> int:
    """Rows of one prompt that one program serves, for groups of `count` rows and `rep` query heads a key head.

    >>> [slots_for(count, 3) for count in (1, 8, 64)], slots_for(8, 1)
    ([4, 8, 16], 16)
    """
    width = triton.next_power_of_2(rep)
    least, most = max(1, LEAST_QUERIES // width), max(1, MOST_QUERIES // width)
    return int(max(least, min(most, triton.next_power_of_2(count))))


def attend_prompts(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, tiles: Tensor, scaling: float, splits: int
) -> Parts:
    """Attention of rows over their prompts.

    Args:
        q: [L, H, 1, D].
        k, v: pages [pages, Hk, PAGE, D].
        table: pages of each prompt [places, most pages], int32.
        lengths: tokens of each prompt [places], int32.
        tiles: [tiles, 1 + slots], int32: a prompt (−1: none) and the rows that look at it (−1: none).
        splits: parts of a prompt that are computed side by side.
    """
    L, H, _, D = q.shape
    Hk = k.shape[1]
    q = q if q.stride(-1) == 1 else q.contiguous()
    # A row that no tile names reads parts that nobody wrote; such rows are padding.
    peak = q.new_empty(L, H, splits, dtype=torch.float32)
    total, mixed = torch.empty_like(peak), q.new_empty(L, H, splits, v.shape[-1], dtype=torch.float32)
    _prompts[(len(tiles), Hk, splits)](
        q, k, v, table, lengths, tiles, peak, total, mixed, scaling,
        q.stride(0), q.stride(1), table.stride(0), H, Hk,
        REP=H // Hk, WIDTH=triton.next_power_of_2(H // Hk), SLOTS=tiles.shape[1] - 1,
        D=D, DV=v.shape[-1], D_PAD=_padded(D), DV_PAD=_padded(v.shape[-1]),
        PAGE=PAGE, SPLITS=splits, PRECISION=_precision(k),
    )  # fmt: skip
    return peak, total, mixed


def attend_own(
    q: Tensor,
    new: Sequence[Tensor],
    kept: Sequence[Tensor],
    slots: Tensor,
    lengths: Tensor,
    parts: Parts,
    scaling: float,
) -> Tensor:
    """Store each row's new key and value; attention over its own tokens and `parts` -> [L, H, D].

    Args:
        q: [L, H, 1, D].
        new: key and value [L, Hk, 1, D] of the token that is fed.
        kept: keys and values of own tokens, [slots, Hk, tokens, D]; written in place.
        slots: where each row's lie [L], int32.
        lengths: how many own tokens each row has before this one [L], int32.
    """
    L, H, _, D = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, *new))
    Hk, DV = k.shape[1], v.shape[-1]
    out = v.new_empty(L, H, DV)
    width = triton.next_power_of_2(H // Hk)
    _own[(L, Hk)](
        q, k, v, kept[0], kept[1], slots, lengths, *parts, out, scaling,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), kept[0].stride(0),
        kept[0].stride(1), kept[1].stride(0), kept[1].stride(1), H,
        REP=H // Hk, WIDTH=max(LEAST_QUERIES, width), D=D, DV=DV, D_PAD=_padded(D), DV_PAD=_padded(DV),
        BLOCK=OWN_BLOCK, SPLITS=parts[0].shape[2], PRECISION=_precision(kept[0]),
    )  # fmt: skip
    return out


def _padded(width: int) -> int:
    return max(16, int(triton.next_power_of_2(width)))


def _precision(k: Tensor) -> str:
    return "ieee" if k.dtype == torch.float32 else "tf32"


@triton.jit
def _look(q, k, v, seen, peak, total, mixed, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Attention over one more block of keys, of which those in `seen` count: the running peak, sum and mix after it."""
    scores = tl.where(seen[None], tl.dot(q, tl.trans(k), input_precision=PRECISION), float("-inf"))
    top = tl.maximum(peak, tl.max(scores, 1))
    probs = tl.exp(scores - top[:, None])
    shrink = tl.exp(peak - top)
    total = total * shrink + tl.sum(probs, 1)
    mixed = mixed * shrink[:, None] + tl.dot(probs.to(v.dtype), v, input_precision=PRECISION)
    return top, total, mixed


@triton.jit
def _prompts(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, tiles_ptr, peak_ptr, total_ptr, mixed_ptr, scaling,
    q_row, q_head, table_row, H, Hk,
    REP: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    PAGE: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the rows of a tile, one key head, one part of the prompt."""
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = tl.load(tiles_ptr + tile * (1 + SLOTS))
    if place < 0:
        return
    m = tl.arange(0, SLOTS * WIDTH)
    row = tl.load(tiles_ptr + tile * (1 + SLOTS) + 1 + m // WIDTH)
    real = (row >= 0) & (m % WIDTH < REP)
    query = head * REP + m % WIDTH
    d, dv, n = tl.arange(0, D_PAD), tl.arange(0, DV_PAD), tl.arange(0, PAGE)
    at = row.to(tl.int64)[:, None] * q_row + query[:, None] * q_head + d[None]
    q = tl.load(q_ptr + at, mask=real[:, None] & (d < D)[None], other=0.0)
    q = (q.to(tl.float32) * scaling).to(k_ptr.dtype.element_ty)
    length = tl.load(lengths_ptr + place)
    pages = tl.cdiv(length, PAGE)
    each = tl.cdiv(pages, SPLITS)
    peak = tl.full([SLOTS * WIDTH], float("-inf"), tl.float32)
    total = tl.zeros([SLOTS * WIDTH], tl.float32)
    mixed = tl.zeros([SLOTS * WIDTH, DV_PAD], tl.float32)
    for i in range(split * each, tl.minimum(pages, (split + 1) * each)):
        page = tl.load(table_ptr + place * table_row + i).to(tl.int64) * Hk + head
        seen = i * PAGE + n < length
        k = tl.load(k_ptr + (page * PAGE + n)[:, None] * D + d[None], mask=seen[:, None] & (d < D)[None], other=0.0)
        v = tl.load(v_ptr + (page * PAGE + n)[:, None] * DV + dv[None], mask=seen[:, None] & (dv < DV)[None], other=0.0)
        peak, total, mixed = _look(q, k, v, seen, peak, total, mixed, PRECISION)
    part = (row.to(tl.int64) * H + query) * SPLITS + split
    tl.store(peak_ptr + part, peak, mask=real)
    tl.store(total_ptr + part, total, mask=real)
    tl.store(mixed_ptr + part[:, None] * DV + dv[None], mixed, mask=real[:, None] & (dv < DV)[None])


@triton.jit
def _own(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, kept_k_ptr, kept_v_ptr, slots_ptr, lengths_ptr, peak_ptr, total_ptr, mixed_ptr, out_ptr,
    scaling, q_row, q_head, k_row, k_head, v_row, v_head, kept_k_row, kept_k_head, kept_v_row, kept_v_head, H,
    REP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one row and one key head."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    r, d, dv, n = tl.arange(0, WIDTH), tl.arange(0, D_PAD), tl.arange(0, DV_PAD), tl.arange(0, BLOCK)
    real = r < REP
    query = head * REP + r
    q = tl.load(
        q_ptr + row * q_row + query[:, None] * q_head + d[None], mask=real[:, None] & (d < D)[None], other=0.0
    ).to(tl.float32)
    q *= scaling
    slot = tl.load(slots_ptr + row).to(tl.int64)
    length = tl.load(lengths_ptr + row)
    kept_k = kept_k_ptr + slot * kept_k_row + head * kept_k_head
    kept_v = kept_v_ptr + slot * kept_v_row + head * kept_v_head
    k_new = tl.load(k_ptr + row * k_row + head * k_head + d, mask=d < D, other=0.0).to(kept_k_ptr.dtype.element_ty)
    v_new = tl.load(v_ptr + row * v_row + head * v_head + dv, mask=dv < DV, other=0.0).to(kept_v_ptr.dtype.element_ty)
    tl.store(kept_k + length * D + d, k_new, mask=d < D)
    tl.store(kept_v + length * DV + dv, v_new, mask=dv < DV)
    # What is seen first is the token itself; it has been in registers all along.
    peak = tl.sum(q * k_new.to(tl.float32)[None], 1)
    total = tl.full([WIDTH], 1.0, tl.float32)
    mixed = tl.zeros([WIDTH, DV_PAD], tl.float32) + v_new.to(tl.float32)[None]
    q = q.to(kept_k_ptr.dtype.element_ty)
    for start in range(0, length, BLOCK):
        seen = start + n < length
        k = tl.load(kept_k + (start + n)[:, None] * D + d[None], mask=seen[:, None] & (d < D)[None], other=0.0)
        v = tl.load(kept_v + (start + n)[:, None] * DV + dv[None], mask=seen[:, None] & (dv < DV)[None], other=0.0)
        peak, total, mixed = _look(q, k, v, seen, peak, total, mixed, PRECISION)
    for split in range(SPLITS):
        part = (row * H + query) * SPLITS + split
        other = tl.load(peak_ptr + part, mask=real, other=float("-inf"))
        top = tl.maximum(peak, other)
        mine, theirs = tl.exp(peak - top), tl.exp(other - top)
        total = total * mine + tl.load(total_ptr + part, mask=real, other=0.0) * theirs
        there = tl.load(mixed_ptr + part[:, None] * DV + dv[None], mask=real[:, None] & (dv < DV)[None], other=0.0)
        mixed = mixed * mine[:, None] + there * theirs[:, None]
        peak = top
    out = (mixed / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (row * H + query)[:, None] * DV + dv[None], out, mask=real[:, None] & (dv < DV)[None])
