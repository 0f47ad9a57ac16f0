"""`json_field`: does one field of a JSON answer hold the label?

Threat model: as for `json_schema`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic.dataclasses import dataclass

from opentao.scorers.verifiers.base import ARGS, Verifier, meta_value
from opentao.scorers.verifiers.strict_json import JsonSchemaSource, build_validator, is_valid, json_equal, parse_json
from opentao.types import Prompt, Response


@dataclass(kw_only=True, config=ARGS)
class JsonField(Verifier):
    """1.0 if the answer is a JSON object whose `field` equals ``prompt.meta[key]``, else 0.0.

    With `schema` (or the path of its file) the answer must also meet it. Invalid JSON is a wrong answer: 0.0; a prompt
    without the label is unscored. Values are compared as JSON: 1 equals 1.0, and neither equals "1" or true.
    A label that is text, as all are that come from CSV, may also be the text of a number or of true and false.
    """

    field: str
    key: str
    schema: JsonSchemaSource | None = None
    fences: bool = False
    _validator: Any = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._validator = None if self.schema is None else build_validator(self.schema)

    def rate(self, prompt: Prompt, response: Response) -> float:
        expected = meta_value(prompt, self.key)
        try:
            answer = parse_json(response.text, fences=self.fences)
        except ValueError:
            return 0.0
        if not isinstance(answer, dict) or self.field not in answer:
            return 0.0
        if self._validator is not None and not is_valid(self._validator, answer):
            return 0.0
        value = answer[self.field]
        if isinstance(expected, str) and isinstance(value, int | float):  # bool is one
            try:
                expected = parse_json(expected.strip().lower())
            except ValueError:
                return 0.0
        return float(json_equal(value, expected))
