"""transformers as a peer: `generate` for sampling, the padded batch forward of a sequence classifier for scoring.

The warm-up tries the configurations that a user has (cache, how many rows at once) and keeps the fastest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from common import Answers, guarded, read_case, serve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

log = logging.getLogger(__name__)


def main(answers: Answers) -> None:
    case = read_case()
    torch.set_num_threads(case["threads"])
    transformers.logging.set_verbosity_error()
    work, config = {"generate": generate, "score": score}[case["kind"]](case)
    serve(answers, work, name="transformers", version=transformers.__version__, config=config)


def fastest(choices: dict[str, Callable[[], int]]) -> str:
    """The choice that takes least time a token of those that it returns; one that fails (memory) is no choice."""
    times = {}
    for name, attempt in choices.items():
        try:
            attempt()
            synchronise()
            start = time.perf_counter()
            tokens = attempt()
            synchronise()
            times[name] = (time.perf_counter() - start) / tokens
        except (RuntimeError, ValueError, NotImplementedError, MemoryError, AttributeError, ImportError) as error:
            log.warning(f"{name}: {error}")
            continue
    return min(times, key=lambda name: times[name])


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def generate(case: dict[str, Any]) -> tuple[Callable[[], int], str]:
    model = transformers.AutoModelForCausalLM.from_pretrained(case["model"], dtype=DTYPES[case["dtype"]])
    model.to(device()).eval()
    prompts = torch.tensor(case["prompt_ids"], device=device())  # all of one length: nothing is padded
    sequences = len(prompts) * case["group_size"]

    @torch.inference_mode()
    def run(at_once: int, cache: str | None, tokens: int, limit: int | None = None) -> int:
        made = 0
        step = max(1, at_once // case["group_size"])
        for ids in prompts[:limit].split(step):
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=case["temperature"],
                top_k=0,
                top_p=1.0,
                num_return_sequences=case["group_size"],
                min_new_tokens=tokens,  # as long as all others': the end token is not drawn
                max_new_tokens=tokens,
                cache_implementation=cache,
                pad_token_id=0,
            )
            made += out[:, ids.shape[1] :].numel()
        return made

    if torch.cuda.is_available():
        return on_gpu(model, case, run)
    choices = [(n, cache) for n in sorted({sequences, max(case["group_size"], sequences // 4)}) for cache in CACHES]
    names = {f"{n} sequences at once, {cache or 'dynamic'} cache": (n, cache) for n, cache in choices}
    # One batch and a quarter of the tokens tell which takes least time a token.
    tokens = max(4, case["new_tokens"] // 4)
    best = fastest({name: lambda c=c: run(*c, tokens, max(1, c[0] // case["group_size"])) for name, c in names.items()})
    at_once, cache = names[best]
    return lambda: run(at_once, cache, case["new_tokens"]), f"{case['dtype']}, {best}"


CACHES = (None, "static")


def on_gpu(model: Any, case: dict[str, Any], run: Callable[..., int]) -> tuple[Callable[[], int], str]:
    """All at once, as the GPU wants it: `generate`, or transformers' continuous batching with paged attention."""
    new, group_size = case["new_tokens"], case["group_size"]

    def plain(cache: str | None) -> int:
        return run(len(case["prompt_ids"]) * group_size, cache, new)

    def continuous() -> int:
        config = transformers.GenerationConfig(
            do_sample=True,
            temperature=case["temperature"],
            top_k=0,
            top_p=1.0,
            max_new_tokens=new,
            eos_token_id=-1,  # none: as long as all others'
            pad_token_id=0,
        )
        # A prompt again for every answer: of several answers to one request only the first is returned.
        prompts = [prompt for prompt in case["prompt_ids"] for _ in range(group_size)]
        half = transformers.ContinuousBatchingConfig(max_memory_percent=0.5)  # others wait on the same device
        out = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=half, persistent_manager=True
        )
        made = sum(len(answer.generated_tokens) for answer in out.values())
        if made != len(case["prompt_ids"]) * group_size * new:
            raise ValueError(f"continuous batching made {made} tokens")
        return made

    works: dict[str, Callable[[], int]] = {f"{cache or 'dynamic'} cache": partial(plain, cache) for cache in CACHES}
    works["continuous batching"] = continuous
    best = fastest(works)
    if best != "continuous batching" and hasattr(model, "destroy_cached_continuous_batching_manager"):
        model.destroy_cached_continuous_batching_manager()  # which holds its share of the memory
        torch.cuda.empty_cache()
    return works[best], f"{case['dtype']}, all at once, {best}"


def score(case: dict[str, Any]) -> tuple[Callable[[], int], str]:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        case["options"]["classifier"], dtype=DTYPES[case["dtype"]]
    )
    model.to(device()).eval()
    rows = [
        [*prompt, *response]
        for prompt, responses in zip(case["prompt_ids"], case["responses"], strict=True)
        for response in responses
    ]
    ids = torch.tensor(rows, device=device())

    @torch.inference_mode()
    def run(batch: int, limit: int) -> int:
        for part in ids[:limit].split(batch):
            model(input_ids=part, attention_mask=torch.ones_like(part), use_cache=False)
        return limit * case["new_tokens"]

    sizes = {1, 4, case["group_size"]} if device() == "cpu" else {case["group_size"], 32, len(rows)}
    some = min(len(rows), max(sizes))
    best = fastest({str(n): lambda n=n: run(n, some) for n in sorted(sizes)})
    return lambda: run(int(best), len(rows)), f"{case['dtype']}, batches of {best}"


if __name__ == "__main__":
    guarded(main)
