"""A run's rounds in one process, as `tao run` does them, each timed without its evaluation.

python timed_run.py CONFIG RUN OUT [KEY=VALUE …]

Writes one JSON line a round to OUT: seconds of training so far, first try, audit.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from opentao.allocator import use_large_pages
from opentao.config import load_config
from opentao.loop import measure, sample_round
from opentao.policy import Policy
from opentao.progress import Progress
from opentao.score import score
from opentao.session import open_session
from opentao.train import train


def main() -> None:
    use_large_pages()
    config = load_config(Path(sys.argv[1]), sys.argv[4:])
    with open_session(config, Path(sys.argv[2]), Progress(), None) as session, Path(sys.argv[3]).open("w") as out:
        base = policy = Policy.of_base(config.model)
        outcomes = [measure(session, 0, base, base, earlier=[], facts=None)]
        seconds = 0.0
        for round_ in range(config.rounds + 1):
            if round_ > 0:
                start = time.perf_counter()
                groups = score(session, sample_round(session, round_, policy), f"round {round_}: score")
                policy, facts = train(session, round_, policy, groups)
                seconds += time.perf_counter() - start
                outcomes.append(measure(session, round_, policy, base, earlier=outcomes, facts=facts))
            numbers = outcomes[-1].numbers
            audit = numbers["audit"] and numbers["audit"]["first_try"]
            point = {"seconds": round(seconds, 1), "first_try": numbers["first_try"], "audit": audit}
            print(json.dumps(point), file=out, flush=True)


if __name__ == "__main__":
    main()
