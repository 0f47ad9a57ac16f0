"""From choices to preference files and back: what `tao reward train` reads, with annotator, time and order."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from opentao.preferences import Ranking
from opentao.types import Prompt, content_hash
from opentao.web.choices import Choice, Choices, Item, Kind, Task, item_of


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
        return _build(item, (a, b), ranks, choice.task, facts, ties_equal=True)
    order = answer["order"]
    places = tuple(sorted(shown))
    ranks = tuple(float(order.index(i) + 1 if i in order else len(order) + 1) for i in places)
    return _build(item, places, ranks, choice.task, facts, ties_equal=False) if len(set(ranks)) > 1 else None


def _marked(made: Sequence[Choice], items: dict[str, Item]) -> Iterator[Ranking]:
    """Right answers before wrong ones of the same prompt and person; nothing is said among the right ones."""
    by_item: dict[tuple[str, str], dict[int, Choice]] = defaultdict(dict)
    for choice in made:
        if choice.task.kind == "mark" and "right" in choice.answer:
            by_item[choice.task.annotator, choice.task.item][choice.task.shown[0]] = choice
    for (_, item), marks in by_item.items():
        places = tuple(sorted(marks))
        ranks = tuple(1.0 if marks[i].answer["right"] else 2.0 for i in places)
        if len(set(ranks)) > 1:
            newest = max(marks.values(), key=lambda c: c.time)
            facts = _facts(newest) | {"order": [items[item].responses[i] for i in marks]}
            yield _build(items[item], places, ranks, newest.task, facts, ties_equal=False)


def _build(
    item: Item,
    places: tuple[int, ...],
    ranks: tuple[float, ...],
    task: Task,
    facts: dict[str, Any],
    *,
    ties_equal: bool,
) -> Ranking:
    return Ranking(
        prompt=Prompt(messages=item.messages),
        texts=tuple(item.responses[i] for i in places),
        ranks=ranks,
        ties_equal=ties_equal,
        annotator=task.annotator,
        facts=facts | {"order": _places(facts["order"], places, item)},
        **task.extra,
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
    """Add the choices of a preference file; those that are there already are left. Returns how many came.

    There already: the `id` of a choice of that person among those answers or, without an id, the same prompt, answers,
    ranks and annotator. A file that says the same n times counts n times.
    """
    first: dict[tuple[str, str, tuple[int, ...]], str] = {}  # what a repeat repeats
    there_already = [_is_there(choices, ranking) for ranking in rankings]  # an export of this very file, too
    added = 0
    for key, ranking in _named(rankings, there_already):
        name = ranking.annotator or "import"
        if name not in choices.annotators():
            choices.add_annotator(name)
        item = item_of(ranking.prompt.messages, ranking.texts)
        choices.add_items([item])
        kind, answer = _as_answer(ranking, item)
        order = ranking.facts.get("order")
        places: Sequence[int] = order if order is not None and _is_order(order, ranking) else range(len(ranking.texts))
        shown = tuple(dict.fromkeys(item.responses.index(ranking.texts[i]) for i in places))
        judged = (name, item.id, tuple(sorted(shown)))
        repeated = first.get(judged) if ranking.facts.get("repeat") else None
        there = choices.task(key)
        if there is not None and (there.annotator, there.item, there.kind) != (name, item.id, kind):
            key = f"{key}~{_said(ranking)}"  # another file's choice of that id
        task = choices.add_task(
            name, item.id, kind, shown, "import", repeat_of=repeated, id_=key, extra=_extra(ranking)
        )
        first.setdefault(judged, key)
        added += choices.choose(task, answer, made=_seconds(ranking.facts.get("time")))
    return added


def _said(ranking: Ranking) -> str:
    """Who said what of which answers, whatever their order."""
    placed = sorted(zip(ranking.texts, ranking.ranks, strict=True))
    return content_hash(list(ranking.prompt.messages), placed, ranking.ties_equal, ranking.annotator, _extra(ranking))


def _extra(ranking: Ranking) -> dict[str, Any]:
    """What a row may say beside the choice, where it does."""
    unsaid = {"instruction": "", "margin": 1.0, "subset": ""}
    return {name: value for name in unsaid if (value := getattr(ranking, name)) != unsaid[name]}


def _is_there(choices: Choices, ranking: Ranking) -> bool:
    """Whatever was chosen since: what was taken back does not come back with an earlier export."""
    id_ = ranking.facts.get("id")
    task = choices.task(id_) if isinstance(id_, str) else None
    if task is None or task.annotator != (ranking.annotator or "import") or not choices.was_answered(task.id):
        return False  # without an answer: a kill came between the two
    item = choices.item(task.item)
    return item.messages == ranking.prompt.messages and set(ranking.texts) <= set(item.responses)


def _named(rankings: Sequence[Ranking], leave: Sequence[bool]) -> Iterator[tuple[str, Ranking]]:
    """What can be stored of the rankings, each with the id of its task; those to `leave` count for the ids only."""
    seen: Counter[str] = Counter()
    for ranking, left in zip(rankings, leave, strict=True):
        id_ = ranking.facts.get("id")
        if not isinstance(id_, str):
            said = (ranking.texts, ranking.ranks, ranking.ties_equal, ranking.annotator, *_extra(ranking).items())
            id_ = content_hash(list(ranking.prompt.messages), *said)
        seen[id_] += 1
        id_ += f"#{seen[id_]}" if seen[id_] > 1 else ""
        if left:
            continue
        parts = _representable(ranking)
        yield from ((id_ if part is ranking else f"{id_}/{n}", part) for n, part in enumerate(parts))


def _representable(ranking: Ranking) -> list[Ranking]:
    """The ranking, or its pairs if it has equal ranks above the last: a task to rank has no place for those."""
    texts, ranks = ranking.texts, ranking.ranks
    above = [rank for rank in ranks if rank < max(ranks)]
    whole = len(set(above)) == len(above) and not ranking.tied if len(texts) > 2 else len(set(texts)) == 2
    if whole:
        return [ranking]
    said = {
        ((texts[i], texts[j]), ranks_of_two)
        for pairs, ranks_of_two in ((ranking.pairs, (1.0, 2.0)), (ranking.tied, (1.0, 1.0)))
        for i, j in pairs
        if texts[i] != texts[j]
    }
    facts = {name: value for name, value in ranking.facts.items() if name not in ("order", "id", "repeat")}
    return [replace(ranking, texts=two, ranks=ranks_of_two, facts=facts) for two, ranks_of_two in sorted(said)]


def _seconds(time: Any) -> float | None:
    """Since 1970; None: no time, or not one in ISO 8601."""
    try:
        return datetime.fromisoformat(time).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def _is_order(order: Any, ranking: Ranking) -> bool:
    return isinstance(order, list) and sorted(order) == list(range(len(ranking.texts)))


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
