"""What a config will cost: tokens, minutes and peak memory, from a short measurement.

An estimate. Tokens are upper bounds (every response as long as `max_new_tokens`); minutes and memory follow from timing
this model on this machine for a few seconds: training steps, a forward pass, a few decode steps. A reward model counts
as if it were as large as the model. Left out: scorers that are no reward models, loading, what else the machine does.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from opentao.config import ROW_TOKENS, ROWS, Config  # a GPU takes more if it has room, never less
from opentao.errors import DataError, ModelError
from opentao.types import Engine, Prompt, SamplingPlan

if TYPE_CHECKING:
    import torch

PROBE_TOKENS = 512  # of the forward pass and of the training step
DECODE_BATCH = 32
DECODE_STEPS = 4
SAMPLED_PROMPTS = 200  # tokenised to learn how long prompts are


@dataclass(kw_only=True, slots=True, frozen=True)
class Stage:
    """Work of one stage over the whole run, in tokens: ``Stage(forward=81920, decode=65536)``."""

    forward: int = 0  # computed in parallel, without gradients
    decode: int = 0  # sampled one after the other
    train: int = 0  # forward and backward
    steps: int = 0  # of the optimiser: not tokens


@dataclass(kw_only=True, slots=True, frozen=True)
class Probe:
    """Measured here, now: tokens per second, bytes (None where the system does not tell)."""

    forward: float
    decode: float  # of DECODE_BATCH responses together
    train: float
    step_s: float  # seconds of one optimiser step, beside its tokens
    loaded_bytes: int | None  # the process with the model in it
    state_bytes: int  # gradients and optimiser state
    row_bytes: int | None  # what a training row of PROBE_TOKENS adds
    cache_bytes: int  # keys and values of one token
    cache_budget_bytes: int  # that the engine allows itself for them

    def seconds(self, stage: Stage) -> float:
        tokens = stage.forward / self.forward + stage.decode / self.decode + stage.train / self.train
        return tokens + stage.steps * self.step_s

    def peak_bytes(self, config: Config) -> int | None:
        """The larger of training (activations grow in proportion to the row) and of generating (keys and values)."""
        if self.loaded_bytes is None or self.row_bytes is None:
            return None
        train = self.state_bytes + self.row_bytes * (config.train.row_tokens or ROW_TOKENS) // PROBE_TOKENS
        wanted = self.cache_bytes * (config.generate.batch_responses or ROWS) * config.generate.max_new_tokens
        generate = min(wanted, self.cache_budget_bytes)
        return self.loaded_bytes + max(train, generate)


def split_sizes(config: Config, num_prompts: int) -> tuple[int, int]:
    """Prompts (held out, trained on in each round), about: the split goes by hash. A held-out file counts as large."""
    settings, own_file = config.prompts, config.prompts.heldout_path is not None
    share = 0 if own_file else round(num_prompts * settings.heldout_fraction)
    train = min(num_prompts - share, settings.max_train or num_prompts)
    heldout = settings.max_heldout if own_file else min(share, settings.max_heldout)
    return heldout, min(train, config.prompts_per_round or -(-train // config.rounds))


def count_tokens(config: Config, num_prompts: int, prompt_tokens: float) -> dict[str, Stage]:
    """Most tokens of each stage. `prompt_tokens` is the mean length P of a prompt; R is `max_new_tokens`."""
    P = math.ceil(prompt_tokens)
    heldout, per_round = split_sizes(config, num_prompts)
    judges = sum(scorer.type == "reward_model" for scorer in config.scorers)
    audits = config.audit is not None and config.audit.type == "reward_model"
    rounds = [config.of_round(r) for r in range(1, config.rounds + 1)]
    return {
        "generate": _total(_sampling(c, per_round, P) for c in rounds),
        "score": _total(Stage(forward=judges * per_round * (P + _sampled(c))) for c in rounds),
        "train": _total(_training(c, per_round, P) for c in rounds),
        "evaluate": _evaluation(config, heldout, P, config.generate.max_new_tokens, judges + audits),
    }


def _total(stages: Iterable[Stage]) -> Stage:
    counts: Counter[str] = Counter()
    for stage in stages:
        counts.update(asdict(stage))
    return Stage(**counts)


def _sampled(config: Config) -> int:
    """Most response tokens of a group."""
    return config.generate.group_size * config.generate.max_new_tokens


def _sampling(config: Config, groups: int, P: int) -> Stage:
    return Stage(forward=groups * len(config.generate.strategies) * P, decode=groups * _sampled(config))


def _training(config: Config, groups: int, P: int) -> Stage:
    """A round's: the most responses that the objective may choose; what is over a row is computed again.

    A reward model gives no ties; where all scorers may only say right or wrong, the rewards that make most work count.
    """
    import numpy as np

    from opentao.objectives import OBJECTIVES
    from opentao.optimise import num_steps

    objective = OBJECTIVES[config.train.objective]
    row_tokens = config.train.row_tokens or ROW_TOKENS
    N = config.generate.group_size
    rewards = [np.arange(N, dtype=np.float64)]
    if not any(scorer.type == "reward_model" for scorer in config.scorers):
        rewards += [np.repeat([0.0, 1.0], [N - right, right]) for right in range(1, N)]
    chosen = max(len(objective.choose(r, config.train)) for r in rewards)
    if config.train.keep:
        chosen = min(chosen, config.train.keep.responses)
    group = P + chosen * config.generate.max_new_tokens
    again = config.train.epochs if group > row_tokens else 0
    return Stage(
        forward=(objective.needs_reference + again) * groups * group,
        train=config.train.epochs * groups * group,
        steps=num_steps(groups, config.train.epochs, config.train.prompts_per_step),
    )


def _evaluation(config: Config, heldout: int, P: int, R: int, judges: int) -> Stage:
    """The base's curve once; each round a sampled first try and the log-probs for the KL; of all a greedy try."""
    e = config.evaluate
    responses = e.base_group_size + 1 + config.rounds * (e.group_size + 1)
    prefills = 2 * (1 + config.rounds)
    kl = 2 * config.rounds * (P + e.kl_responses * R)
    scored = judges * (prefills * P + responses * R)
    return Stage(forward=heldout * (prefills * P + kl + scored), decode=heldout * responses * R)


def estimate(config: Config, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What a run of `config` on `prompts` will take, ready for JSON. Loads the model and measures for a few seconds.

    Raises:
        DataError: there is no prompt.
        ModelError: the model cannot be had.
    """
    if not prompts:
        raise DataError(f"{config.prompts.path}: no prompt")
    from opentao.policy import Policy, load_for_training

    policy = Policy.of_base(config.model, trust_remote_code=config.trust_remote_code)
    loaded = load_for_training(policy, config.train, config.seed)
    prompt_tokens = mean_prompt_tokens(loaded.tokenizer, prompts)
    probe = measure(loaded, config, prompts)
    stages = count_tokens(config, len(prompts), prompt_tokens)
    heldout, per_round = split_sizes(config, len(prompts))
    peaks = [probe.peak_bytes(config.of_round(r)) for r in (1, config.rounds)]
    return {
        "prompts": {"total": len(prompts), "heldout": heldout, "per_round": per_round, "mean_tokens": prompt_tokens},
        "tokens": {name: asdict(stage) for name, stage in stages.items()},
        "minutes": {name: probe.seconds(stage) / 60 for name, stage in stages.items()},
        "peak_memory_bytes": None if None in peaks else max(peaks),
        "measured": asdict(probe),
    }


def mean_prompt_tokens(tokenizer: Any, prompts: Sequence[Prompt]) -> float:
    """Mean length under the chat template, from an even sample."""
    from opentao.policy import encode_prompt

    lengths = []
    for prompt in prompts[:: max(1, len(prompts) // SAMPLED_PROMPTS)]:
        with suppress(TemplateError):  # such a prompt's group is a failure, and costs nothing
            lengths.append(len(encode_prompt(tokenizer, prompt.messages, prompt.tools)))
    if not lengths:
        raise ModelError("the model's chat template takes none of the prompts that were looked at")
    return sum(lengths) / len(lengths)


def measure(loaded: Any, config: Config, prompts: Sequence[Prompt]) -> Probe:
    """Time training steps, a forward pass and a few decode steps of a model that is loaded for training."""
    import torch

    from opentao.engines.group import MEMORY_SHARE
    from opentao.engines.memory import cache_token_bytes, free_bytes
    from opentao.train import autocast

    text = loaded.model.config.get_text_config()
    tokens = [i % min(text.vocab_size, 1000) for i in range(min(PROBE_TOKENS, text.max_position_embeddings))]
    loaded_bytes = _memory(peak=False)
    weights = [p for p in loaded.model.parameters() if p.requires_grad]
    state_bytes = 3 * sum(p.numel() * p.element_size() for p in weights)
    train_s, step_s = _training_times(loaded.model, tokens, torch.optim.AdamW(weights, lr=config.train.lr, fused=True))
    peak_bytes = _memory(peak=True)
    row_bytes = None
    if loaded_bytes is not None and peak_bytes is not None:
        row_bytes = max(0, peak_bytes - loaded_bytes - state_bytes) * PROBE_TOKENS // len(tokens)
    ids = torch.tensor([tokens], device=loaded.device)
    with torch.no_grad(), autocast(loaded.model):
        forward_s = min(
            _timed(lambda: loaded.model(input_ids=ids, logits_to_keep=1, use_cache=False)) for _ in range(2)
        )
    return Probe(
        forward=len(tokens) / forward_s,
        decode=_decode_speed(loaded, prompts),
        train=len(tokens) / train_s,
        step_s=step_s,
        loaded_bytes=loaded_bytes,
        state_bytes=state_bytes,
        row_bytes=row_bytes,
        cache_bytes=cache_token_bytes(loaded.model),
        cache_budget_bytes=int(MEMORY_SHARE * free_bytes(loaded.device)),
    )


def _training_times(model: Any, tokens: list[int], optimiser: torch.optim.Optimizer) -> tuple[float, float]:
    """Seconds of forward and backward over one packed row, as training does it, and of an optimiser step."""
    from opentao.pack import row_logprobs
    from opentao.rows import Sequences, plan_rows
    from opentao.train import autocast

    [row] = plan_rows([Sequences(prompt_P=tuple(tokens[:8]), responses_NR=(tuple(tokens[8:]),))], len(tokens))

    def backward() -> None:
        with autocast(model):
            logprobs = row_logprobs(model, row)[0]
        (-logprobs.mean()).backward()

    for _ in range(2):  # the first time makes the optimiser's state
        optimiser.zero_grad()
        times = _timed(backward), _timed(optimiser.step)
    return times


def _decode_speed(loaded: Any, prompts: Sequence[Prompt]) -> float:
    """Tokens per second of the engine itself; two lengths are compared, so that computing the prompt drops out."""
    from opentao.engines.group import GroupEngine

    engine = GroupEngine(batch_responses=DECODE_BATCH, ignore_end=True)
    model = loaded.model.get_base_model() if hasattr(loaded.model, "get_base_model") else loaded.model
    engine.loaded = replace(loaded, model=model)  # an adapter stays in its layers
    plans = [SamplingPlan(group_size=DECODE_BATCH, max_new_tokens=2 + n) for n in (0, DECODE_STEPS)]
    prompt = _first_sampled(engine, prompts[:SAMPLED_PROMPTS])
    for _ in range(2):  # on a GPU the first step of a shape compiles and the second records; the long plan has the room
        list(engine.sample([prompt], plans[1]))
    short_s, long_s = (_timed(lambda plan=plan: list(engine.sample([prompt], plan))) for plan in plans)
    return DECODE_BATCH * DECODE_STEPS / max(long_s - short_s, 1e-4)


def _first_sampled(engine: Engine, prompts: Sequence[Prompt]) -> Prompt:
    """The first prompt that the engine can answer: a group that failed would take no time, and tell nothing."""
    plan = SamplingPlan(group_size=1, max_new_tokens=1)
    why = ""
    for prompt in prompts:
        [group] = engine.sample([prompt], plan)
        if group.failure is None:
            return prompt
        why = f"{group.failure.kind}: {group.failure.message}"
    raise ModelError(f"none of the first {len(prompts)} prompts can be sampled, the last for: {why}")


def _timed(work: Callable[[], Any]) -> float:
    import torch

    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _memory(*, peak: bool) -> int | None:
    """Bytes of this process (of the GPU if there is one), now or at most so far; None where nothing tells."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    name = "VmHWM:" if peak else "VmRSS:"
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)
