"""What an answer costs before and after: a finished run's held-out prompts, one answer each, base and policy in turns.

python inference_cost.py RUN   one JSON object: for each side the tokens of every prompt's answers, and seconds a pass;
what each prompt belongs to

Times count sampling alone, not loading; passes alternate, and each begins with a few prompts that are not timed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lab import Facts, summary_of

from opentao.allocator import use_large_pages
from opentao.config import load_config
from opentao.engines.group import GroupEngine
from opentao.policy import Policy
from opentao.store import Run, table_to_prompts
from opentao.types import PLAIN, Prompt, SamplingPlan

PASSES = 3
NUM_WARM = 8  # prompts before the clock starts


def main() -> None:
    use_large_pages()
    directory = Path(sys.argv[1])
    config = load_config(directory / "config.yaml")
    base = Policy.of_base(config.model)
    sides = {"before": base, "after": Policy.of_folder(base, directory / summary_of(directory)["policy"])}
    with Run(directory, read_only=True) as run:
        prompts = table_to_prompts(run.read_table("prompts/heldout.parquet"))
    plan = replace(config.generate.plan(config.seed), group_size=1, strategies=(PLAIN,), dtype="auto")
    engine = GroupEngine(batch_responses=config.generate.batch_responses)
    found: dict[str, Facts] = {side: {"tokens": [0] * len(prompts), "seconds": []} for side in sides}
    for i in range(PASSES):
        for side, policy in sides.items():
            engine.load(policy)
            list(engine.sample(prompts[:NUM_WARM], plan))
            seconds, tokens = timed(engine, prompts, replace(plan, seed=plan.seed + i))
            found[side]["seconds"].append(round(seconds, 2))
            found[side]["tokens"] = [a + b for a, b in zip(found[side]["tokens"], tokens, strict=True)]
    clusters = [p.meta.get("db_id") or p.meta.get("document") or p.id for p in prompts]
    print(json.dumps(found | {"passes": PASSES, "clusters": clusters}))


def timed(engine: GroupEngine, prompts: Sequence[Prompt], plan: SamplingPlan) -> tuple[float, list[int]]:
    """Seconds, and the tokens of each prompt's answer, in the order of prompts."""
    start = time.perf_counter()
    lengths = {g.prompt.id: sum(len(r.tokens_R) for r in g.responses) for g in engine.sample(prompts, plan)}
    return time.perf_counter() - start, [lengths[p.id] for p in prompts]


if __name__ == "__main__":
    main()
