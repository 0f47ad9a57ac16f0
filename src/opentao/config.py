"""The one configuration tree, read from YAML. Class defaults are the vetted setting; an unknown key is an error.

`load_config` turns every mistake into a `ConfigError` that names file, line, key and what was expected.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from opentao.errors import ConfigError
from opentao.types import RolloutDtype, SamplingPlan, Strategy, content_hash
from opentao.yaml_tree import apply_override, blamed, line_of, mistake, read_yaml

IDENTITY = {"reward_model": ("model",), "python": ("function",), "judge": ("url", "model")}  # args that say who judges

Schedule = Literal["constant", "linear", "cooldown"]
LoraLayers = Literal["all-linear", "attention"]
RewardLoss = Literal["auto", "bradley_terry", "plackett_luce"]
Head = Literal["guided", "random"]
LabelKind = Literal["pair", "rank", "mark"]
Objective = Literal["regress", "distill", "online", "prefer"]

# Where the config does not say. On a GPU a step of many responses costs little more than one of few.
ROWS, GPU_ROWS = 256, 1024
ROW_TOKENS, GPU_ROW_TOKENS = 2048, 8192


class Node(BaseModel):
    """A piece of the tree: immutable, unknown keys are errors; a section without any key is the default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_empty_sections(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        sections = {name for name, field in cls.model_fields.items() if isinstance(field.default, Node)}
        return {key: value for key, value in tree.items() if not (value is None and key in sections)}


class StrategyConfig(Node):
    """One way to ask; see `opentao.types.Strategy`."""

    name: str
    template: str | None = None
    system: str | None = None
    examples: list[dict[str, Any]] = []
    replace: dict[str, str] = {}
    answer_prefix: str = ""

    @field_validator("template")
    @classmethod
    def _has_prompt(cls, value: str | None) -> str | None:
        if value is not None and "{prompt}" not in value:
            raise ValueError("must contain {prompt}")
        return value

    @field_validator("examples")
    @classmethod
    def _are_turns(cls, value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for turn in value:
            if turn.get("role") not in ("system", "user", "assistant") or not isinstance(turn.get("content"), str):
                raise ValueError(f"expected turns {{role: user or assistant, content: text}}, got {turn!r:.80}")
        return value

    @field_validator("replace")
    @classmethod
    def _says_what(cls, value: dict[str, str]) -> dict[str, str]:
        if "" in value:
            raise ValueError("expected the text to replace, got an empty one")
        return value

    def build(self) -> Strategy:
        return Strategy(
            name=self.name,
            template=self.template,
            system=self.system,
            examples=tuple(self.examples),
            replace=dict(self.replace),
            answer_prefix=self.answer_prefix,
        )


class PromptsConfig(Node):
    """Where prompts come from and which are held out."""

    path: str = Field(description="JSONL, Parquet or CSV with `prompt` (text) or `messages` (chat)")
    heldout_path: str | None = Field(
        None, description="a file of prompts to hold out instead of a share; what is like one of them is not trained on"
    )
    heldout_fraction: float = Field(0.2, gt=0, lt=1, description="share of prompts never trained on, by prompt hash")
    split_by: str | None = Field(
        None, description="name of a meta entry, e.g. db_id: prompts with the same value stay on the same side"
    )
    max_heldout: int = Field(64, ge=2, description="held-out prompts used for evaluation")
    max_train: int | None = Field(None, ge=1, description="use only this many training prompts")
    near_duplicate: float = Field(
        0.8, gt=0, le=1, description="word-shingle similarity from which two prompts are kept on the same side"
    )


class GenerateConfig(Node):
    """How a round's groups are sampled."""

    group_size: int = Field(8, ge=2, le=1024, description="responses per prompt, N")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_new_tokens: int = Field(256, ge=1)
    stop: list[str] = []
    strategies: list[StrategyConfig] = Field([StrategyConfig(name="plain")], min_length=1)
    shard_prompts: int | None = Field(
        None, ge=1, description="prompts per shard, what a kill loses; default: two batches"
    )
    batch_responses: int | None = Field(
        None, ge=1, description="responses decoded side by side, at most; default: 256, on a GPU 1024"
    )
    rollout_dtype: RolloutDtype = Field("auto", description="of the sampler's weights in a round; int8: rounded")

    @field_validator("stop")
    @classmethod
    def _stop_is_text(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("an empty text stands in every answer")
        return value

    @model_validator(mode="after")
    def _every_strategy_is_asked(self) -> GenerateConfig:
        if len(self.strategies) > self.group_size:
            raise ValueError(f"strategies: {len(self.strategies)} for {self.group_size} responses: each needs one")
        return self

    @field_validator("strategies")
    @classmethod
    def _names_differ(cls, value: list[StrategyConfig]) -> list[StrategyConfig]:
        names = [s.name for s in value]
        if len(set(names)) < len(names):
            raise ValueError(f"strategy names must differ, got {names}")
        return value

    def plan(self, seed: int) -> SamplingPlan:
        return SamplingPlan(
            group_size=self.group_size,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self.max_new_tokens,
            stop=tuple(self.stop),
            strategies=tuple(s.build() for s in self.strategies),
            seed=seed,
            dtype=self.rollout_dtype,
        )


class GateConfig(Node):
    """A hard rule: a response whose score is below `at_least` has a reward of at most `cap`."""

    at_least: float
    cap: float = 0.0


class ScorerConfig(Node):
    """One scorer: `type` is a built-in name, an entry point of `opentao.scorers`, or `module:function`."""

    type: str
    name: str | None = Field(None, description="how its scores are called; defaults to the type")
    weight: float = Field(1.0, description="its share in the reward")
    gate: GateConfig | None = Field(None, description="a hard rule on its score; its weight may then be 0")
    calibration: str | None = Field(None, description="file of `tao reward calibrate`: its scale multiplies the scores")
    args: dict[str, Any] = Field({}, description="passed to the scorer")

    _place: str = PrivateAttr("")

    def __eq__(self, other: object) -> bool:
        """Wherever it was read from."""
        return isinstance(other, ScorerConfig) and self.model_dump() == other.model_dump()

    @property
    def place(self) -> str:
        """File, line and key, ``tao.yaml:12: scorers.0: ``, of one that was read from a file; else nothing."""
        return self._place

    @property
    def label(self) -> str:
        return self.name or self.type

    @property
    def identity(self) -> str:
        """What judges, whatever it is asked: a reward model by its weights, a judge by its model."""
        keys = IDENTITY.get(self.type, tuple(self.args))
        args = self.model_dump(mode="json")["args"]  # YAML may make a date of a value
        values = {k: args.get(k) for k in keys}
        found = {k: os.path.realpath(v) if isinstance(v, str) and os.path.exists(v) else v for k, v in values.items()}
        return content_hash(self.type, found)


class LoraConfig(Node):
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)


class KeepConfig(Node):
    """Which responses of a group are trained on; credit always comes from the whole group."""

    strategy: Literal["max_variance"] = "max_variance"
    responses: int = Field(ge=2, description="at most this many of a group: those whose rewards vary most")


class TrainConfig(Node):
    """How a round's scored groups become a policy."""

    objective: Objective = "distill"
    method: Literal["lora", "full"] = "full"
    lora: LoraConfig = LoraConfig()
    train_embeddings: bool = Field(True, description="full: false leaves token embeddings, and a head tied to them")
    learning_rate: float | None = Field(None, gt=0, description="default: 1e-5 full, 2e-4 LoRA")
    keep: KeepConfig | None = Field(None, description="train on the informative part of each group; default: all")
    gradient_checkpointing: bool = Field(False, description="compute activations again instead of keeping them")
    schedule: Schedule = Field(
        "linear",
        description="linear: up over a tenth of the round's steps, then down to 0; cooldown: down over the second half",
    )
    temperature: float | None = Field(None, gt=0, description="of the learner's log-probs; default: that of sampling")
    epochs: int = Field(2, ge=1, description="passes over the round's groups")
    prompts_per_step: int = Field(4, ge=1, description="groups per optimiser step")
    max_grad_norm: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    row_tokens: int | None = Field(
        None,
        ge=1,
        description="a packed row's most tokens; a memory knob, the gradient stays. Default: 2048, on a GPU up to 8192",
    )
    save_every_steps: int = Field(50, ge=1, description="steps between checkpoints inside a round")
    target_n: int = Field(16, ge=2, description="regress, distill: which best-of-n is baked; may exceed group_size")
    target: Literal["rank", "value"] = Field("rank", description="regress: targets from ranks, or from reward / beta")
    floor: float = Field(2.0, gt=0, description="regress: the target log-ratio is floored at -floor")
    beta: float = Field(0.1, gt=0, description="regress with value target, prefer: strength of the KL to the reference")
    advantage: Literal["group", "centred", "loo"] = Field(
        "group", description="online: (r - mean) / std, r - mean, or leave-one-out"
    )
    clip: float = Field(0.2, gt=0, description="online: importance weights are clipped to 1 ± clip")

    @property
    def lr(self) -> float:
        return self.learning_rate or (2e-4 if self.method == "lora" else 1e-5)


class EvaluateConfig(Node):
    """How held-out prompts are judged."""

    base_group_size: int = Field(16, ge=2, description="responses per prompt for the base's best-of-k curve")
    group_size: int = Field(4, ge=1, description="responses per prompt for a tuned policy")
    kl_responses: int = Field(2, ge=1, description="responses per prompt whose KL from the base is measured")
    solved_at: float | None = Field(
        None, description="reward from which an answer counts as solved; default: full marks"
    )
    bootstrap: int = Field(2000, ge=100, description="resamples of the prompts behind every interval")
    confidence: float = Field(0.95, gt=0.5, lt=1)


class LaterRounds(Node):
    """Keys of `generate` and `train` that have other values after the first round."""

    generate: dict[str, Any] = {}
    train: dict[str, Any] = {}


class Config(Node):
    """Everything a run needs."""

    model: str = Field("smollm2-135m-instruct", description="built-in name, local folder, or hub name")
    trust_remote_code: bool = False
    prompts: PromptsConfig
    scorers: list[ScorerConfig] = Field(min_length=1)
    audit: ScorerConfig | None = Field(None, description="never trained on; judges the result")
    rounds: int = Field(2, ge=1)
    prompts_per_round: int | None = Field(None, ge=1, description="default: the training prompts in equal parts")
    seed: int = Field(0, ge=0)
    generate: GenerateConfig = GenerateConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    later_rounds: LaterRounds | None = Field(None, description="what rounds after the first do otherwise")

    @model_validator(mode="after")
    def _check(self) -> Config:
        labels = [s.label for s in self.scorers]
        if taken := {"reward", "audit"} & set(labels):
            raise ValueError(f"scorers: {taken.pop()!r} is a column of the score files; give another `name`")
        if all(s.weight == 0 for s in self.scorers):
            raise ValueError("scorers: at least one weight must not be 0")
        if len(set(labels)) < len(labels):
            raise ValueError(f"scorers: names must differ, got {labels}; give each a `name`")
        same = [s.label for s in self.scorers if self.audit and s.identity == self.audit.identity]
        if same:
            raise ValueError(
                f"audit: must differ from every training scorer, or it judges what it taught; it is {same[0]}"
            )
        if self.audit and self.audit.gate:
            raise ValueError("audit: has no gate, it never enters a reward")
        if self.train.objective == "online":
            truncated = self.generate.top_p < 1 or self.generate.top_k > 0
            if truncated or len(self.generate.strategies) > 1 or self.generate.strategies[0].build() != Strategy():
                raise ValueError(
                    "train.objective: importance weights of online need top_p 1, top_k 0 and only the plain strategy"
                    " (its samples must come from the policy's own distribution)"
                )
            if self.learner_temperature != self.generate.temperature:
                raise ValueError("train.temperature: importance weights of online need that of generate.temperature")
        try:
            later = self.of_round(2).train
        except ValidationError as error:
            loc, message = mistake(error, Config)
            raise ValueError(f"later_rounds.{'.'.join(loc)}: {message}") from None
        if self.later_rounds and "batch_responses" in self.later_rounds.generate:
            raise ValueError("later_rounds.generate: `batch_responses` is that of `generate`: one engine samples all")
        if (later.method, later.lora) != (self.train.method, self.train.lora):
            raise ValueError(
                "later_rounds.train: `method` and `lora` are those of `train`: rounds go on with its weights"
            )
        return self

    def of_round(self, round_: int) -> Config:
        """The config by which a round samples and trains; held-out prompts are asked as the first round's says."""
        if self.later_rounds is None or round_ < 2:
            return self
        tree = self.model_dump(mode="json", exclude={"later_rounds"})
        for section, changes in self.later_rounds:
            tree[section] |= changes
        return Config.model_validate(tree)

    @property
    def learner_temperature(self) -> float:
        """At which the learner takes log-probs. 1 with samples at less makes the policy sharper than it was sampled."""
        return self.generate.temperature if self.train.temperature is None else self.train.temperature


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read YAML, apply ``a.b=value`` overrides (values are YAML), validate.

    Raises:
        ConfigError: file, line, key and what was expected.
    """
    tree, root = read_yaml(path)
    for override in overrides:
        apply_override(tree, override)
    config = _validated(Config, tree, path, root, overrides)
    named = [*((["scorers", str(i)], s) for i, s in enumerate(config.scorers)), (["audit"], config.audit)]
    for loc, scorer in named:
        if scorer is not None:
            scorer._place = f"{path}:{line_of(root, loc)}: {'.'.join(loc)}: "
    return config


def load_scorer(path: Path) -> ScorerConfig:
    """One scorer from a YAML file of its own, e.g. ``{type: judge, args: {url: …, model: …}}``; errors as above."""
    tree, root = read_yaml(path)
    return _validated(ScorerConfig, tree, path, root)


Tree = TypeVar("Tree", bound=Node)


def _validated(
    model: type[Tree], tree: dict[str, Any], path: Path, root: yaml.Node | None, overrides: Sequence[str] = ()
) -> Tree:
    """Raises ConfigError: one line with the place in the file, or the override that put the mistake there."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        loc, message = mistake(error, model)
    by = blamed(model, path, overrides, loc)
    place = f"--set {by}" if by else f"{path}:{line_of(root, loc)}"
    raise ConfigError(f"{place}: {'.'.join(loc) or 'config'}: {message}")


def dump_config(config: Config) -> str:
    """The resolved config as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
