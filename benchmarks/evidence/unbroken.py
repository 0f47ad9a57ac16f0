"""Nothing else broken: general text, tasks that were not trained, and the cost of an answer, before and after.

For the kept policy of a recipe's first seed. General text is Wikipedia: the paragraphs of XQuAD that document_qa holds
out. Other tasks are those of the other recipes, judged by their audits on their held-out prompts; what the base gets
there is in those recipes' own cells.

    python unbroken.py TEXTS MODEL…   one JSON object: for each model the mean log-likelihood a token of each text
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from inference_cost import NUM_WARM, PASSES
from lab import HERE, Facts, Lab, changes, first_tries, made, made_of, summary_of, tao

from opentao.bestofn import bootstrap, paired_difference

BUILT_IN = "smollm2-135m-instruct"
LONGEST = 512  # tokens of a text that are looked at
FEW: Facts = {  # tries, and a reward that costs nothing: only audits are read
    "evaluate.base_group_size": 4,
    "scorers": [{"type": "length", "args": {"min": 1, "max": 1000, "unit": "words"}}],
}


def measure(lab: Lab, names: Sequence[str]) -> None:
    for trained in names:
        run = lab.work / trained / "seed-0"
        if not (run / "summary.json").exists() or (policy := summary_of(run)["policy"]) is None:
            continue  # nothing was kept, so nothing can be broken
        where = str(run / policy)
        recipes = lab.kept("recipes")
        if f"{trained}/0" not in recipes:
            continue
        own = recipes[f"{trained}/0"]["first_tries"]
        lab.cell("inference cost", trained, lambda d=run: _cost(d), [own, PASSES, NUM_WARM])
        texts = made_of(lab.folder("document_qa"))
        lab.cell("general text", trained, lambda p=where: _perplexity(lab, p), [own, texts, LONGEST])
        for other in names:
            if other in (trained, "support_triage") or f"{other}/0" not in recipes:  # the demo has no folder
                continue
            of = [own, recipes[f"{other}/0"]["first_tries"]["base"], FEW]
            directory = lab.work / "unbroken" / f"{trained}-{other}"
            lab.cell(
                "other tasks",
                f"{trained}/{other}",
                lambda o=other, p=where, d=directory: _other(lab, o, p, d),
                of,
                directory,
            )


def _cost(run: Path) -> Facts:
    """Tokens an answer with an interval over prompts; tokens a second of all passes, answers a second at the median."""
    command = [sys.executable, str(HERE / "inference_cost.py"), str(run)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    passes, prompts = found["passes"], len(found["before"]["tokens"])
    return {
        side: {
            "tokens": vars_of(bootstrap(np.array(found[side]["tokens"]) / passes, clusters=found["clusters"])),
            "tokens_per_second": round(sum(found[side]["tokens"]) / sum(found[side]["seconds"]), 1),
            "answers_per_second": round(prompts / float(np.median(found[side]["seconds"])), 3),
            "seconds": found[side]["seconds"],
        }
        for side in ("before", "after")
    }


def _perplexity(lab: Lab, policy: str) -> Facts:
    """Of both; the difference is paired over texts."""
    texts = _paragraphs(lab)
    command = [sys.executable, __file__, str(texts), BUILT_IN, policy]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    before, after = (np.array(found[name]) for name in (BUILT_IN, policy))
    return {
        "texts": len(before),
        "perplexity": {"base": float(np.exp(-before.mean())), "after": float(np.exp(-after.mean()))},
        "nats": vars_of(paired_difference(-after, -before)),
    }


def vars_of(interval: object) -> Facts:
    return {name: getattr(interval, name) for name in ("mean", "low", "high", "n")}


def _paragraphs(lab: Lab) -> Path:
    """Held-out paragraphs of document_qa, one a line."""
    folder = lab.folder("document_qa")

    def write(out: Path) -> None:
        rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text("utf-8").splitlines()]
        texts = {
            row["document"]: row["prompt"].partition("Passage: ")[2].partition("\n\nQuestion: ")[0] for row in rows
        }
        (out / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts.values()))

    return made(lab.work / "general", [made_of(folder)], write) / "texts.jsonl"


def _other(lab: Lab, other: str, policy: str, directory: Path) -> Facts:
    """The other recipe's held-out prompts, with few tries: the tuned policy's audit beside its base's own."""
    folder = lab.folder(other)
    given = [f"--set={change}" for change in changes(FEW | {"model": policy})]
    tao("predict", "tao.yaml", "--run", str(directory), *given, cwd=folder)
    base = lab.kept("recipes")[f"{other}/0"]["first_tries"]["base"]
    after, before = audits(first_tries(directory, 0)), audits(base)
    shared = [key for key in after if before.get(key) is not None and after[key] is not None]
    values = [[side[key] for key in shared] for side in (before, after)]
    belongs = dict(zip(base["id"], base.get("db_id") or base.get("document") or base["id"], strict=True))
    clusters = [belongs[key] for key in shared]
    spent = json.loads((directory / "round-0" / "eval.json").read_text())
    return {
        "before": vars_of(bootstrap(values[0], clusters=clusters)),
        "after": vars_of(bootstrap(values[1], clusters=clusters)),
        "change": vars_of(paired_difference(values[1], values[0], clusters=clusters)),
        "seconds": spent["seconds"],
        "tokens": spent["tokens"],
    }


def audits(tries: Facts) -> dict[str, float | None]:
    return dict(zip(tries["id"], tries["audit"], strict=True))


def likelihoods(texts: Sequence[str], model: str) -> list[float]:
    """[texts] mean log-likelihood a token, in nats."""
    import torch

    from opentao.models import load_model

    policy, tokenizer = load_model(model, dtype=torch.float32)
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)[:LONGEST]])
        with torch.no_grad():
            found.append(-policy(input_ids=ids, labels=ids).loss.item())
    return found


if __name__ == "__main__":
    given = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    print(json.dumps({model: likelihoods(given, model) for model in sys.argv[2:]}))
