"""vLLM as a peer: N responses a prompt; prefix caching shares a prompt among them and is cold before every run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from common import Answers, guarded, read_case, serve


def main(answers: Answers) -> None:
    import vllm

    case = read_case()
    if case["kind"] != "generate":
        raise ValueError(f"vllm only generates, asked for {case['kind']}")
    eager = bool(case["options"].get("eager", False))
    llm = vllm.LLM(
        case["model"],
        dtype=case["dtype"],
        max_model_len=max(map(len, case["prompt_ids"])) + case["new_tokens"] + 16,
        enforce_eager=eager,
        max_num_seqs=min(1024, len(case["prompt_ids"]) * case["group_size"]),
        enable_prefix_caching=True,
        **of_device(),
    )
    config = f"{case['dtype']}, {'eager' if eager else 'compiled'}, prefix cache cold"
    serve(answers, work_of(vllm, llm, case), name="vllm", version=vllm.__version__, config=config)


def of_device() -> dict[str, Any]:
    """On a GPU nine tenths of what the other systems have left free."""
    import torch

    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory_utilization": 0.9 * free / total}


def work_of(vllm: Any, llm: Any, case: dict[str, Any]) -> Callable[[], int]:
    sampling = vllm.SamplingParams(
        n=case["group_size"],
        temperature=case["temperature"],
        max_tokens=case["new_tokens"],
        ignore_eos=True,
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": ids} for ids in case["prompt_ids"]]

    def work() -> int:
        llm.reset_prefix_cache()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return sum(len(c.token_ids) for o in outputs for c in o.outputs)

    llm.generate(prompts[:2], sampling, use_tqdm=False)  # the first time is slower
    return work


if __name__ == "__main__":
    guarded(main)
