"""Linear layers whose weights lie in oneDNN's own layout: fp32 on a CPU.

Products of the built-in model's shapes run at 180 to 226 GFLOP/s instead of 115 to 180, where they were measured
(dev/LOG.md). For bf16 it makes no difference. A packed weight cannot be trained or saved: it is for sampling and
scoring, and for the base weights under an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

EXPECTED_ROWS = 128  # for which oneDNN chooses its layout; others work


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


class FrozenLinear(PackedLinear):
    """One that gradients pass through: its weight is packed a second time, transposed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.transposed = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach().t().contiguous(), EXPECTED_ROWS
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Frozen.apply(x, self)
        return out


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return PackedLinear.forward(layer, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.ops.mkldnn._linear_pointwise(
            grads[0].contiguous(), ctx.layer.transposed, None, "none", [], ""
        ), None


def packs(model: nn.Module) -> bool:
    """True if this model's weights are fp32 on a CPU and packing works there."""
    weight = next(model.parameters())
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and packing_works()


def replace_linear(
    model: nn.Module,
    make: Callable[[nn.Linear], nn.Module],
    which: Callable[[nn.Linear], bool] = lambda linear: True,
) -> None:
    """Put `make(linear)` in the place of linear layers, the head too; an embedding tied to it stays."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and which(child):
                setattr(module, name, make(child))
