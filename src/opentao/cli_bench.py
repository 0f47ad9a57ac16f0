"""`tao bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from opentao.cli_common import AsJson, emit, guarded, prepare_process

BenchKind = Literal["generate", "train", "score", "reward-train", "round"]
BenchDtype = Literal["float32", "bfloat16", "int8"]


@guarded
def bench(
    kind: Annotated[BenchKind, typer.Argument(help="What is timed.")],
    vs: Annotated[str, typer.Option(help="Peers, by commas: transformers, vllm, llama.cpp, trl.")] = "",
    model: Annotated[str, typer.Option(help="Built-in name, folder or hub name.")] = "smollm2-135m-instruct",
    prompts: Annotated[int, typer.Option(min=1)] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt, chat template included.")] = 62,
    group_size: Annotated[int, typer.Option(min=2, help="Responses a prompt.")] = 8,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens a response.")] = 64,
    dtype: Annotated[BenchDtype, typer.Option(help="Of the weights, for all systems.")] = "float32",
    lora: Annotated[bool, typer.Option("--lora/--full", help="Which weights a training step changes.")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each system, in turn.")] = 3,
    peer_env: Annotated[list[str] | None, typer.Option(metavar="NAME=DIR", help="A peer's environment.")] = None,
    gguf: Annotated[Path | None, typer.Option(metavar="FILE", help="The model for llama.cpp, if not built in.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time OpenTAO side by side with what you would use instead: same model, prompts and sampling."""
    from opentao.bench.command import run_bench
    from opentao.bench.run import as_text

    sizes = {"prompts": prompts, "prompt_tokens": prompt_tokens, "group_size": group_size, "new_tokens": new_tokens}
    settings = {"dtype": dtype, "lora": lora, "repeats": repeats, "gguf": gguf}
    peers = [peer.strip() for peer in vs.split(",") if peer.strip()]
    prepare_process()
    result = run_bench(kind, sizes, model, peers, peer_env or (), settings)
    emit(result, as_json, as_text(result))
