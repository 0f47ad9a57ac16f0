"""TRL's GRPOTrainer on a run's prompts and reward, in TRL's own environment: python trl_grpo.py CASE.json

Policies are saved after so many seconds of training as the case says, with the seconds that had really passed; saving
does not count. Rewards come from the run's own scorers, through `scorer_service.py` in OpenTAO's environment.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

case: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
service = subprocess.Popen(
    case["service"], cwd=case["folder"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
)


def reward(completions: list[Any], index: list[int], **_: Any) -> list[float | None]:
    """Group by group; the trainer leaves answers of one prompt beside each other."""
    assert service.stdin is not None and service.stdout is not None
    found: list[float | None] = []
    size = case["group_size"]
    for start in range(0, len(completions), size):
        texts = [until_stop(c[0]["content"]) for c in completions[start : start + size]]
        print(json.dumps({"index": index[start], "texts": texts}), file=service.stdin, flush=True)
        found += json.loads(service.stdout.readline())
    return found


def until_stop(text: str) -> str:
    """What stands before the first of the run's stop strings, which is where OpenTAO's answers end."""
    return text[: min((at for stop in case["stop"] if (at := text.find(stop)) >= 0), default=len(text))]


def ends(model: Any) -> list[int]:
    """The model's end tokens, and every token with a stop string in it: sampling ends there, and the loss."""
    own = model.generation_config.eos_token_id
    stops = [i for i in range(len(tokenizer)) if any(stop in tokenizer.decode([i]) for stop in case["stop"])]
    return [*(own if isinstance(own, list) else [own]), *stops]


class Saves(transformers.TrainerCallback):
    """Writes a policy whenever the next of the wanted times has passed; ends at the last."""

    def __init__(self) -> None:
        self.wanted = list(case["save_at"])
        self.saving = 0.0
        self.start = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, _: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        passed = now - self.start - self.saving
        if passed >= self.wanted[0]:
            while self.wanted and passed >= self.wanted[0]:
                self.wanted.pop(0)
            out = Path(case["out"]) / f"step-{state.global_step}"
            model = kwargs["model"]
            merged = copy.deepcopy(model).merge_and_unload() if case["lora"] else model
            merged.save_pretrained(out)
            tokenizer.save_pretrained(out)
            with (Path(case["out"]) / "policies.jsonl").open("a") as file:
                print(json.dumps({"path": str(out), "step": state.global_step, "seconds": passed}), file=file)
            self.saving += time.perf_counter() - now
            control.should_training_stop = not self.wanted


torch.set_num_threads(case["threads"])
Path(case["out"]).mkdir(parents=True, exist_ok=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(case["model"], padding_side="left")
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
config = GRPOConfig(
    case["out"],
    per_device_train_batch_size=case["micro_batch"],
    gradient_accumulation_steps=case["prompts_per_step"] * case["group_size"] // case["micro_batch"],
    num_generations=case["group_size"],
    max_completion_length=case["new_tokens"],
    temperature=case["temperature"],
    learning_rate=case["learning_rate"],
    lr_scheduler_type="constant",
    beta=0.0,
    use_cpu=not torch.cuda.is_available(),
    bf16=case["bf16"],
    seed=case["seed"],
    max_steps=100_000,
    report_to=[],
    save_strategy="no",
    logging_steps=5,
    gradient_checkpointing=False,
)
policy = transformers.AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32)
policy.generation_config.eos_token_id = ends(policy)
rows = [{"prompt": p["messages"], "index": p["index"]} for p in case["prompts"]]
trainer = GRPOTrainer(
    policy,
    reward_funcs=reward,
    args=config,
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if case["lora"] else None,
    callbacks=[Saves()],
)
trainer.train()
