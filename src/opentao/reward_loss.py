"""Losses of a reward model: what people's choices say about scores. Pure functions of scores and ranks.

`scores_NK`: N answers to one prompt under K heads (K = 1 without an ensemble); every function gives K losses in nats.
Ranks: lower is better. Equal ranks mean "equally good" where a ranking says so, else "not compared".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Pair = tuple[int, int]


def bradley_terry(
    scores_NK: Tensor,
    pairs: Sequence[Pair],
    tied: Sequence[Pair] = (),
    *,
    margin: float = 0.0,
    smoothing: float = 0.0,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Mean over (better, worse) pairs of −(1−ε)·log σ(d − m) − ε·log σ(m − d), d = s_better − s_worse.

    A tied pair counts with −½·log σ(d) − ½·log σ(−d), which is least at d = 0. `weights`: one a pair, ties last; they
    are divided by their mean over the *training set* by whoever makes them, so the mean here stays a plain one.
    Sources: Bradley & Terry 1952; margin: Touvron et al., arXiv 2307.09288, eq. 2; smoothing: Wang et al., 2401.06080.
    """
    better, worse = _columns([*pairs, *tied], scores_NK.device)
    d_PK = scores_NK[better] - scores_NK[worse]
    n = len(pairs)
    sure = (1 - smoothing) * logsigmoid(d_PK[:n] - margin) + smoothing * logsigmoid(margin - d_PK[:n])
    equal = (logsigmoid(d_PK[n:]) + logsigmoid(-d_PK[n:])) / 2
    losses_PK = -torch.cat([sure, equal])
    if weights is not None:
        losses_PK = losses_PK * torch.tensor(weights, device=losses_PK.device, dtype=losses_PK.dtype)[:, None]
    return losses_PK.mean(0)


def plackett_luce(scores_NK: Tensor, ranks: Sequence[float], *, ties_equal: bool) -> Tensor:
    """−log probability of the ranking, divided by its number of choices.

    One choice after the other, best first: log p = Σ_i (s_i − log Σ_{j not yet placed} e^{s_j}). Answers of one rank
    are placed together: if the tie means "equally good", each against all that are left, itself and the others
    included (Breslow's approximation); if it means "not compared", each against itself and what ranks below.
    Sources: Plackett 1975; Luce 1959; Breslow 1974 for ties.
    """
    levels = sorted(set(ranks))
    terms = []
    for level in levels:
        here = [i for i, rank in enumerate(ranks) if rank == level]
        below = [i for i, rank in enumerate(ranks) if rank > level]
        if not below and (len(here) == 1 or not ties_equal):
            break  # nothing left to choose from
        for i in here:
            rivals = [*here, *below] if ties_equal else [i, *below]
            terms.append(torch.logsumexp(scores_NK[rivals], 0) - scores_NK[i])
    return torch.stack(terms).mean(0)


def length_weights(longer_better: Sequence[bool | None], shares: Sequence[float] | None = None) -> list[float]:
    """Weights of pairs such that those whose longer answer was preferred weigh as much as the others, mean 1.

    None (equal lengths) keeps weight 1. Under these weights "the longer answer wins" is right half of the time, so
    length alone earns nothing. If all pairs lean one way, nothing can be balanced and all weights are 1. `shares`: how
    much each pair counts before; all alike without.

    >>> length_weights([True, True, True, False])
    [0.6666666666666666, 0.6666666666666666, 0.6666666666666666, 2.0]
    """
    shares = [1.0] * len(longer_better) if shares is None else shares
    longer, shorter = (
        sum(share for kind, share in zip(longer_better, shares, strict=True) if kind is side) for side in (True, False)
    )
    if not longer or not shorter:
        return [1.0] * len(longer_better)
    half = (longer + shorter) / 2
    by_kind = {True: half / longer, False: half / shorter, None: 1.0}
    return [by_kind[kind] for kind in longer_better]


def _columns(pairs: Sequence[Pair], device: torch.device) -> tuple[Tensor, Tensor]:
    better, worse = (torch.tensor(side, device=device) for side in zip(*pairs, strict=True))
    return better, worse
