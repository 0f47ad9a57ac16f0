"""Policies: which weights answer. A `Policy` names them, `LoadedPolicy` holds them in memory.

A policy is the base model, or a folder of a run: full weights (`model.safetensors`) or a LoRA adapter on the base.
Its hash is that of its weights (the base's: of its tokenizer, template and config, too), so responses and stages can
say which policy they came from.
"""

from __future__ import annotations

import gc
import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from opentao import liger
from opentao.config import TrainConfig
from opentao.errors import ModelError
from opentao.models import hub_commit, load_causal_lm, load_tokenizer, resolve_model
from opentao.packed_linear import FrozenLinear, packs, replace_linear
from opentao.store import file_hash
from opentao.types import Message, content_hash

READ_OF_A_MODEL = (".safetensors", ".json", ".jinja", ".model", ".txt")  # weights, config, tokenizer, chat template


@dataclass(kw_only=True, slots=True, frozen=True)
class Policy:
    """Example: ``Policy(base="smollm2-135m-instruct", path=Path("run/round-1/policy"), kind="lora", hash="9a1b…")``"""

    base: str  # model name as in the config
    path: Path | None  # folder with this policy's weights; None = the base itself
    kind: Literal["base", "full", "lora"]
    hash: str  # 16 hex digits
    trust_remote_code: bool = False

    @classmethod
    def of_base(cls, model: str, *, trust_remote_code: bool = False) -> Policy:
        """The base model. A hub model's hash is that of its name and of the commit that its config comes from.

        Raises:
            ModelError: it cannot be resolved; of a hub model, its config cannot be had.
        """
        where = resolve_model(model)
        if isinstance(where, Path):
            files = sorted(p for p in where.iterdir() if p.suffix in READ_OF_A_MODEL)
            digest = content_hash([[p.name, file_hash(p)] for p in files])
        else:
            digest = content_hash(where, hub_commit(where))
        return cls(base=model, path=None, kind="base", hash=digest, trust_remote_code=trust_remote_code)

    @classmethod
    def of_folder(cls, base: Policy, path: Path) -> Policy:
        """Weights that a training stage wrote."""
        adapter = path / "adapter_model.safetensors"
        weights = [adapter] if adapter.exists() else sorted(path.glob("*.safetensors"))
        digest = content_hash(base.base, [file_hash(w) for w in weights])
        kind: Literal["full", "lora"] = "lora" if adapter.exists() else "full"
        return cls(base=base.base, path=path, kind=kind, hash=digest, trust_remote_code=base.trust_remote_code)


@dataclass(slots=True)
class LoadedPolicy:
    """A model with its tokenizer, ready to sample or train."""

    policy: Policy
    model: Any  # PreTrainedModel or PeftModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @contextmanager
    def reference(self) -> Iterator[Any]:
        """The base model as reference policy: for LoRA the same weights with the adapter off."""
        if isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                yield self.model
        else:
            yield self.model

    def save(self, path: Path) -> None:
        """Write safetensors (full model or adapter) and the tokenizer."""
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free_memory() -> None:
    """Give a GPU's memory back that nothing holds any more. Patched modules hold themselves, so garbage goes first."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def native_bf16(device: torch.device) -> bool:
    """True if bf16 matrix products are faster than fp32 here: GPUs, and CPUs with AMX, or AMD's with AVX512-BF16.

    Intel's with AVX512-BF16 alone have it in name: half the speed of fp32 (dev/LOG.md). A rule and no measurement, so
    that a run that is started again takes the same precision.

    The environment's OPENTAO_BF16=0 says no, for results that are to be compared with those of other hardware.
    """
    if os.environ.get("OPENTAO_BF16") == "0":
        return False
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or (capabilities.get("avx512_bf16") and not intel()))


@cache
def intel(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Is this one of Intel's processors?"""
    try:
        return "GenuineIntel" in cpuinfo.read_text()
    except OSError:
        return "Intel" in platform.processor()


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 for sampling where the hardware has it; the learner's weights are always fp32."""
    return torch.bfloat16 if native_bf16(device) else torch.float32


def load_policy(policy: Policy, *, merge: bool = True, dtype: torch.dtype | None = None) -> LoadedPolicy:
    """Load weights and tokenizer. `merge` folds a LoRA adapter into the base for sampling."""
    device = default_device()
    where = str(policy.path) if policy.kind == "full" else policy.base
    dtype = dtype or default_dtype(device)
    merges = merge and policy.kind == "lora"  # in fp32: an update of less than half a bf16 step would be lost
    kind = torch.float32 if merges else dtype
    model: Any = load_causal_lm(where, dtype=kind, trust_remote_code=policy.trust_remote_code).to(device)
    liger.patch(model)
    if policy.kind == "lora":
        model = PeftModel.from_pretrained(model, str(policy.path), is_trainable=not merge)
        model = model.merge_and_unload() if merges else model
    if merges:
        for parameter in model.parameters():  # not buffers: rotary frequencies stay fp32, as they are when loaded
            parameter.data = parameter.data.to(dtype)
    tokenizer = load_tokenizer(where, trust_remote_code=policy.trust_remote_code)
    return LoadedPolicy(policy, model.eval(), tokenizer)


def load_for_training(policy: Policy, config: TrainConfig, seed: int) -> LoadedPolicy:
    """Load weights to train: all of them in fp32, or a LoRA adapter (a fresh one on the base) on all linear layers."""
    loaded = load_policy(policy, merge=config.method == "full", dtype=torch.float32)
    if config.method == "lora" and not isinstance(loaded.model, PeftModel):
        if policy.kind == "full":
            raise ModelError("a LoRA round cannot continue a fully tuned policy: the adapter's base would be lost")
        torch.manual_seed(seed)
        lora = PeftConfig(r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules="all-linear")
        loaded.model = get_peft_model(loaded.model, lora)
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_(config.method == "full" or "lora_" in name)
    if config.gradient_checkpointing:
        recompute_activations(loaded.model)
    if not config.train_embeddings:
        loaded.model.get_input_embeddings().requires_grad_(False)
    if config.method == "lora" and packs(loaded.model) and not native_bf16(loaded.device):
        replace_linear(loaded.model, FrozenLinear, lambda linear: not linear.weight.requires_grad)
    return loaded


@contextmanager
def attention_of(model: Any, name: str) -> Iterator[None]:
    """The model with another attention, its own one afterwards."""
    own = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def recompute_activations(model: Any) -> None:
    """Keep only the inputs of each layer for the backward pass.

    transformers does so in training mode only, in which dropout would make the policy differ from its reference;
    so just the layers are told that they train.

    Raises:
        ModelError: the model has dropout.
    """
    config = model.config.get_text_config().to_dict()
    dropout = [key for key, value in config.items() if key.endswith(("dropout", "pdrop")) and value]
    if dropout:
        raise ModelError(f"train.gradient_checkpointing: {model.config.model_type} has dropout ({dropout[0]})")
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(f"train.gradient_checkpointing: {model.config.model_type} has no layers made for it")

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), attention_of(model, model.config._attn_implementation)  # as it was in the forward pass

    for layer in layers:
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, context_fn=contexts)
        layer.gradient_checkpointing = layer.training = True


INSIDE_A_TEMPLATE = (TypeError, ValueError, KeyError, AttributeError)  # what its filters raise


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()
) -> list[int]:
    """Token ids of the chat template up to where the answer starts.

    Raises:
        TemplateError: the template does not take these messages.
    """
    given = [with_arguments(m) for m in messages]
    try:
        ids = tokenizer.apply_chat_template(
            given, tools=list(tools) or None, add_generation_prompt=True, return_dict=False
        )
    except INSIDE_A_TEMPLATE as error:
        raise TemplateError(f"{type(error).__name__}: {error}") from error
    return list(ids)


def with_arguments(message: Message) -> Message:
    """The turn with the arguments of tool calls as objects: logs hold JSON texts, and templates go through them."""
    if not isinstance(calls := message.get("tool_calls"), list):
        return message
    return message | {"tool_calls": [_called(call) for call in calls]}


def _called(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not (isinstance(function, dict) and isinstance(function.get("arguments"), str)):
        return call
    with suppress(ValueError):
        if isinstance(arguments := json.loads(function["arguments"]), dict):
            return call | {"function": function | {"arguments": arguments}}
    return call


def stop_tokens(loaded: LoadedPolicy) -> frozenset[int]:
    """Ids that end an answer: the tokenizer's and the generation config's end tokens."""
    stops = {loaded.tokenizer.eos_token_id}
    configured = loaded.model.generation_config.eos_token_id
    stops |= set(configured) if isinstance(configured, list) else {configured}
    return frozenset(s for s in stops if s is not None)


def context_length(model: PreTrainedModel) -> int:
    """Most tokens a sequence may have."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 2**31))
