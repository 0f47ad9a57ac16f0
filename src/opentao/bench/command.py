"""`tao bench`: builds the case from options and prints the result."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opentao.bench.case import Case, Kind, make_prompts, make_responses
from opentao.bench.run import BenchError, bench
from opentao.builtin import BUILT_IN, extract_gguf
from opentao.models import load_tokenizer, resolve_model
from opentao.policy import default_device, native_bf16

CLASSIFIED = ("score", "reward-train")


def run_bench(
    kind: Kind,
    sizes: dict[str, int],
    model: str,
    peers: Sequence[str],
    peer_env: Sequence[str],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Run one comparison. `sizes`: prompts, prompt_tokens, group_size, new_tokens.

    `settings`: of the case, repeats, gguf.

    Raises:
        BenchError: a prompt cannot be made that short, a peer is missing or fails, bf16 where ours takes fp32.
    """
    repeats, gguf = settings.pop("repeats"), settings.pop("gguf", None)
    if kind != "generate" and settings["dtype"] == "bfloat16" and not native_bf16(default_device()):
        raise BenchError(
            f"--dtype bfloat16: OpenTAO's `{kind}` multiplies in fp32 here, where bf16 is slower; use float32"
        )
    tokenizer = load_tokenizer(str(resolve_model(model)))
    try:
        prompts = make_prompts(tokenizer, sizes["prompts"], sizes["prompt_tokens"])
    except ValueError as error:
        raise BenchError(f"--prompt-tokens: {error}") from error
    case = Case(
        kind=kind,
        model=str(resolve_model(model)),
        prompt_ids=prompts,
        group_size=sizes["group_size"],
        new_tokens=sizes["new_tokens"],
        threads=os.cpu_count() or 1,
        **settings,
    )
    if kind != "generate":  # `round` warms its training up on them
        make_responses(case, len(tokenizer))
    with tempfile.TemporaryDirectory() as directory:
        if kind in CLASSIFIED:
            case.options["classifier"] = make_classifier(case.model, Path(directory) / "classifier")
        if "llama.cpp" in peers:
            case.options["gguf"] = str(gguf or make_gguf(model, Path(directory)))
        return bench(case, peers, environments(peer_env), repeats)


def make_gguf(model: str, folder: Path) -> Path:
    """The file that a built-in model was made from: the same weights.

    Raises:
        BenchError: another model; its file must be named.
    """
    if model not in BUILT_IN:
        raise BenchError(f"--vs llama.cpp: name the GGUF file of {model} with --gguf, its weights in full precision")
    return extract_gguf(model, folder)


def make_classifier(model: str, folder: Path) -> str:
    """A sequence classifier with one label on the model's weights, as a folder that every system reads."""
    import torch

    from opentao.reward_model import RewardModel

    tokenizer = load_tokenizer(model)
    reward_model = RewardModel.from_causal_lm(model)
    reward_model.model.to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def environments(options: Sequence[str]) -> dict[str, Path]:
    """``NAME=DIR`` options as a dictionary."""
    found = {}
    for option in options:
        name, equals, folder = option.partition("=")
        if not equals:
            raise BenchError(f"--peer-env {option}: expected NAME=DIR")
        found[name] = Path(folder)
    return found
