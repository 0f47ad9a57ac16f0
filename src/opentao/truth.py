"""Groups of known worth: rows with `prompt` or `messages`, `responses`, and `values`, one number a response."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opentao.errors import DataError
from opentao.preferences import as_object, messages_of, preference_rows
from opentao.types import Prompt


@dataclass(kw_only=True, slots=True, frozen=True)
class Truth:
    """Responses to one prompt whose worth is known: ``Truth(prompt=…, texts=("a", "b"), values=(1.0, 0.0))``"""

    prompt: Prompt
    texts: tuple[str, ...]
    values: tuple[float, ...]  # higher is better


def read_truths(path: Path) -> list[Truth]:
    """Raises DataError with file, line and what was expected."""
    found = []
    for number, row in preference_rows(path):
        try:
            found.append(_truth(row))
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}") from error
    if not found:
        raise DataError(f"{path}: the file is empty")
    return found


def _truth(row: Any) -> Truth:
    row = as_object(row)
    texts, values = row.get("responses"), row.get("values")
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise ValueError("responses: expected a list of texts")
    numbers = isinstance(values, list) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
    if not isinstance(values, list) or not numbers or len(values) != len(texts):
        raise ValueError("values: expected one number for each response")
    prompt = Prompt(messages=tuple(messages_of(row)))
    return Truth(prompt=prompt, texts=tuple(texts), values=tuple(map(float, values)))
