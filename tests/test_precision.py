"""The sampler's weights in int8 and in oneDNN's layout, against the plain linear layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from opentao.engines.group import GroupEngine
from opentao.engines.precision import Int8Linear, PackedLinear, load_sampler, packing_works
from opentao.policy import Policy, load_policy
from opentao.types import Prompt, SamplingPlan


def layer(inputs: int, outputs: int, *, bias: bool, seed: int) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(inputs, outputs, bias=bias)


@given(
    inputs=st.sampled_from([8, 24, 64]),
    outputs=st.sampled_from([8, 40]),
    bias=st.booleans(),
    seed=st.integers(0, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@torch.no_grad()
def test_int8_is_within_its_rounding(inputs: int, outputs: int, bias: bool, seed: int, dtype: torch.dtype) -> None:
    """Each factor is off by at most half a step: |error| <= Σ |x|·w_step/2 + |w|·x_step/2 + both, a row by a column."""
    linear = layer(inputs, outputs, bias=bias, seed=seed)
    x = torch.randn(3, 5, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)
    found = Int8Linear(linear)(x)
    assert found.shape == (3, 5, outputs) and found.dtype == dtype
    exact = linear(x.float())
    x_step = x.float().abs().amax(-1, keepdim=True) / 127
    w_step = linear.weight.abs().amax(1) / 127
    bound = (x.float().abs().sum(-1, keepdim=True) * w_step + x_step * linear.weight.abs().sum(1)) / 2
    bound += inputs * x_step * w_step / 4 + (0.02 * exact.abs() + 0.01 if dtype == torch.bfloat16 else 1e-5)
    assert ((found.float() - exact).abs() <= bound).all()


def test_int8_of_nothing_is_nothing() -> None:
    linear = layer(8, 8, bias=False, seed=0)
    assert Int8Linear(linear)(torch.zeros(2, 8)).abs().max() == 0


@pytest.mark.skipif(not packing_works(), reason="this build of torch does not pack weights")
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_packed_weights_multiply_alike(rows: int) -> None:
    linear = layer(64, 40, bias=True, seed=1)
    x = torch.randn(rows, 2, 64)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), atol=1e-5, rtol=1e-5)


def test_a_round_may_be_sampled_in_another_precision(tiny_model_dir: Path) -> None:
    base = Policy.of_base(str(tiny_model_dir))
    engine = GroupEngine()
    engine.load(base)
    prompts = [Prompt.from_text("My parcel is late.")]
    by_dtype = {}
    for dtype in ("float32", "int8", "float32"):
        plan = SamplingPlan(group_size=4, temperature=0, max_new_tokens=8, dtype=dtype)  # type: ignore[arg-type]
        [group] = engine.sample(prompts, plan)
        by_dtype.setdefault(dtype, []).append(group.responses[0])
        assert engine.dtype == dtype
    assert by_dtype["float32"][0] == by_dtype["float32"][1]
    first = [r.sampler_logprobs_R[0] for r in (by_dtype["float32"][0], by_dtype["int8"][0])]
    assert first[0] != first[1] and abs(first[0] - first[1]) < 0.5
    kinds = {type(m) for m in load_sampler(base, "int8").model.modules()}
    assert Int8Linear in kinds and nn.Linear not in kinds
    assert nn.Linear in {type(m) for m in load_policy(base).model.modules()}  # the learner's own
