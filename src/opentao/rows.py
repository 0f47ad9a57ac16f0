"""Rows: groups laid out one after the other, ``[prompt | response 1 | … | response N]``, each prompt once.

Several groups share a row, and what all their prompts start with (an instruction, examples) stands in it once; a group
over the row's limit is split by responses, the prompt repeated. No tensors here: see `opentao.pack`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

PREFIX = -1  # `group_T` of tokens that all prompts of a row start with
MIN_PREFIX = 16  # tokens from which a common start of prompts is computed once for the row
SEVERAL_ROWS = 4 / 3  # work of a training step whose loss spans several rows: one more forward pass


@dataclass(kw_only=True, slots=True, frozen=True)
class Sequences:
    """Token ids of one prompt and its responses: ``Sequences(prompt_P=(1, 5), responses_NR=((7, 2), (8,)))``."""

    prompt_P: tuple[int, ...]
    responses_NR: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_P) + sum(map(len, self.responses_NR))


@dataclass(slots=True)
class Row:
    """One packed row. `part_T` is 0 on the prompt and i + 1 on the row's i-th response of that group."""

    tokens_T: list[int] = field(default_factory=list)
    positions_T: list[int] = field(default_factory=list)
    group_T: list[int] = field(default_factory=list)
    part_T: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)  # where the prediction of each response token is read
    targets: list[int] = field(default_factory=list)  # the response tokens
    owners: list[tuple[int, int]] = field(default_factory=list)  # (group, response) in row order
    sizes: list[int] = field(default_factory=list)  # tokens of each response in `owners`
    ends: list[int] = field(default_factory=list)  # where the last token of each response in `owners` stands

    def add(self, group: int, sequences: Sequences, responses: Sequence[int], shared: int = 0) -> None:
        """Append one group's prompt, less the `shared` tokens in front of the row, and the chosen responses."""
        P = len(sequences.prompt_P)
        self.extend(sequences.prompt_P[shared:], shared, group, 0)
        before = len(self.tokens_T) - 1  # the prompt's last token
        for part, i in enumerate(responses, 1):
            tokens = sequences.responses_NR[i]
            first = len(self.tokens_T)
            self.extend(tokens, P, group, part)
            self.sources += [before, *range(first, first + len(tokens) - 1)][: len(tokens)]
            self.targets += tokens
            self.owners.append((group, i))
            self.sizes.append(len(tokens))
            self.ends.append(first + len(tokens) - 1 if tokens else before)

    def extend(self, tokens: Sequence[int], position: int, group: int, part: int) -> None:
        self.tokens_T += tokens
        self.positions_T += range(position, position + len(tokens))
        self.group_T += [group] * len(tokens)
        self.part_T += [part] * len(tokens)


def plan_rows(groups: Sequence[Sequences], row_tokens: int) -> list[Row]:
    """`planned_rows`, all at once."""
    return list(planned_rows(groups, row_tokens))


def planned_rows(groups: Sequence[Sequences], row_tokens: int) -> Iterator[Row]:
    """Put groups into rows of at most `row_tokens`, in order; a group that is larger is split by responses.

    A row is built when it is asked for: built, its numbers take many times the memory of the groups' tokens.

    Raises:
        ValueError: a prompt and one response alone are longer than a row.
    """
    rows: list[list[tuple[int, list[int]]]] = []
    room = 0
    for g, sequences in enumerate(groups):
        for part in _split(sequences, row_tokens):
            size = len(sequences.prompt_P) + sum(len(sequences.responses_NR[i]) for i in part)
            if not rows or size > room:
                rows.append([])
                room = row_tokens
            rows[-1].append((g, part))
            room -= size
    yield from (_build_row(groups, parts) for parts in rows)


def _build_row(groups: Sequence[Sequences], parts: Sequence[tuple[int, list[int]]]) -> Row:
    """One row; what all its prompts start with (an instruction, examples) stands in front once, if it is worth it."""
    prompts = [groups[g].prompt_P for g, _ in parts]
    # A group keeps at least one prompt token of its own: the first response token is predicted there.
    shared = min(common_prefix(prompts), min(map(len, prompts)) - 1)
    shared = shared if len(parts) > 1 and shared >= MIN_PREFIX else 0
    row = Row()
    row.extend(prompts[0][:shared], 0, PREFIX, 0)
    for g, part in parts:
        row.add(g, groups[g], part, shared)
    return row


def _split(sequences: Sequences, row_tokens: int) -> Iterator[list[int]]:
    """Runs of response indices that fit a row together with the prompt."""
    part: list[int] = []
    size = len(sequences.prompt_P)
    for i, response in enumerate(sequences.responses_NR):
        if len(sequences.prompt_P) + len(response) > row_tokens:
            raise ValueError(
                f"a prompt of {len(sequences.prompt_P)} and a response of {len(response)} tokens do not fit"
                f" row_tokens = {row_tokens}"
            )
        if part and size + len(response) > row_tokens:
            yield part
            part, size = [], len(sequences.prompt_P)
        part.append(i)
        size += len(response)
    if part:
        yield part


def whole_groups(groups: Sequence[Sequences], row_tokens: int) -> list[list[int]]:
    """Indices of groups that fit one row together, in order; a group that is larger than a row comes alone."""
    batches: list[list[int]] = []
    room = 0
    for i, group in enumerate(groups):
        if not batches or group.num_tokens > room:
            batches.append([])
            room = row_tokens
        batches[-1].append(i)
        room -= group.num_tokens
    return batches


def plain_rows(groups: Sequence[Sequences]) -> Iterator[Row]:
    """The ordinary layout: one response a row, prompt repeated. For models that cannot share prompts."""
    for g, sequences in enumerate(groups):
        for i in range(len(sequences.responses_NR)):
            row = Row()
            row.add(g, sequences, [i])
            yield row


def sharing_pays(group: Sequences, hidden: int) -> bool:
    """False for a short prompt with long responses of very unequal lengths: packed, all are padded to the longest.

    Work is counted in (query, key) pairs of attention; the linear layers of one token cost as much as about 6·hidden
    of them. Plain rows count a third more, since training computes a loss over several rows with one more forward.
    """
    P, lengths = len(group.prompt_P), [len(r) for r in group.responses_NR]
    longest = max(lengths, default=0)
    packed = (P + sum(lengths)) * 6 * hidden + P * P + len(lengths) * longest * (P + longest)
    plain = sum((P + r) * 6 * hidden + (P + r) ** 2 / 2 for r in lengths)
    return packed <= SEVERAL_ROWS * plain


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all sequences share.

    >>> common_prefix([[1, 2, 3], [1, 2, 4, 5]])
    2
    """
    length = 0
    for tokens in zip(*sequences, strict=False):  # the shortest one ends it
        if len(set(tokens)) > 1:
            break
        length += 1
    return length
