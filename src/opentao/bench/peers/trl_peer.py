"""TRL as a peer: the learner step of GRPOTrainer on given responses, or its whole step (generation included).

Left out: RewardTrainer (its collator wants text, and what it makes of given token ids differs by version).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
import trl
from common import Answers, guarded, read_case, serve
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer


def main(answers: Answers) -> None:
    case = read_case()
    torch.set_num_threads(case["threads"])
    transformers.logging.set_verbosity_error()
    work, config = choose(case)
    serve(answers, work, name="trl", version=trl.__version__, config=config)


def choose(case: dict[str, Any]) -> tuple[Callable[[], int], str]:
    """The micro-batch size that is fastest on one step; a size that the options name is taken as it is."""
    sizes = (
        [case["options"]["micro_batch"]]
        if "micro_batch" in case["options"]
        else [case["group_size"] // 2, case["group_size"]]
    )
    works = {size: step_of(case, size) for size in sizes}
    times = {}
    for size, work in works.items():
        work()
        start = time.perf_counter()
        work()
        times[size] = time.perf_counter() - start
    best = min(times, key=lambda size: times[size])
    kind = "LoRA" if case["lora"] else "full"
    return works[best], f"{case['dtype']}, {kind}, micro-batches of {best}"


def step_of(case: dict[str, Any], micro_batch: int) -> Callable[[], int]:
    """One optimiser step over all groups, by the trainer's own code."""
    groups, size = len(case["prompt_ids"]), case["group_size"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(case["model"], padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32)
    cpu = not torch.cuda.is_available()
    config = GRPOConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=groups * size // micro_batch,
        num_generations=size,
        max_completion_length=case["new_tokens"],
        generation_kwargs={"min_new_tokens": case["new_tokens"]},
        use_cpu=cpu,
        bf16=case["dtype"] == "bfloat16",
        beta=0.0,
        learning_rate=1e-6,
        report_to=[],
        save_strategy="no",
        gradient_checkpointing=False,
        shuffle_dataset=False,
        max_steps=10_000,
    )
    texts = [tokenizer.decode(ids) for ids in case["prompt_ids"]]
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(c) % 7) for c in completions],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if case["lora"] else None,
    )
    if case["kind"] == "train":
        given = given_batch(case, trainer.accelerator.device)
        trainer._generate_and_score_completions = lambda inputs: dict(given)
    trainer.create_optimizer()
    model = trainer.accelerator.prepare(trainer.model)
    trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
    trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps
    inputs = [{"prompt": text} for text in texts for _ in range(size)]

    def work() -> int:
        trainer._step = 0  # a generation batch of its own
        trainer._buffered_inputs = None
        model.train()
        for _ in range(config.gradient_accumulation_steps):
            trainer.training_step(model, inputs, groups * size)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return groups * size * case["new_tokens"]

    return work


def given_batch(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What the trainer's own generation would hand over, with the case's tokens and group-relative advantages."""
    size = case["group_size"]
    prompts = torch.tensor([p for p in case["prompt_ids"] for _ in range(size)], device=device)
    completions = torch.tensor([r for group in case["responses"] for r in group], device=device)
    rewards = torch.tensor(case["rewards"], device=device)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "advantages": advantages.flatten(),
        "num_items_in_batch": torch.tensor(completions.numel(), device=device),
    }


if __name__ == "__main__":
    guarded(main)
