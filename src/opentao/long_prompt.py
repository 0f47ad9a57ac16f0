"""Attention of a group's responses to a long prompt and to themselves, on a CPU: two fused calls, merged exactly.

All responses look at one copy of the prompt's keys without a mask; each looks at its own tokens causally. With the
softmax sums of both, out = Σ_part exp(lse_part − lse)·out_part. Backwards, a fused kernel that is given the merged
output and the merged lse gives each part's exact gradients, since P_ij = exp(s_ij − lse) and Σ_j dP_ij P_ij =
dout_i·out_i hold over all keys (Dao et al., FlashAttention, arXiv 2205.14135, section 3; Liu et al., Ring Attention,
arXiv 2310.01889).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_responses(
    q: Tensor, context_k: Tensor, context_v: Tensor, own_k: Tensor, own_v: Tensor, scaling: float
) -> Tensor:
    """Args: q [N, H, R, D], context_k and _v [1, Hk, P, D], own_k and _v [N, Hk, R, D] -> [N, H, R, D].

    Responses may be padded behind their end.
    """
    rep = q.shape[1] // own_k.shape[1]
    by_head = (x.repeat_interleave(rep, 1) if rep > 1 else x for x in (context_k, context_v, own_k, own_v))
    out: Tensor = _TwoParts.apply(q, *by_head, scaling)
    return out


def works(q: Tensor, v: Tensor) -> bool:
    """True if the fused kernel takes these: one head size for keys and values, on a CPU."""
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


class _TwoParts(torch.autograd.Function):
    """All with H heads."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor, scaling: float) -> Tensor:
        N, H, R, D = q.shape
        ctx.scaling = scaling
        q1 = _side_by_side(q)
        out1, lse1 = _forward(q1, k1, v1, scale=scaling)
        out2, lse2 = _forward(q, k2, v2, is_causal=True, scale=scaling)
        lse1 = lse1.view(H, N, R).transpose(0, 1)
        lse = torch.logaddexp(lse1, lse2)
        out1 = out1.view(H, N, R, D).transpose(0, 1)
        out = out1 * (lse1 - lse).exp()[..., None] + out2 * (lse2 - lse).exp()[..., None]
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k1, v1, k2, v2, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k1, v1, k2, v2, out, lse = ctx.saved_tensors
        N, H, R, D = q.shape
        grad = grads[0].contiguous()
        lse = lse.contiguous()
        whole = [_side_by_side(x) for x in (grad, q, out)]
        lse1 = lse.transpose(0, 1).reshape(1, H, N * R)
        dq1, dk1, dv1 = _backward(
            whole[0], whole[1], k1, v1, whole[2], lse1, 0.0, False, attn_mask=None, scale=ctx.scaling
        )
        dq2, dk2, dv2 = _backward(grad, q, k2, v2, out, lse, 0.0, True, attn_mask=None, scale=ctx.scaling)
        dq = dq2 + dq1.view(H, N, R, D).transpose(0, 1)
        return dq, dk1, dv1, dk2, dv2, None


def _side_by_side(x: Tensor) -> Tensor:
    """[N, H, R, D] -> [1, H, N·R, D]: all responses as one run of queries."""
    N, H, R, D = x.shape
    return x.transpose(0, 1).reshape(1, H, N * R, D)
