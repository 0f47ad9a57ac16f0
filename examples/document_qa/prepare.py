"""Questions on passages, without answers to train on: python examples/document_qa/prepare.py --out DIR

* `preferences.jsonl`: qa-feedback, up to four answers to each of 240 questions on Wikipedia passages, ranked by people.
* `prompts.jsonl`, `heldout.jsonl`: XQuAD's English questions. A paragraph is held out, with all its questions, if the
  first byte of its sha256 is below 64; only held-out questions carry their answers, for the audit.

With `--financebench`: `financebench.jsonl`, questions on pages of company filings, for a model of GPU size.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sources import SourceError, arguments, find

HERE = Path(__file__).resolve().parent
ASK = (
    "Read the passage and answer the question in a few words. Then quote the sentence of the passage that says so, in"
    " double quotes.\n\nPassage: {passage}\n\nQuestion: {question}"
)
HELDOUT_BELOW = 64
LONGEST = 800  # characters of a passage that people's choices are trained with
NUM_RANKINGS = 240  # the first by hash: more take hours on two cores


def preferences(path: Path) -> list[dict[str, Any]]:
    """One ranking a question: its answers by the comparisons they won, an equal one counting half; order by hash."""
    opener = gzip.open if path.suffix == ".gz" else open
    rows = []
    with opener(path, "rt", encoding="utf-8") as file:
        for entry in json.load(file):
            passage = " ".join(s for _, *sentences in entry["passages"] for s in sentences)[:LONGEST]
            prompt = ASK.format(passage=" ".join(passage.split()), question=entry["question"])
            texts = [str(entry[f"prediction {i}"]).strip() for i in range(1, 5)]
            wins = dict.fromkeys(texts, 0.0)
            for (i, j), choice in zip(combinations(range(4), 2), entry["preference"], strict=True):
                wins[texts[i]] += {0: 0.5, 1: 1.0, 2: 0.0}[choice]
                wins[texts[j]] += {0: 0.5, 1: 0.0, 2: 1.0}[choice]
            order = sorted(wins, key=lambda text: hashlib.sha256(f"{prompt}{text}".encode()).digest())
            ranks = [1 + sum(other > wins[text] for other in wins.values()) for text in order]
            if len(set(ranks)) > 1:
                rows.append({"prompt": prompt, "responses": order, "ranks": ranks, "ties": "unknown"})
    return sorted(rows, key=lambda row: hashlib.sha256(row["prompt"].encode()).digest())[:NUM_RANKINGS]


def questions(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(to train on, held out); the paragraph's hash is the `document`."""
    sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            digest = hashlib.sha256(paragraph["context"].encode())
            held = digest.digest()[0] < HELDOUT_BELOW
            for qa in paragraph["qas"]:
                row = asked(" ".join(paragraph["context"].split()), qa["question"], digest.hexdigest()[:12])
                if held:
                    row["answers"] = sorted({a["text"] for a in qa["answers"]})
                sides[held].append(row)
    return sides


def filings(path: Path) -> list[dict[str, Any]]:
    """FinanceBench: the pages that hold the evidence, and the question."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        pages = "\n\n".join(e["evidence_text_full_page"] for e in entry["evidence"])
        rows.append(asked(pages, entry["question"], entry["doc_name"]) | {"answers": [entry["answer"]]})
    return rows


def asked(passage: str, question: str, document: str) -> dict[str, Any]:
    """A prompt, what of it is the passage, for the rules, and what it is held out with."""
    return {"prompt": ASK.format(passage=passage, question=question), "passage": passage, "document": document}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--financebench", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[dict[str, Any]]] = {}
    try:
        if given.financebench:
            files["financebench"] = filings(find("financebench", given.data)[0])
        else:
            files["preferences"] = preferences(find("qa-feedback", given.data)[0])
            files["prompts"], files["heldout"] = questions(find("xquad", given.data)[0])
    except SourceError as error:
        sys.exit(str(error))
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (given.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}.jsonl: {len(rows)} rows")
    for path in (*HERE.glob("*.yaml"), HERE / "answers.py"):
        shutil.copy(path, given.out / path.name)


if __name__ == "__main__":
    main()
