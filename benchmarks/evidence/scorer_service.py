"""A config's scorers for a program that cannot import them: python scorer_service.py CONFIG PROMPTS

In: one JSON line a group, ``{"index": 3, "texts": ["…", …]}``, the prompt by its line in PROMPTS. Out: a JSON list of
rewards in the same order, null where a response is unscored. The scorers are a run's, weights and gates included.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from opentao.config import load_config
from opentao.prompts import read_prompts
from opentao.scorers.registry import build_scorer
from opentao.scorers.run import Gate, score_groups
from opentao.types import Group


def main() -> None:
    config = load_config(Path(sys.argv[1]), sys.argv[3:])
    prompts = read_prompts(Path(sys.argv[2])).prompts
    scorers = [build_scorer(s) for s in config.scorers]
    weights = {s.label: s.weight for s in config.scorers}
    gates = {s.label: Gate(at_least=s.gate.at_least, cap=s.gate.cap) for s in config.scorers if s.gate}
    for line in sys.stdin:
        asked = json.loads(line)
        group = Group.of_texts(prompts[asked["index"]], asked["texts"])
        [scored] = score_groups([group], scorers, weights, gates)
        print(json.dumps([None if math.isnan(r) else r for r in scored.rewards_N]), flush=True)


if __name__ == "__main__":
    main()
