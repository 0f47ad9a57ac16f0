"""Against labels: supervised fine-tuning on 30 to 1,000 labels, and TAO on prompts of the same side without any.

Fine-tuning is `distill` on groups of two answers, the label with all the weight and an empty one with none: the mean
cross-entropy of the labels' tokens, by the same trainer, judged on the same held-out prompts. Passes and rate are, for
each number of labels, the best of GRID on the first seed, by the audit on these very prompts: that favours fine-tuning.

    python labels.py CONFIG RUN SIZE A.B=VALUE…   one such run, in the folder of its config
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import small
from lab import HERE, SEEDS, Facts, Lab, changes, copy_run, essence_alone, made_of, python

SIZES = (30, 100, 300, 1000)
GRID = [(passes, rate) for passes in (2, 5) for rate in (2e-4, 4e-4, 1e-3)]
OF_GRID = ("train.epochs", "train.learning_rate")
ALL_WEIGHT = {"train.objective": "distill", "train.target_n": 64}  # of the label: 1 − 2⁻⁶⁴
BY_CHOICES: Facts = {"scorers": [{"type": "reward_model", "args": {"model": "reward", "squash": True}}]}


def measure(lab: Lab, size: str = "3M", tao: Facts | None = None, fine_tuning: Facts | None = None) -> None:
    """Every number of labels on every seed, beside one run of TAO a seed, whose base samples are used again."""
    folder = small.folder(lab, size)
    place = lab.work / "labels" / size
    chosen: dict[int, tuple[int, float]] = {}

    def where(n: int, passes: int, rate: float, seed: int) -> Path:
        return place / f"{n}-{passes}-{rate:g}-{seed}"

    for seed in SEEDS:
        same: Facts = {"scorers": small.EXACT}
        common = same | {"seed": seed}
        source = place / f"tao-{seed}"

        def one_tao(common: Facts = common, source: Path = source) -> Facts:
            return lab.run("tao.yaml", source, common | (tao or {}), cwd=folder)

        def one(n: int, passes: int, rate: float, common: Facts = common, source: Path = source) -> Facts:
            directory = where(n, passes, rate, common["seed"])
            if not source.exists():  # the cell is kept, its run is not
                one_tao(common, source)
            if not directory.exists():
                copy_run(source, directory)
            settings = common | supervised(fine_tuning, passes, rate)
            python(HERE / "labels.py", "tao.yaml", directory, str(n), *changes(settings), cwd=folder)
            return essence_alone(directory) | {"settings": {name: settings[name] for name in OF_GRID}}

        def by_choices(common: Facts = common, source: Path = source) -> Facts:
            if not source.exists():
                one_tao(common, source)
            settings = common | (tao or {}) | BY_CHOICES
            return lab.run("tao.yaml", place / f"choices-{common['seed']}", settings, cwd=folder, start=source)

        lab.cell("labels", f"TAO/{seed}", one_tao, [made_of(folder), same | (tao or {})], source)
        choices = small.preferences(lab, size)
        of_choices = [made_of(choices, "rewards_of"), same | (tao or {}) | BY_CHOICES]
        lab.cell("labels", f"TAO by choices/{seed}", by_choices, of_choices, place / f"choices-{seed}")
        for n in SIZES:
            of = [made_of(folder), same | supervised(fine_tuning, 0, 0.0), GRID]
            if seed == SEEDS[0]:
                chosen[n], facts = _best(lab, n, one, of, where)
                lab.cell("labels", f"{n}/{seed}", lambda facts=facts: dict(facts), of)
            else:
                lab.cell("labels", f"{n}/{seed}", lambda n=n: one(n, *chosen[n]), of, where(n, *chosen[n], seed))


def supervised(fine_tuning: Facts | None, passes: int, rate: float) -> Facts:
    """Settings of a run on labels, but for its seed."""
    return {"rounds": 1} | (fine_tuning or {}) | dict(zip(OF_GRID, (passes, rate), strict=True)) | ALL_WEIGHT


def _best(
    lab: Lab,
    n: int,
    one: Callable[[int, int, float], Facts],
    of: object,
    where: Callable[[int, int, float, int], Path],
) -> tuple[tuple[int, float], Facts]:
    """Passes and rate whose audit is best on the first seed, and that run."""

    def measured(how: tuple[int, float]) -> Facts:
        name = f"{n}/{how[0]} passes at {how[1]:g}"
        return lab.cell("labels, settings", name, lambda: one(n, *how), of, where(n, *how, SEEDS[0]))

    found = {how: measured(how) for how in GRID}
    best = max(found, key=lambda how: found[how]["after"]["audit"]["first_try"]["mean"])
    return best, found[best]


def fine_tune(config: str, directory: Path, size: int, overrides: list[str], label: str = "label") -> None:
    """Train the base on so many labels, then measure it as a round is measured."""
    from opentao.cli_common import prepare_process
    from opentao.config import load_config
    from opentao.loop import finish, measure
    from opentao.models import load_tokenizer
    from opentao.policy import Policy
    from opentao.predict import predict
    from opentao.progress import Progress
    from opentao.session import open_session
    from opentao.train import train

    prepare_process()
    settings = load_config(Path(config), overrides)
    with Progress() as progress, open_session(settings, directory, progress) as session:
        prompts = [p for p in session.train_prompts if label in p.meta]
        if len(prompts) < size:
            raise SystemExit(f"{size} labels asked for, {len(prompts)} there")
        tokenizer = load_tokenizer(settings.model)
        chosen = random.Random(settings.seed).sample(prompts, size)
        groups = [_labelled(tokenizer, prompt, str(prompt.meta[label])) for prompt in chosen]
        base = Policy.of_base(settings.model)
        first = measure(session, 0, base, base, earlier=[], facts=None)
        policy, facts = train(session, 1, base, groups)
        after = measure(session, 1, policy, base, earlier=[first], facts=facts)
        finish(session, [first, after], predict(session, first.evaluation))


def _labelled(tokenizer, prompt, label):  # type: ignore[no-untyped-def]
    """The label as the answer that wins against an empty one."""
    from opentao.policy import encode_prompt
    from opentao.types import Group, Response

    responses = []
    for i, text in enumerate((label, "")):
        ids = (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id)
        responses.append(
            Response(id=str(i), text=text, tokens_R=ids, sampler_logprobs_R=(0.0,) * len(ids), finish="stop")
        )
    return Group(
        prompt=prompt,
        prompt_tokens_P=tuple(encode_prompt(tokenizer, prompt.messages)),
        responses=tuple(responses),
        rewards_N=(1.0, 0.0),
    )


if __name__ == "__main__":
    fine_tune(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
