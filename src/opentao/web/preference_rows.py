"""From choices to preference files and back: what `tao reward train` reads, with annotator, time and order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from opentao.preferences import Ranking
from opentao.types import Prompt
from opentao.web.choices import Choice, Choices, Item, Kind, item_of


def rankings_of(choices: Choices) -> list[Ranking]:
    """Every standing choice that says something; skips say nothing, and neither does one mark alone."""
    items = {item.id: item for item in choices.items()}
    made = choices.choices()
    found = [r for c in made if c.task.kind != "mark" and (r := _ranking(c, items[c.task.item])) is not None]
    return [*found, *_marked(made, items)]


def _ranking(choice: Choice, item: Item) -> Ranking | None:
    answer, shown = choice.answer, choice.task.shown
    if "skip" in answer:
        return None
    facts = _facts(choice)
    if choice.task.kind == "pair":
        a, b = sorted(shown)
        ranks: tuple[float, ...] = (
            (1.0, 1.0) if "tie" in answer else (1.0, 2.0) if answer["better"] == a else (2.0, 1.0)
        )
        facts |= {"both_bad": True} if answer.get("both_bad") else {}
        return _build(item, (a, b), ranks, choice.task.annotator, facts, ties_equal=True)
    order = answer["order"]
    places = tuple(sorted(shown))
    ranks = tuple(float(order.index(i) + 1 if i in order else len(order) + 1) for i in places)
    return _build(item, places, ranks, choice.task.annotator, facts, ties_equal=False) if len(set(ranks)) > 1 else None


def _marked(made: Sequence[Choice], items: dict[str, Item]) -> Iterator[Ranking]:
    """Right answers before wrong ones of the same prompt and person; nothing is said among the right ones."""
    by_item: dict[tuple[str, str], dict[int, Choice]] = defaultdict(dict)
    for choice in made:
        if choice.task.kind == "mark" and "right" in choice.answer:
            by_item[choice.task.annotator, choice.task.item][choice.task.shown[0]] = choice
    for (annotator, item), marks in by_item.items():
        places = tuple(sorted(marks))
        ranks = tuple(1.0 if marks[i].answer["right"] else 2.0 for i in places)
        if len(set(ranks)) > 1:
            newest = max(marks.values(), key=lambda c: c.time)
            facts = _facts(newest) | {"order": [items[item].responses[i] for i in marks]}
            yield _build(items[item], places, ranks, annotator, facts, ties_equal=False)


def _build(
    item: Item,
    places: tuple[int, ...],
    ranks: tuple[float, ...],
    annotator: str,
    facts: dict[str, Any],
    *,
    ties_equal: bool,
) -> Ranking:
    return Ranking(
        prompt=Prompt(messages=item.messages),
        texts=tuple(item.responses[i] for i in places),
        ranks=ranks,
        ties_equal=ties_equal,
        annotator=annotator,
        facts=facts | {"order": _places(facts["order"], places, item)},
    )


def _places(shown: Sequence[Any], places: Sequence[int], item: Item) -> list[int]:
    """`order` of a row: which of its responses stood first, second, and so on."""
    indices = [item.responses.index(s) if isinstance(s, str) else s for s in shown]
    return [places.index(i) for i in indices]


def _facts(choice: Choice) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "time": datetime.fromtimestamp(choice.time, UTC).isoformat(timespec="milliseconds"),
        "order": list(choice.task.shown),
        "id": choice.task.id,
        "policy": choice.task.policy,
    }
    return facts | ({"repeat": True} if choice.task.repeat_of else {})


def import_rankings(choices: Choices, rankings: Sequence[Ranking]) -> int:
    """Add the choices of a preference file; those that are there already (same id) are left. Returns how many came."""
    known = {c.task.id for c in choices.choices()}
    added = 0
    for ranking in [part for r in rankings if r.facts.get("id") not in known for part in _representable(r)]:
        name = ranking.annotator or "import"
        if name not in choices.annotators():
            choices.add_annotator(name)
        item = item_of(ranking.prompt.messages, ranking.texts)
        choices.add_items([item])
        kind, answer = _as_answer(ranking, item)
        order = ranking.facts.get("order")
        places: Sequence[int] = order if order is not None and _is_order(order, ranking) else range(len(ranking.texts))
        shown = dict.fromkeys(item.responses.index(ranking.texts[i]) for i in places)
        task = choices.add_task(name, item.id, kind, list(shown), "import")
        added += choices.choose(task, answer)
    return added


def _representable(ranking: Ranking) -> list[Ranking]:
    """A ranking of more than two with answers that are equally good is taken apart into pairs."""
    if len(ranking.texts) == 2 or not ranking.tied:
        return [ranking]
    return [
        replace(ranking, texts=(ranking.texts[i], ranking.texts[j]), ranks=ranks, facts={})
        for pairs, ranks in ((ranking.pairs, (1.0, 2.0)), (ranking.tied, (1.0, 1.0)))
        for i, j in pairs
    ]


def _is_order(order: Any, ranking: Ranking) -> bool:
    return isinstance(order, list) and sorted(map(str, order)) == sorted(map(str, range(len(ranking.texts))))


def _as_answer(ranking: Ranking, item: Item) -> tuple[Kind, dict[str, Any]]:
    places = [item.responses.index(text) for text in ranking.texts]
    if len(item.responses) == 2 and len(ranking.texts) == 2:
        if ranking.ranks[0] == ranking.ranks[1]:
            return "pair", {"tie": True} | ({"both_bad": True} if ranking.facts.get("both_bad") else {})
        better, worse = places if ranking.ranks[0] < ranking.ranks[1] else places[::-1]
        return "pair", {"better": better, "worse": worse}
    last = max(ranking.ranks)
    order = sorted(range(len(places)), key=lambda i: ranking.ranks[i])
    return "rank", {"order": list(dict.fromkeys(places[i] for i in order if ranking.ranks[i] < last))}
