"""The sampler's weights in int8 and in oneDNN's layout, against the plain linear layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import CONFIG_MAPPING

from opentao import policy as policy_module
from opentao.config import TrainConfig
from opentao.engines.group import GroupEngine
from opentao.engines.precision import Int8Linear, load_sampler
from opentao.liger import _not_its
from opentao.pack import row_logprobs, rows_for
from opentao.packed_linear import FrozenLinear, PackedLinear, packing_works
from opentao.policy import Policy, load_for_training, load_policy
from opentao.rows import Sequences
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


@pytest.mark.skipif(not packing_works(), reason="this build of torch does not pack weights")
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_pass_through_frozen_weights(bias: bool) -> None:
    linear = layer(64, 40, bias=bias, seed=1)
    x, y = (torch.linspace(-1, 1, 9 * 64).view(1, 9, 64).requires_grad_() for _ in range(2))
    weight = torch.linspace(0, 1, 9 * 40).view(1, 9, 40)
    (FrozenLinear(linear)(x) * weight).sum().backward()
    (linear(y) * weight).sum().backward()
    assert x.grad is not None and y.grad is not None
    torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not packing_works(), reason="this build of torch does not pack weights")
def test_an_adapter_on_packed_weights_learns_and_is_saved_alike(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same log-probs and gradients of the adapter as on ordinary weights; head included."""
    found = {}
    for packed in (True, False):
        monkeypatch.setattr(policy_module, "native_bf16", lambda device: False)
        monkeypatch.setattr(policy_module, "packs", lambda model, packed=packed: packed)
        config = TrainConfig(method="lora", lora={"rank": 4})
        loaded = load_for_training(Policy.of_base(str(tiny_model_dir)), config, seed=3)
        assert packed == any(isinstance(m, FrozenLinear) for m in loaded.model.modules())
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:  # zero at first, which would make every gradient of A zero
                torch.nn.init.constant_(parameter, 0.01)
        [row] = rows_for(loaded.model, [Sequences(prompt_P=(5, 6, 7), responses_NR=((8, 9), (10,)))], 64)
        logprobs = torch.cat(row_logprobs(loaded.model, row))
        logprobs.sum().backward()
        grads = {n: p.grad for n, p in loaded.model.named_parameters() if p.requires_grad}
        loaded.save(tmp_path / str(packed))
        found[packed] = (logprobs, grads, (tmp_path / str(packed) / "adapter_model.safetensors").read_bytes())
    torch.testing.assert_close(found[True][0], found[False][0], atol=1e-5, rtol=1e-5)
    assert found[True][1].keys() == found[False][1].keys() and len(found[True][1]) > 4
    for name, grad in found[True][1].items():
        torch.testing.assert_close(grad, found[False][1][name], atol=1e-5, rtol=1e-4)
    assert found[True][2] == found[False][2]


@pytest.mark.parametrize(
    ("capabilities", "vendor", "expected"),
    [
        ({"avx512_bf16": True}, "AuthenticAMD", True),
        ({"avx512_bf16": True}, "GenuineIntel", False),  # at half the speed of fp32
        ({"avx512_bf16": True, "amx_bf16": True}, "GenuineIntel", True),
        ({"amx_bf16": True}, "GenuineIntel", True),
        ({"avx512_bf16": False}, "AuthenticAMD", False),
        ({}, "", False),
    ],
)
def test_bf16_where_it_is_faster(
    capabilities: dict[str, bool], vendor: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: x\n")
    monkeypatch.delenv("OPENTAO_BF16", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    intel = policy_module.intel
    monkeypatch.setattr(policy_module, "intel", lambda: intel(cpuinfo))
    assert policy_module.native_bf16(torch.device("cpu")) is expected
    monkeypatch.setenv("OPENTAO_BF16", "0")
    assert policy_module.native_bf16(torch.device("cpu")) is False


def test_an_adapter_is_merged_before_weights_are_rounded(tiny_model_dir: Path, tmp_path: Path) -> None:
    """An update of less than half a step of bf16 must not vanish on each weight: only the sum is rounded."""
    base = Policy.of_base(str(tiny_model_dir))
    trained = load_for_training(base, TrainConfig(method="lora", lora={"rank": 4}), seed=3)
    for name, parameter in trained.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 1e-3)
    trained.save(tmp_path / "adapter")
    policy = Policy.of_folder(base, tmp_path / "adapter")
    exact, rounded = (load_policy(policy, dtype=dtype).model for dtype in (torch.float32, torch.bfloat16))
    weights = dict(rounded.named_parameters())
    for name, weight in exact.named_parameters():
        assert torch.equal(weights[name], weight.to(torch.bfloat16)), name
    plain = dict(load_policy(base, dtype=torch.bfloat16).model.named_buffers())
    buffers = dict(rounded.named_buffers())  # rotary frequencies: as precise as without an adapter
    assert plain and buffers.keys() == plain.keys()
    assert all(torch.equal(buffers[name], own) and buffers[name].dtype == own.dtype for name, own in plain.items())


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


@pytest.mark.parametrize(
    ("family", "changes", "left_out"),
    [("llama", {}, {"geglu"}), ("llama", {"hidden_act": "relu"}, {"swiglu", "geglu"}), ("gemma", {}, {"swiglu"})],
)
def test_ligers_mlp_is_left_out_where_the_activation_is_another(
    family: str, changes: dict[str, str], left_out: set[str]
) -> None:
    assert set(_not_its(CONFIG_MAPPING[family](**changes))) == left_out
