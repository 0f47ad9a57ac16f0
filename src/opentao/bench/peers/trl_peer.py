"""TRL as a peer: a learner step of GRPOTrainer on given responses, its whole step, or a step of RewardTrainer."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import logging
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
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

log = logging.getLogger(__name__)


def main(answers: Answers) -> None:
    case = read_case()
    torch.set_num_threads(case["threads"])
    transformers.logging.set_verbosity_error()
    work, config = choose(case)
    serve(answers, work, name="trl", version=trl.__version__, config=config)


def choose(case: dict[str, Any]) -> tuple[Callable[[], int], str]:
    """The fastest on one step of: micro-batch sizes, and on a GPU Liger's kernels; a size in the options is taken."""
    make = reward_step_of if case["kind"] == "reward-train" else step_of
    times, works = {}, {}
    for liger, size in itertools.product(kernels(), sizes_of(case)):  # Liger last: it stays in the process
        try:
            works[size, liger] = work = make(case, size, liger)
            work()
            synchronise()
            start = time.perf_counter()
            work()
            synchronise()
            times[size, liger] = time.perf_counter() - start
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            if not torch.cuda.is_available():
                raise
            log.warning(f"micro-batches of {size}, Liger {liger}: {error}")  # memory, most likely
            works.pop((size, liger), None)
            torch.cuda.empty_cache()
    size, liger = min(times, key=lambda choice: times[choice])
    best = works[size, liger]
    works.clear()  # the others give their memory back
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    kind = "LoRA" if case["lora"] else "full"
    return best, f"{case['dtype']}, {kind}, micro-batches of {size}{', Liger' if liger else ''}"


def with_kernels(trainer: Any, liger: bool) -> None:
    """What the trainer does at the start of `train()`, which is not called here."""
    if liger:
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(trainer.model, {"fused_linear_cross_entropy": False})


def kernels() -> list[bool]:
    """With Liger's kernels too, where they can run."""
    able = torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None
    return [False, True] if able else [False]


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def sizes_of(case: dict[str, Any]) -> list[int]:
    if "micro_batch" in case["options"]:
        return [case["options"]["micro_batch"]]
    if case["kind"] == "reward-train":  # pairs: all at once, or half of them
        pairs = len(case["prompt_ids"])
        return sorted({n for n in (pairs, pairs // 2, 1) if n and pairs % n == 0 and n <= 8})
    if torch.cuda.is_available():  # room for more: up to all at once
        return sorted({case["group_size"], len(case["prompt_ids"]) * case["group_size"]})
    return [case["group_size"] // 2, case["group_size"]]


def step_of(case: dict[str, Any], micro_batch: int, liger: bool = False) -> Callable[[], int]:
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
        use_liger_kernel=liger,
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
    with_kernels(trainer, liger)
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


def reward_step_of(case: dict[str, Any], micro_batch: int, liger: bool = False) -> Callable[[], int]:
    """One Bradley-Terry step on the best and the worst response of each group."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        case["options"]["classifier"], dtype=torch.float32
    )
    pairs: dict[str, list[list[int]]] = {"chosen_ids": [], "rejected_ids": []}
    for prompt, responses, rewards in zip(case["prompt_ids"], case["responses"], case["rewards"], strict=True):
        for name, pick in (("chosen_ids", max), ("rejected_ids", min)):
            pairs[name].append([*prompt, *responses[rewards.index(pick(rewards))]])
    tokenizer = transformers.AutoTokenizer.from_pretrained(case["options"]["classifier"])
    count = len(case["prompt_ids"])
    config = RewardConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=count // micro_batch,
        max_length=None,
        use_cpu=not torch.cuda.is_available(),
        bf16=case["dtype"] == "bfloat16",
        use_liger_kernel=liger,
        learning_rate=1e-6,
        report_to=[],
        save_strategy="no",
        gradient_checkpointing=False,
        max_steps=10_000,
    )
    trainer = RewardTrainer(model, config, train_dataset=Dataset.from_dict(pairs), processing_class=tokenizer)
    with_kernels(trainer, liger)
    trainer.create_optimizer()
    model = trainer.accelerator.prepare(trainer.model)  # brings autocast
    trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
    trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps
    examples = [{name: ids[i] for name, ids in pairs.items()} for i in range(count)]

    def work() -> int:
        model.train()
        for start in range(0, count, micro_batch):
            trainer.training_step(model, trainer.data_collator(examples[start : start + micro_batch]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return 2 * count * case["new_tokens"]

    return work


if __name__ == "__main__":
    guarded(main)
