"""Instructions that code can check: python examples/instruction_following/prepare.py --out DIR

Written to DIR, with this recipe's own files: `prompts.jsonl` (composed, types of TRAINED), `heldout.jsonl` (composed,
other topics: types of TRAINED for the reward, of UNSEEN for the audit), and `ifeval.jsonl`: IFEval's own prompts whose
types are all checked here and that ask for at most a hundred words, which nothing is chosen by.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import compose  # beside this script
from constraints import CHECKS, UNSEEN
from sources import SourceError, arguments, find

HERE = Path(__file__).resolve().parent
NUM_PROMPTS, NUM_HELDOUT, NUM_UNSEEN = 1950, 52, 112
TWO = 0.4  # share of prompts with a second constraint
HELDOUT_TOPICS = 4  # every so manyth topic, by hash
LONGEST = 100  # words that a prompt of IFEval may ask for at least
LONGEST_SENTENCES = 8


def ifeval_row(entry: dict[str, Any]) -> dict[str, Any] | None:
    """The prompt with its constraints as meta; None if it is left out."""
    types = [name.partition(":")[2] for name in entry["instruction_id_list"]]
    if not set(types) <= set(CHECKS):
        return None
    constraints = [{"type": t} | kwargs for t, kwargs in zip(types, entry["kwargs"], strict=True)]
    least = [c for c in constraints if c.get("relation") == "at least"]
    if any(c.get("num_words", 0) > LONGEST or c.get("num_sentences", 0) > LONGEST_SENTENCES for c in least):
        return None
    return {"prompt": entry["prompt"]} | sides(constraints)


def sides(constraints: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the reward reads, and what the audit reads."""
    return {
        "constraints": [c for c in constraints if c["type"] not in UNSEEN],
        "unseen": [c for c in constraints if c["type"] in UNSEEN],
    }


def composed() -> dict[str, list[dict[str, Any]]]:
    """File -> rows."""
    heldout = [t for t in compose.TOPICS if hashlib.sha256(t.encode()).digest()[0] % HELDOUT_TOPICS == 0]
    others = [t for t in compose.TOPICS if t not in heldout]
    asked = {  # each from a stream of its own: more prompts are no other held-out ones
        name: compose.rows(types, topics, number, random.Random(name), two=two)
        for name, types, topics, number, two in (
            ("prompts", compose.TRAINED, others, NUM_PROMPTS, TWO),
            ("heldout", compose.TRAINED, heldout, NUM_HELDOUT, TWO),
            ("unseen", compose.UNSEEN, heldout, NUM_UNSEEN, 0.0),
        )
    }
    unseen = [{"prompt": row["prompt"]} | sides(row["constraints"]) for row in asked["unseen"]]
    return {"prompts": asked["prompts"], "heldout": asked["heldout"] + unseen}


def main() -> None:
    given = arguments(__doc__).parse_args()
    try:
        [path] = find("ifeval", given.data)
    except SourceError as error:
        sys.exit(str(error))
    lines = path.read_text(encoding="utf-8").splitlines()
    files = composed() | {"ifeval": [row for line in lines if (row := ifeval_row(json.loads(line)))]}
    given.out.mkdir(parents=True, exist_ok=True)
    for file, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (given.out / f"{file}.jsonl").write_text(text, encoding="utf-8")
        unseen = sum(bool(row.get("unseen")) for row in rows)
        print(f"{file}.jsonl: {len(rows)} prompts, {unseen} of them with types never trained on")
    for name in ("tao.yaml", "constraints.py"):
        shutil.copy(HERE / name, given.out / name)


if __name__ == "__main__":
    main()
