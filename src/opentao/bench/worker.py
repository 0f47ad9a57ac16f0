"""OpenTAO's side of a benchmark, and the matrix-product limit: ``python -m opentao.bench.worker CASE.json``."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opentao import __version__
from opentao.allocator import use_large_pages
from opentao.bench.peers.common import Answers, guarded, read_case, serve

LIMIT_ROWS = (32, 128, 256)
GPU_LIMIT_ROWS = (*LIMIT_ROWS, 512, 1024)


def main(answers: Answers) -> None:
    use_large_pages()
    case = read_case()
    torch.set_num_threads(case["threads"])
    if case["dtype"] == "float32":
        os.environ["OPENTAO_BF16"] = "0"  # the same precision as the peers'
    works: dict[str, Callable[[dict[str, Any]], Callable[[], int]]] = {
        "generate": generate,
        "train": train,
        "score": score,
        "reward-train": reward_train,
        "round": round_,
    }
    if case["options"].get("limit"):
        answers.say(ready=True, name="limit", config="", limit=matrix_limit(case))
        return
    work = works[case["kind"]](case)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = f"{case['dtype']}, {device}"
    serve(answers, work, name="opentao", version=__version__, config=config)


def matrix_limit(case: dict[str, Any]) -> dict[str, float]:
    """Tokens per second if there were nothing but the linear layers and the head, by rows at once.

    In fp32 on a CPU the faster of ordinary and packed weights.
    """
    from opentao.engines.precision import Int8Linear
    from opentao.models import load_causal_lm
    from opentao.packed_linear import PackedLinear, packs
    from opentao.policy import default_device

    dtype = {"bfloat16": torch.bfloat16}.get(case["dtype"], torch.float32)
    model = load_causal_lm(case["model"], dtype=dtype, trust_remote_code=False).to(default_device())
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    if case["dtype"] == "int8":
        variants: list[list[Any]] = [[Int8Linear(m) for m in linear]]
    else:
        variants = [linear, *([[PackedLinear(m) for m in linear]] if packs(model) else [])]
    widths = [m.in_features for m in linear]
    found = {}
    for rows in GPU_LIMIT_ROWS if torch.cuda.is_available() else LIMIT_ROWS:
        inputs = {w: torch.randn(rows, w, dtype=dtype, device=linear[0].weight.device) for w in widths}
        times = [sorted(_products(layers, widths, inputs) for _ in range(4))[1] for layers in variants]
        found[str(rows)] = rows / min(times)
    return found


@torch.inference_mode()
def _products(layers: list[Any], widths: list[int], inputs: dict[int, Tensor]) -> float:
    """Seconds of all of them; on a GPU as one graph, else launching them would be what is measured."""

    def run() -> None:
        for layer, width in zip(layers, widths, strict=True):
            layer(inputs[width])

    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class AsGiven:
    """A tokenizer for prompts that are token ids already."""

    def __init__(self, tokenizer: Any, prompt_ids: list[list[int]]) -> None:
        self._tokenizer, self._prompt_ids = tokenizer, prompt_ids

    def apply_chat_template(self, messages: Any, **_: Any) -> list[int]:
        return self._prompt_ids[int(messages[-1]["content"])]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def generate(case: dict[str, Any]) -> Callable[[], int]:
    from opentao.engines.group import GroupEngine
    from opentao.policy import Policy
    from opentao.types import Prompt, SamplingPlan

    engine = GroupEngine(ignore_end=True)
    engine.load(Policy.of_base(case["model"]))
    plan = SamplingPlan(
        group_size=case["group_size"],
        max_new_tokens=case["new_tokens"],
        temperature=case["temperature"],
        dtype=case["dtype"],
    )
    prompts = [Prompt.from_text(str(i)) for i in range(len(case["prompt_ids"]))]
    list(engine.sample(prompts[:1], SamplingPlan(group_size=1, max_new_tokens=1, dtype=case["dtype"])))
    assert engine.loaded is not None
    engine.loaded.tokenizer = AsGiven(engine.loaded.tokenizer, case["prompt_ids"])  # type: ignore[assignment]

    def work() -> int:
        groups = list(engine.sample(prompts, plan))
        case["sampled"] = groups
        return sum(len(r.tokens_R) for g in groups for r in g.responses)

    list(engine.sample(prompts[:2], plan))  # the first time is slower
    return work


def train(case: dict[str, Any]) -> Callable[[], int]:
    """One optimiser step of `online` over all groups, as GRPO does it: no reference, one inner step."""
    from opentao.config import LoraConfig, TrainConfig
    from opentao.objectives import OBJECTIVES
    from opentao.policy import Policy, load_for_training
    from opentao.train import accumulate

    config = TrainConfig(
        objective="online",
        method="lora" if case["lora"] else "full",
        lora=LoraConfig(rank=16),
        prompts_per_step=len(case["prompt_ids"]),
    )
    loaded = load_for_training(Policy.of_base(case["model"]), config, seed=0)
    weights = [p for p in loaded.model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=1e-6, fused=True)

    def step(rows: slice = slice(None)) -> int:
        examples = _examples(case, rows)
        optimiser.zero_grad()
        accumulate(loaded.model, examples, OBJECTIVES["online"], config, 1.0)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        return sum(e.num_tokens for e in examples)

    step(slice(0, 1))
    return step


def _examples(case: dict[str, Any], rows: slice) -> list[Any]:
    import numpy as np

    from opentao.rows import Sequences
    from opentao.train import Example

    examples = []
    for prompt, responses, rewards in list(zip(case["prompt_ids"], case["responses"], case["rewards"], strict=True))[
        rows
    ]:
        examples.append(
            Example(
                rewards_N=np.array(rewards),
                chosen=list(range(len(responses))),
                sequences=Sequences(prompt_P=tuple(prompt), responses_NR=tuple(tuple(r) for r in responses)),
                sampler_logprobs=[torch.full((len(r),), -8.0) for r in responses],
                ref_logprobs=[],
            )
        )
    return examples


def _sequences(case: dict[str, Any]) -> list[Any]:
    from opentao.rows import Sequences

    pairs = zip(case["prompt_ids"], case["responses"], strict=True)
    return [Sequences(prompt_P=tuple(p), responses_NR=tuple(tuple(r) for r in rs)) for p, rs in pairs]


def score(case: dict[str, Any]) -> Callable[[], int]:
    """Scores of N responses a prompt by a sequence classifier."""
    from opentao.reward_model import RewardModel

    reward_model = RewardModel.load(case["options"]["classifier"]).for_scoring()
    groups = _sequences(case)

    def work() -> int:
        return sum(len(r) for i, _ in reward_model.score(groups) for r in groups[i].responses_NR)

    list(reward_model.score(groups[:1]))
    return work


def reward_train(case: dict[str, Any]) -> Callable[[], int]:
    """One Bradley-Terry step on the best and the worst response of each group."""
    from opentao.optimise import autocast
    from opentao.reward_loss import bradley_terry
    from opentao.reward_model import RewardModel
    from opentao.rows import Sequences

    reward_model = RewardModel.load(case["options"]["classifier"])
    model = reward_model.model
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    pairs = []
    for prompt, responses, rewards in zip(case["prompt_ids"], case["responses"], case["rewards"], strict=True):
        best, worst = (rewards.index(f(rewards)) for f in (max, min))
        chosen = tuple(tuple(responses[i]) for i in (best, worst))
        pairs.append(Sequences(prompt_P=tuple(prompt), responses_NR=chosen))

    def step(number: int = len(pairs)) -> int:
        optimiser.zero_grad()
        for row in reward_model.rows(pairs[:number], None):
            if len(row.owners) % 2:
                raise ValueError(f"a pair takes more than a row: {pairs[0].num_tokens} tokens")
            with autocast(model):
                scores = reward_model.row_scores(row)
            losses = [bradley_terry(scores[i : i + 2], [(0, 1)]) for i in range(0, len(scores), 2)]
            (torch.cat(losses).sum() / number).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        return sum(len(r) for p in pairs[:number] for r in p.responses_NR)

    step(1)
    return step


def round_(case: dict[str, Any]) -> Callable[[], int]:
    """Generate, score by a verifier (every third of a response's characters counts), one training step."""
    sample, learn = generate(case), train(case)

    def work() -> int:
        tokens = sample()
        groups = case["sampled"]
        case["responses"] = [[list(r.tokens_R) for r in g.responses] for g in groups]
        case["rewards"] = [[float(len(r.text) % 7) for r in g.responses] for g in groups]
        learn()
        return tokens

    return work


if __name__ == "__main__":
    guarded(main)
