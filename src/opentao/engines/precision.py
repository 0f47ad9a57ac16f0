"""The sampler's weights: in which precision, and laid out so that they multiply fast.

On a CPU fp32 weights are packed (`packed_linear`).

`int8` is for sampling only: weights are rounded a row, activations a token (symmetric, absmax), products are exact
integers. How far such a sampler is from the policy is measured on its own samples (`train.sampler_mismatch`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opentao.packed_linear import PackedLinear, packs, replace_linear
from opentao.policy import LoadedPolicy, Policy, default_device, default_dtype, load_policy
from opentao.types import RolloutDtype

LEVELS = 127
FEW_ROWS = 16


class Int8Linear(nn.Module):
    """A linear layer with int8 weights [out, in] and a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-12) / LEVELS
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        # A GPU multiplies whole eights.
        self.padding = [-size % 8 if weight.device.type == "cuda" else 0 for size in weight.shape]
        self.register_buffer("weight", nn.functional.pad(rounded, (0, self.padding[1], 0, self.padding[0])))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        step = flat.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / LEVELS
        rounded = (flat / step).round_().to(torch.int8)
        if x.device.type == "cuda":  # which takes no few rows
            rounded = nn.functional.pad(rounded, (0, self.padding[1], 0, max(0, FEW_ROWS + 1 - len(flat))))
        product = torch._int_mm(rounded, self.weight.t())[: len(flat), : len(self.scale)]
        out = (product * self.scale).mul_(step).to(x.dtype)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], -1)


def load_sampler(policy: Policy, dtype: RolloutDtype) -> LoadedPolicy:
    """A policy's weights in the precision that sampling asks for."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    loaded = load_policy(policy, dtype=kinds.get(dtype, default_dtype(default_device())))
    model = loaded.model
    if dtype == "int8":
        replace_linear(model, Int8Linear)
    elif packs(model):
        replace_linear(model, PackedLinear)
    return loaded
