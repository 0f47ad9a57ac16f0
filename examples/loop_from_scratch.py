"""The method in one file, without the opentao package: only torch, transformers and the standard library.

    python examples/loop_from_scratch.py                    a tiny random model, some seconds on one core

Prompts alone are given, no answers. A round samples N responses to each prompt, scores them with a rule, gives each
response the probability that it is the best of n, and moves the weights towards that. Afterwards the *first* try is as
good as the best of 8 was. Read it from top to bottom; everything that OpenTAO adds is speed, safety and measurement:
prompts computed once per group, resume after a kill, reward models, audits, intervals.

The task is a toy that a random model can learn: a response's reward is the share of even token ids in it.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

GROUP_SIZE = 8  # N, responses to a prompt
TARGET_N = 8  # which best-of-n is baked into the weights
NEW_TOKENS = 16  # most tokens of a response
ROUNDS = 4
EPOCHS = 2  # passes over a round's groups
PROMPTS_PER_STEP = 4
LEARNING_RATE = 1e-2
FLOOR = 2.0  # regress: the target log-ratio ends at minus this

Tokens = list[int]
Model = LlamaForCausalLM  # any causal language model will do


# ------------------------------------------------------------------------------------------------- the case


def make_model() -> Model:
    """An untrained model of 40 thousand weights. Prompts and responses are token ids; 2 ends a response."""
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def make_prompts(num: int) -> list[Tokens]:
    return [[random.randrange(3, 400) for _ in range(12)] for _ in range(num)]


def reward(response_R: Tokens) -> float:
    """A verifiable rule in place of a reward model."""
    return sum(token % 2 == 0 for token in response_R) / len(response_R)


# ------------------------------------------------------------------------------------------------- generate


@torch.no_grad()
def sample(model: Model, prompt_P: Tokens, num: int) -> list[Tokens]:
    """`num` responses to one prompt, from the model's own distribution. The stop token belongs to the response."""
    tokens_NT = torch.tensor([prompt_P] * num)
    responses: list[Tokens] = [[] for _ in range(num)]
    cache = None
    for _ in range(NEW_TOKENS):
        output = model(input_ids=tokens_NT, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        tokens_NT = torch.multinomial(output.logits[:, -1].softmax(-1), 1)
        for response, token in zip(responses, tokens_NT[:, 0].tolist(), strict=True):
            if not response or response[-1] != model.config.eos_token_id:
                response.append(token)
    return responses


# ------------------------------------------------------------------------------------------------- credit


def best_of_n_weights(rewards: list[float], n: int) -> list[float]:
    """How probable each response is to be the best of n draws from its group. Ties share; the weights sum to 1.

    w_i = (F_i^n - F'_i^n) / m_i,  F_i = #{r_j <= r_i}/N,  F'_i = #{r_j < r_i}/N,  m_i = #{r_j = r_i}
    """
    N = len(rewards)
    at_most = [sum(other <= r for other in rewards) for r in rewards]
    below = [sum(other < r for other in rewards) for r in rewards]
    return [((a / N) ** n - (b / N) ** n) / (a - b) for a, b in zip(at_most, below, strict=True)]


def log_probability(model: Model, prompt_P: Tokens, response_R: Tokens) -> torch.Tensor:
    """log π(response | prompt), in nats."""
    logits = model(input_ids=torch.tensor([prompt_P + response_R])).logits[0, len(prompt_P) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response_R)[:, None]).sum()


# ------------------------------------------------------------------------------------------------- train


class Group:
    """One prompt, its responses and their rewards."""

    def __init__(self, model: Model, prompt_P: Tokens) -> None:
        self.prompt_P = prompt_P
        self.responses = sample(model, prompt_P, GROUP_SIZE)
        self.rewards = [reward(response) for response in self.responses]
        with torch.no_grad():  # the policy before the first step is the reference
            self.old_logprobs = torch.stack([log_probability(model, prompt_P, r) for r in self.responses])


def distill_loss(model: Model, group: Group) -> torch.Tensor:
    """-Σ w_i log π(y_i|x): cross-entropy to the best-of-n policy."""
    weights = best_of_n_weights(group.rewards, TARGET_N)
    pairs = zip(weights, group.responses, strict=True)
    return -sum(w * log_probability(model, group.prompt_P, response) for w, response in pairs if w > 0.01)


def regress_loss(model: Model, group: Group) -> torch.Tensor:
    """mean ((Δ_i - mean Δ) - (t_i - mean t))²: log-ratios to the old policy become best-of-n's, t_i = log(N w_i)."""
    weights = torch.tensor(best_of_n_weights(group.rewards, TARGET_N))
    target = (len(weights) * weights).log().clamp(min=-FLOOR)
    now = torch.stack([log_probability(model, group.prompt_P, response) for response in group.responses])
    delta = now - group.old_logprobs
    return ((delta - delta.mean()) - (target - target.mean())).square().mean()


OBJECTIVES = {"distill": distill_loss, "regress": regress_loss}


def train_round(model: Model, prompts: list[Tokens], objective: str) -> None:
    """Sample and score a group for every prompt, then step towards the best of n."""
    groups = [Group(model, prompt) for prompt in prompts]
    groups = [group for group in groups if len(set(group.rewards)) > 1]  # equal rewards teach nothing
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(EPOCHS):
        random.shuffle(groups)
        for start in range(0, len(groups), PROMPTS_PER_STEP):
            batch = groups[start : start + PROMPTS_PER_STEP]
            optimiser.zero_grad()
            for group in batch:
                (OBJECTIVES[objective](model, group) / len(batch)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()


# ------------------------------------------------------------------------------------------------- evaluate


def evaluate(model: Model, prompts: list[Tokens]) -> tuple[float, float]:
    """Mean reward of a first try, and of the best of 8, on prompts that were never trained on."""
    rewards = [[reward(response) for response in sample(model, prompt, 8)] for prompt in prompts]
    return sum(sum(r) / 8 for r in rewards) / len(rewards), sum(max(r) for r in rewards) / len(rewards)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tune a model from prompts alone, in one file.")
    parser.add_argument("--model", help="folder of a causal language model; default: a tiny random one")
    parser.add_argument("--prompts", type=Path, help='JSON {"train": [[token, …], …], "heldout": …}; default: random')
    parser.add_argument("--objective", choices=OBJECTIVES, default="distill")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    model = AutoModelForCausalLM.from_pretrained(arguments.model) if arguments.model else make_model()
    made = {"train": make_prompts(64), "heldout": make_prompts(32)}
    prompts = json.loads(arguments.prompts.read_text()) if arguments.prompts else made

    first, best = evaluate(model, prompts["heldout"])
    print(f"base     first try {first:.3f}   best of 8 {best:.3f}")
    size = -(-len(prompts["train"]) // ROUNDS)
    for round_ in range(ROUNDS):
        train_round(model, prompts["train"][round_ * size : (round_ + 1) * size], arguments.objective)
        first, _ = evaluate(model, prompts["heldout"])
        print(f"round {round_ + 1}  first try {first:.3f}")
    print(f"The first try is now {'at least' if first >= best else 'not yet'} as good as the best of 8 was.")


if __name__ == "__main__":
    main()
