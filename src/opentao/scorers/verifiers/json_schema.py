"""`json_schema`: is the answer a JSON value that meets a schema?

Threat model: the answer is read by a strict parser with limits of depth and digits; nothing is fetched. What the schema
leaves open, an answer may fill with anything.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic.dataclasses import dataclass

from opentao.scorers.verifiers.base import ARGS, Verifier
from opentao.scorers.verifiers.strict_json import JsonSchemaSource, build_validator, is_valid, parse_json
from opentao.types import Prompt, Response


@dataclass(kw_only=True, config=ARGS)
class JsonSchema(Verifier):
    """1.0 if the whole answer is JSON that meets `schema`, else 0.0. Text after (or before) the JSON is not valid.

    `schema` is the schema or the path of its file. `fences`: a Markdown code fence around the whole answer is allowed.
    `partial` grades what is not valid, for a policy that is far from it:

    * 0.0: the answer does not start with ``{`` or ``[``;
    * 0.1: it does, but is not JSON;
    * 0.4 + 0.5 · share: it is JSON, where `share` is the part of the names in the schema's own top-level `required`
      that are present with a value that meets their schema in `properties` (0 if there are none, or for an array).

    So 0.9 is the most for an answer that breaks another rule (an extra property, say): only a valid answer has 1.0.
    `format` is not checked, as the JSON Schema standard has it.
    """

    schema: JsonSchemaSource
    partial: bool = False
    fences: bool = False
    _validator: Any = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._validator = build_validator(self.schema)

    def rate(self, prompt: Prompt, response: Response) -> float:
        starts = response.text.lstrip(" \t\r\n").startswith(("{", "["))
        try:
            value = parse_json(response.text, fences=self.fences)
        except ValueError:
            return 0.1 if self.partial and starts else 0.0
        if is_valid(self._validator, value):
            return 1.0
        if not self.partial or not isinstance(value, dict | list):
            return 0.0
        return 0.4 + 0.5 * self._share(value)

    def _share(self, value: dict[str, Any] | list[Any]) -> float:
        required = self._validator.schema.get("required", [])
        if not required or not isinstance(required, list) or not isinstance(value, dict):
            return 0.0
        return sum(self._has(value, name) for name in required) / len(required)

    def _has(self, value: dict[str, Any], name: str) -> bool:
        subschema = self._validator.schema.get("properties", {}).get(name, True)
        return name in value and not any(self._validator.descend(value[name], subschema))
