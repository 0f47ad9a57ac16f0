"""The sampler's weights: in which precision, and laid out so that they multiply fast.

On a CPU fp32 weights of linear layers are put into oneDNN's own layout once, where that works: products of the built-in
model's shapes run at 207 to 226 GFLOP/s instead of 124 to 197. For bf16 it makes no difference (dev/LOG.md).

`int8` is for sampling only: weights are rounded a row, activations a token (symmetric, absmax), products are exact
integers. How far such a sampler is from the policy is measured on its own samples (`train.sampler_mismatch`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from opentao.policy import LoadedPolicy, Policy, default_device, default_dtype, load_policy
from opentao.types import RolloutDtype

LEVELS = 127
EXPECTED_ROWS = 128  # for which oneDNN chooses its layout; others work


class Int8Linear(nn.Module):
    """A linear layer with int8 weights [out, in] and a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-12) / LEVELS
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        step = flat.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / LEVELS
        rounded = (flat / step).round_().to(torch.int8)
        out = (torch._int_mm(rounded, self.weight.t()) * self.scale).mul_(step).to(x.dtype)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], -1)


class PackedLinear(nn.Module):
    """A linear layer whose weight [out, in] lies in oneDNN's layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), EXPECTED_ROWS)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


@cache
def packing_works() -> bool:
    """True if this build of torch packs fp32 weights and multiplies right with them."""
    if not torch.backends.mkldnn.is_available():
        return False
    linear = nn.Linear(64, 48)
    x = torch.linspace(-1, 1, 5 * 64).view(5, 64)
    try:
        with torch.inference_mode():
            return torch.allclose(PackedLinear(linear)(x), linear(x), atol=1e-5)
    except (RuntimeError, AttributeError):  # the operation is not there
        return False


def load_sampler(policy: Policy, dtype: RolloutDtype) -> LoadedPolicy:
    """A policy's weights in the precision that sampling asks for."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    loaded = load_policy(policy, dtype=kinds.get(dtype, default_dtype(default_device())))
    model = loaded.model
    if dtype == "int8":
        replace_linear(model, Int8Linear)
    elif loaded.device.type == "cpu" and model.dtype == torch.float32 and packing_works():
        replace_linear(model, PackedLinear)
    return loaded


def replace_linear(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put `make(linear)` in the place of every linear layer, the head too; an embedding tied to it stays."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, make(child))
