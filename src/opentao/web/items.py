"""What there is to judge: the groups of a run directory, or rows of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opentao.errors import DataError
from opentao.preferences import as_object, is_unicode, messages_of, preference_rows
from opentao.store import Run, table_to_groups
from opentao.types import Message
from opentao.web.choices import Item, item_of


def read_items(source: Path) -> tuple[list[Item], int]:
    """Prompts with at least two different answers, and how many have none to choose between.

    The same prompt and answers twice are one.

    Raises:
        DataError: nothing to judge there; what was expected.
    """
    found = [item_of(messages, texts) for messages, texts in (_of_run if source.is_dir() else _of_file)(source)]
    items = list({item.id: item for item in found if len(item.responses) > 1}.values())
    if not items:
        raise DataError(f"{source}: no prompt with at least two different answers")
    return items, sum(len(item.responses) < 2 for item in found)


def _of_run(source: Path) -> Iterator[tuple[list[Message], list[str]]]:
    """Groups of all rounds, the newest first: people should judge what the policy says now.

    Not those of held-out prompts (``round-K/eval/groups``): what is learnt from choices must not know them.
    """
    with Run(source, read_only=True) as run:
        names = [n for n in run.names("round-") if n.split("/")[1] == "groups"]
        if not names and any("/eval/groups/" in n for n in run.names("round-")):
            raise DataError(
                f"{source}: holds answers to held-out prompts only, which nobody may choose among if the run is to be"
                " judged by them; sample others with `tao generate`"
            )
        for name in sorted(names, key=_newest_first):
            for group in table_to_groups(run.read_table(name)):
                yield list(group.prompt.messages), [r.text for r in group.responses]


def _newest_first(name: str) -> tuple[int, str]:
    return -int(name.removeprefix("round-").partition("/")[0]), name


def _of_file(source: Path) -> Iterator[tuple[list[Message], list[str]]]:
    for number, row in preference_rows(source):
        try:
            yield _row(row)
        except ValueError as error:
            raise DataError(f"{source}:{number}: {error}") from error


def _row(row: Any) -> tuple[list[Message], list[str]]:
    row = as_object(row)
    texts = row.get("responses")
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise ValueError("responses: expected a list of texts")
    messages = messages_of(row)
    if not is_unicode([*texts, *(m["content"] for m in messages)]):
        raise ValueError("not valid Unicode: the file must be UTF-8, without lone surrogates")
    return messages, texts
