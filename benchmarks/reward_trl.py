"""TRL's RewardTrainer on a preference file, in its own environment. Prints {"seconds": …}."""

from __future__ import annotations

import json
import sys
import time

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

given = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(given["model"])
model = AutoModelForSequenceClassification.from_pretrained(given["model"], dtype=torch.float32)
rows: dict[str, list[list[int]]] = {"chosen_ids": [], "rejected_ids": []}
with open(given["pairs"], encoding="utf-8") as file:
    for line in file:
        row = json.loads(line)
        best = row["ranks"].index(min(row["ranks"]))
        for name, text in (("chosen_ids", row["responses"][best]), ("rejected_ids", row["responses"][1 - best])):
            turns = [*row["messages"], {"role": "assistant", "content": text}]
            whole = tokenizer.apply_chat_template(turns, tokenize=False)
            rows[name].append(tokenizer(whole, add_special_tokens=False).input_ids)
config = RewardConfig(
    given["out"],
    per_device_train_batch_size=given["micro_batch"],
    gradient_accumulation_steps=given["accumulate"],
    num_train_epochs=1,
    learning_rate=given["lr"],
    lr_scheduler_type="linear",
    warmup_steps=0.1,
    max_length=None,
    max_grad_norm=1.0,
    use_cpu=not torch.cuda.is_available(),
    bf16=given["bf16"],
    report_to=[],
    save_strategy="no",
    gradient_checkpointing=False,
)
adapter = LoraConfig(
    r=given["rank"],
    lora_alpha=2 * given["rank"],
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    modules_to_save=["score"],
    task_type="SEQ_CLS",
)
trainer = RewardTrainer(
    model, config, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer, peft_config=adapter
)
start = time.perf_counter()
trainer.train()
seconds = time.perf_counter() - start
trainer.model.merge_and_unload().save_pretrained(given["out"])
tokenizer.save_pretrained(given["out"])
print(json.dumps({"seconds": seconds}))
