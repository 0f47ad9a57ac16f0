"""Drawing tokens: one number in [0, 1) a row through the inverse of the distribution function, and exact log-probs.

A vocabulary-wide random draw a step costs more than the model's matrix products on a CPU; here a row needs one uniform
number, one pass of exponentials and two short searches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opentao.types import SamplingPlan


def uniforms(seed: int, count: int) -> Tensor:
    """The random stream of one response."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def draw(
    logits_LV: Tensor,
    uniform_L: Tensor,
    plan: SamplingPlan,
    forced_L: Tensor | None = None,
    room: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverse CDF. Log-probs are of the full distribution at the temperature (1 if greedy).

    Args:
        logits_LV: unscaled logits of L rows.
        uniform_L: one number in [0, 1) a row.
        forced_L: tokens to take instead of drawing; -1 = draw.
        room: what `room_for` gave for as many rows or more, to be used again at every step.
    """
    scaled = logits_LV.float() if plan.temperature in (0.0, 1.0) else logits_LV.float() / plan.temperature
    full = _probabilities(scaled, room if room is not None else room_for(logits_LV))
    probs = truncate(full, plan.top_k, plan.top_p) if plan.truncated else full
    width = block_width(logits_LV.shape[1])
    token = logits_LV.argmax(-1, keepdim=True) if plan.temperature == 0 else _inverse_cdf(probs, uniform_L, width)
    token = token.clamp(max=logits_LV.shape[1] - 1)  # of NaN logits it may lie in the padding
    if forced_L is None:
        logprob = full.gather(-1, token).log()
    else:  # a forced token may be so improbable that its probability is 0 in fp32
        token = torch.where(forced_L[:, None] < 0, token, forced_L[:, None])
        logprob = scaled.gather(-1, token) - scaled.logsumexp(-1, keepdim=True)
    return token[:, 0], logprob[:, 0]


def room_for(logits_LV: Tensor, rows: int | None = None) -> Tensor:
    """Memory for the work of `draw` on so many rows, [rows, vocabulary padded to whole blocks], fp32.

    Fresh pages for it at every step cost several times the arithmetic on them.
    """
    L, V = rows or len(logits_LV), logits_LV.shape[1]
    width = block_width(V)
    return torch.zeros(L, math.ceil(V / width) * width, dtype=torch.float32, device=logits_LV.device)


def block_width(vocabulary: int) -> int:
    """About the square root; one that divides the vocabulary if there is one nearby, since padding costs a pass.

    >>> [block_width(v) for v in (49_152, 151_936, 50_257)]
    [192, 128, 225]
    """
    root = math.ceil(math.sqrt(vocabulary))
    near = [w for w in range(max(1, root // 4), 4 * root) if vocabulary % w == 0]
    return min(near, key=lambda w: abs(w - root)) if near else root


def _probabilities(scaled_LV: Tensor, room: Tensor) -> Tensor:
    """Softmax in `room`, [L, vocabulary padded with zeros]."""
    L, V = scaled_LV.shape
    if room.shape[1] == V:
        return torch.softmax(scaled_LV, -1, out=room[:L])
    room[:L, :V] = torch.softmax(scaled_LV, -1)
    return room[:L]


def _inverse_cdf(mass_LV: Tensor, uniform_L: Tensor, width: int) -> Tensor:
    """Token [L, 1] at which the cumulative mass passes `uniform_L`: the block of `width` tokens first, then in it.

    A token of zero mass is never hit: places are strictly below the sum, and the first sum above a place is taken.
    """
    blocks_LBW = mass_LV.view(len(mass_LV), -1, width)
    sums = blocks_LBW.sum(-1)
    ends = _cumulative(sums)
    place = _below(uniform_L[:, None] * ends[:, -1:], ends[:, -1:])
    block = _first_above(ends, place)
    inside = blocks_LBW[torch.arange(len(mass_LV), device=mass_LV.device), block[:, 0]]
    inside = _cumulative(inside)
    rest = _below(place - (ends - sums).gather(-1, block), inside[:, -1:])
    return block * width + _first_above(inside, rest)


def _first_above(sums: Tensor, place: Tensor) -> Tensor:
    """Never beyond the end, where NaN leads: on a GPU that would end the process. Its log-prob is NaN and tells."""
    return torch.searchsorted(sums, place, right=True).clamp_(max=sums.shape[1] - 1)


def _cumulative(mass: Tensor) -> Tensor:
    """Running sums that never fall: on a GPU, parts are added in an order in which rounding can make them."""
    sums = mass.cumsum(-1)
    return sums.cummax(-1).values if sums.device.type == "cuda" else sums


def _below(place: Tensor, end: Tensor) -> Tensor:
    """`place`, kept between 0 and the largest number below `end` against rounding."""
    return torch.minimum(place.clamp(min=0), torch.nextafter(end, torch.zeros_like(end)))


def truncate(mass_LV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero what is outside the `top_k` largest, then outside the smallest set that holds `top_p` of the rest."""
    ordered, order = mass_LV.sort(-1, descending=True)
    if top_k > 0:
        ordered[:, top_k:] = 0
    before = ordered.cumsum(-1) - ordered
    ordered[before >= top_p * ordered.sum(-1, keepdim=True)] = 0
    return torch.zeros_like(mass_LV).scatter_(-1, order, ordered)
