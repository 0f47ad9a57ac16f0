"""IFEval's prompts, split by type of constraint: python examples/instruction_following/prepare.py --out DIR

Types that `constraints.py` checks are dealt to two sides beforehand: TRAINED and UNSEEN. A prompt that asks for an
unseen type is held out, and so is every fourth of the others, by hash, to measure the reward on new prompts. Left out:
prompts with a type that is not checked, and prompts that ask for more text than a small model is given room for.
Written to DIR: `prompts.jsonl`, `heldout.jsonl`, and this recipe's own files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from constraints import CHECKS, UNSEEN  # beside this script
from sources import SourceError, arguments, find

HERE = Path(__file__).resolve().parent
LONGEST = 100  # words that a prompt may ask for at least
LONGEST_SENTENCES = 8
HELDOUT_OF_TRAINED = 4  # every so manyth prompt, by hash


def row_of(entry: dict[str, Any]) -> dict[str, Any] | None:
    """The prompt with its constraints as meta; None if it is left out."""
    types = [name.partition(":")[2] for name in entry["instruction_id_list"]]
    if not set(types) <= set(CHECKS):
        return None
    constraints = [{"type": t} | kwargs for t, kwargs in zip(types, entry["kwargs"], strict=True)]
    least = [c for c in constraints if c.get("relation") == "at least"]
    if any(c.get("num_words", 0) > LONGEST or c.get("num_sentences", 0) > LONGEST_SENTENCES for c in least):
        return None
    return {
        "prompt": entry["prompt"],
        "constraints": [c for c in constraints if c["type"] not in UNSEEN],
        "unseen": [c for c in constraints if c["type"] in UNSEEN],
    }


def held_out(row: dict[str, Any]) -> bool:
    first = hashlib.sha256(row["prompt"].encode()).digest()[0]
    return bool(row["unseen"]) or first % HELDOUT_OF_TRAINED == 0


def main() -> None:
    given = arguments(__doc__).parse_args()
    try:
        [path] = find("ifeval", given.data)
    except SourceError as error:
        sys.exit(str(error))
    rows = [row for line in path.read_text(encoding="utf-8").splitlines() if (row := row_of(json.loads(line)))]
    given.out.mkdir(parents=True, exist_ok=True)
    for file, wanted in (("prompts", False), ("heldout", True)):
        own = [row for row in rows if held_out(row) == wanted]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own)
        (given.out / f"{file}.jsonl").write_text(text, encoding="utf-8")
        print(f"{file}.jsonl: {len(own)} prompts, {sum(bool(r['unseen']) for r in own)} with types never trained on")
    for name in ("tao.yaml", "constraints.py"):
        shutil.copy(HERE / name, given.out / name)


if __name__ == "__main__":
    main()
