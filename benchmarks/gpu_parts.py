"""What each part of the GPU path gains, on the machine's GPU: python benchmarks/gpu_parts.py [decode|attention|head …]

Seconds are medians of at least three. The model is SmolLM2-135M's shape with random weights, bf16 products. Prints one
line a variant; figures that led to a choice are in dev/LOG.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src"), str(HERE.parent / "tests")]

import torch  # noqa: E402
from gpu import random_smollm  # noqa: E402

from opentao import pack  # noqa: E402
from opentao.bench.case import make_prompts  # noqa: E402
from opentao.bench.worker import AsGiven  # noqa: E402
from opentao.config import LoraConfig, TrainConfig  # noqa: E402
from opentao.engines.group import GroupEngine  # noqa: E402
from opentao.liger import uses_liger  # noqa: E402
from opentao.optimise import autocast  # noqa: E402
from opentao.packed_attention import FLEX_ATTENTION, PACKED_ATTENTION  # noqa: E402
from opentao.policy import Policy, load_for_training, load_policy  # noqa: E402
from opentao.rows import Sequences, plan_rows  # noqa: E402
from opentao.types import Prompt, SamplingPlan  # noqa: E402


def timed(name: str, work: Callable[[], Any], repeats: int = 4) -> None:
    """One line: first time, median and range of the others, peak memory."""
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        try:
            work()
        except Exception as error:  # of one variant; the others go on
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            return
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    first, *others = seconds
    print(
        f"{name}: {1000 * statistics.median(others):.2f} ms ({1000 * min(others):.2f} to {1000 * max(others):.2f}),"
        f" first {first:.1f} s, peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB",
        flush=True,
    )


@contextmanager
def liger(on: bool) -> Iterator[str]:
    os.environ["OPENTAO_LIGER"] = "1" if on else "0"
    there = uses_liger(torch.device("cuda"))
    yield "Liger" if there else f"transformers' layers{' (Liger is not there)' if on else ''}"


def sequences(groups: int, prompt: int, responses: int = 8, length: int = 64) -> list[Sequences]:
    g = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 400, (count,), generator=g).tolist())

    return [
        Sequences(prompt_P=tokens(prompt), responses_NR=tuple(tokens(length) for _ in range(responses)))
        for _ in range(groups)
    ]


def decode(model: str) -> None:
    """512 responses of 64 tokens from 64 prompts."""
    for on in (False, True):
        with liger(on) as layers:
            for prompt in (62, 842):
                for name, paged, capture in (
                    ("shared, one kernel at a time", False, False),
                    ("paged, one kernel at a time", True, False),
                    ("paged, captured", True, True),
                ):
                    if on and not capture:
                        continue
                    engine = GroupEngine(ignore_end=True, paged=paged)
                    engine.load(Policy.of_base(model))
                    assert engine.loaded is not None
                    given = AsGiven(engine.loaded.tokenizer, make_prompts(engine.loaded.tokenizer, 64, prompt))
                    engine.loaded.tokenizer = given  # type: ignore[assignment]
                    prompts = [Prompt.from_text(str(i)) for i in range(64)]
                    plan = SamplingPlan(group_size=8, max_new_tokens=64)

                    def work(engine: Any = engine, prompts: Any = prompts, plan: Any = plan, c: bool = capture) -> None:
                        if engine.captured is not None and not c:
                            engine.captured.capture = False
                            engine.captured.graphs.clear()
                        list(engine.sample(prompts, plan))

                    timed(f"decode, {prompt} tokens, {name}, {layers}", work, 3 if capture else 2)
                    if capture and not (engine.captured and engine.captured.graphs):
                        print("    nothing was captured: the line above is of single kernels", flush=True)


def attention(model: str) -> None:
    """Forward and backward pass of a row, by attention."""
    for on in (False, True):
        with liger(on) as layers:
            config = TrainConfig(method="lora", lora=LoraConfig(rank=16))
            loaded = load_for_training(Policy.of_base(model), config, seed=0)
            for groups, prompt in ((4, 842), (14, 62)):
                [row] = plan_rows(sequences(groups, prompt), 20_000)
                for name in (PACKED_ATTENTION, FLEX_ATTENTION):

                    def work(row: Any = row, name: str = name, model: Any = loaded.model) -> None:
                        with autocast(model):
                            hidden = pack.hidden_states(model, row, name)
                        hidden.sum().backward()

                    timed(f"attention, {groups} groups of {prompt} tokens, {name}, {layers}", work)


def head(model: str) -> None:
    """Log-probs of 8,192 tokens and their gradient, head not trained and trained."""
    for on in (False, True):
        with liger(on) as layers:
            loaded = load_policy(Policy.of_base(model), dtype=torch.float32)
            hidden = torch.randn(8192, loaded.model.config.hidden_size, device="cuda", requires_grad=True)
            targets = torch.randint(0, 400, (8192,), device="cuda")
            for trained in (False, True):
                loaded.model.get_output_embeddings().requires_grad_(trained)
                for chunk in (512, 2048, 8192):

                    def work(h: Any = hidden, t: Any = targets, c: int = chunk, m: Any = loaded.model) -> None:
                        with autocast(m):
                            found = torch.cat(pack.chunked_logprobs(m, h, t, 1.0, c))
                        found.sum().backward()

                    timed(f"head {'trained' if trained else 'frozen'}, chunks of {chunk}, {layers}", work)


PARTS = {"decode": decode, "attention": attention, "head": head}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", choices=[[], *PARTS], help="default: all")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model = str(random_smollm(Path(folder) / "model"))
        for part in given.part or PARTS:
            PARTS[part](model)


if __name__ == "__main__":
    main()
