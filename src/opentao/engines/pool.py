"""Keys and values of prompts of like length, side by side, so that one product serves all their responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True, eq=False)
class Place:
    """Where the keys and values of one prompt lie, and how many rows continue it."""

    pool: PromptPool
    index: int
    length: int  # tokens after the root
    num_rows: int = 0


@dataclass(slots=True, eq=False)
class PromptPool:
    """Prompts of like length: keys and values of each layer, the first `len(places)` of the capacity in use.

    Keys lie transposed, as the product with queries reads them fastest: [capacity, Hk, D, width]; values
    [capacity, Hk, width, D].
    """

    width: int
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    longest: int = 0
    bias: Tensor | None = None  # [places, 1, 1, longest]: −inf behind a prompt's end; None: all are equally long

    def add(self, layers: Sequence[Any], row: int, length: int, start: int) -> Place:
        """Copy one row of a transformers cache: its first `start` tokens and its last `length`."""
        place = Place(self, len(self.places), start + length)
        self.places.append(place)
        for i, layer in enumerate(layers):
            for kept, new in ((self.k, layer.keys[row].transpose(1, 2)), (self.v, layer.values[row])):
                axis = 2 if kept is self.k else 1
                if len(kept) == i:
                    shape = list(new.shape)
                    shape[axis] = self.width
                    kept.append(new.new_zeros(1, *shape))
                elif len(kept[i]) < len(self.places):
                    kept[i] = torch.cat([kept[i], torch.zeros_like(kept[i])])
                here, end = kept[i][place.index], new.shape[axis]
                here.narrow(axis, 0, start).copy_(new.narrow(axis, 0, start))
                here.narrow(axis, start, length).copy_(new.narrow(axis, end - length, length))
        self._set_bias()
        return place

    def remove(self, place: Place) -> None:
        """The last prompt takes the place of one that is gone."""
        last = self.places.pop()
        if last is not place:
            for x in (*self.k, *self.v):
                x[place.index] = x[last.index]
            self.places[place.index], last.index = last, place.index
        self._set_bias()

    def _set_bias(self) -> None:
        lengths = torch.tensor([place.length for place in self.places], device=self.k[0].device)
        self.longest = max((place.length for place in self.places), default=0)
        hidden = torch.arange(self.longest, device=lengths.device) >= lengths[:, None]
        bias = torch.zeros(hidden.shape, device=lengths.device).masked_fill_(hidden, float("-inf"))
        self.bias = bias[:, None, None] if any(place.length < self.longest for place in self.places) else None


def pool_width(length: int) -> int:
    """Prompts are padded to this: multiples of 16, of about an eighth of the length for long ones.

    >>> [pool_width(length) for length in (5, 62, 842, 3000)]
    [16, 64, 896, 3072]
    """
    step = max(16, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step
