"""Hold some prompts out, so that no near-copy of them is trained on.

`split` is a function of the prompts' contents: the order of the file, the machine and the random state do not matter.

Left out: near-duplicates by embedding (needs a model, and the word test catches the copies and templates that leak
in practice), approximate MinHash (the exact join is fast enough). Shown by ``pytest tests/test_prompts.py``.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opentao.config import PromptsConfig
from opentao.errors import DataError
from opentao.prompts import counted
from opentao.types import Prompt, content_hash


@dataclass(kw_only=True, slots=True, frozen=True)
class Split:
    """Prompts to train on and prompts never trained on, each in the order of their ids."""

    train: list[Prompt]
    heldout: list[Prompt]


def split(prompts: Sequence[Prompt], config: PromptsConfig) -> Split:
    """Hold out about `heldout_fraction` of the clusters of near-duplicates, whole, by hash.

    A cluster's place in [0, 1) is the hash of the smallest id in it; places below `heldout_fraction` are held out, and
    at least one cluster goes to each side. (The smallest id itself would be a biased place: the more prompts in a
    cluster, the lower it is, and the held-out side would be full of large clusters.) With `split_by`, clusters that
    share a value of that meta entry are one. Then the caps keep the first prompts of each side by id; a held-out prompt
    over the cap is not used at all.

    Raises:
        DataError: fewer than two clusters, or a prompt without the entry that `split_by` names.
    """
    found = clusters(prompts, config)
    if len(found) < 2:
        counts = f"{counted(len(prompts), 'prompt')} in {counted(len(found), 'cluster')}"
        raise DataError(
            f"{config.path}: {counts} of near-duplicates;"
            " expected at least 2, one to train on and one to hold out (prompts.near_duplicate"
            f"{' and prompts.split_by set' if config.split_by else ' sets'} what counts as one)"
        )
    train, heldout = map(_by_id, hold_out(found, config.heldout_fraction))
    return Split(train=train[: config.max_train], heldout=heldout[: config.max_heldout])


def hold_out(clusters: Sequence[list[Prompt]], share: float) -> tuple[list[list[Prompt]], list[list[Prompt]]]:
    """(the others, held out): about `share` of the clusters, by hash. Of two or more at least one on each side."""
    found = sorted(clusters, key=_place)
    cut = min(max(sum(_place(cluster) < share for cluster in found), 1), len(found) - 1)
    return found[cut:], found[:cut]


def split_given(prompts: Sequence[Prompt], heldout: Sequence[Prompt], config: PromptsConfig) -> Split:
    """Hold out the given prompts, and train on those of the others that are in no cluster with one of them.

    Raises:
        DataError: nothing is left to train on, or there is nothing to hold out.
    """
    ids = {p.id for p in heldout}
    both = [*heldout, *(p for p in prompts if p.id not in ids)]
    train = _by_id([cluster for cluster in clusters(both, config) if not ids & {p.id for p in cluster}])
    if not heldout or not train:
        raise DataError(
            f"{config.path}: of {counted(len(prompts), 'prompt')} {len(train)} are unlike all of"
            f" {counted(len(heldout), 'prompt')} in {config.heldout_path}; expected at least 1 of each"
        )
    return Split(train=train[: config.max_train], heldout=_by_id([heldout])[: config.max_heldout])


def clusters(prompts: Sequence[Prompt], config: PromptsConfig) -> list[list[Prompt]]:
    """Prompts that are not independent of each other: near-duplicates, and those that `split_by` puts together.

    Raises:
        DataError: a prompt without the entry that `split_by` names.
    """
    alike = near_duplicates(prompts, config.near_duplicate)
    files = " or ".join(path for path in (config.path, config.heldout_path) if path)
    return alike if config.split_by is None else _joined_by(alike, config.split_by, files)


def _joined_by(clusters: Sequence[list[Prompt]], entry: str, path: str) -> list[list[Prompt]]:
    """Clusters that share a value of the meta entry, put together."""
    parents, first = list(range(len(clusters))), dict[str, int]()
    for item, cluster in enumerate(clusters):
        for prompt in cluster:
            if entry not in prompt.meta:
                raise DataError(
                    f"{path}: prompts.split_by: {entry!r} is not in the meta of the prompt that begins with"
                    f" {prompt.text[:60]!r}, which has {', '.join(sorted(prompt.meta)) or 'none'}"
                )
            other = first.setdefault(json.dumps(prompt.meta[entry], sort_keys=True), item)
            parents[_root(parents, item)] = _root(parents, other)
    joined: dict[int, list[Prompt]] = defaultdict(list)
    for item, cluster in enumerate(clusters):
        joined[_root(parents, item)] += cluster
    return list(joined.values())


def _place(cluster: Sequence[Prompt]) -> float:
    return int(content_hash("split", min(p.id for p in cluster)), 16) / 16**16


def _by_id(clusters: Sequence[Sequence[Prompt]]) -> list[Prompt]:
    return sorted((prompt for cluster in clusters for prompt in cluster), key=lambda p: p.id)


def near_duplicates(prompts: Sequence[Prompt], threshold: float) -> list[list[Prompt]]:
    """Clusters of prompts, joined wherever two have a Jaccard similarity >= `threshold`. Exact, in any order.

        J(a, b) = |a and b| / |a or b|  over the sets of 3-word shingles of the users' turns

    Prefix filter: order shingles from rare to common; two sets with J >= t share at least ceil(t·max size) shingles, so
    they share one of the first size - ceil(t·size) + 1 of each. Only such pairs are compared. The system turn is left
    out, because all prompts of an application have the same one.

    Source: Bayardo, Ma & Srikant 2007, "Scaling up all pairs similarity search", section 4.
    """
    members: dict[bytes, list[int]] = defaultdict(list)  # equal sets are one item
    sets = _ranked_shingles([_user_text(p) for p in prompts])
    for index, shingles in enumerate(sets):
        members[shingles.tobytes()].append(index)
    ordered = sorted(members.values(), key=lambda same: len(sets[same[0]]))
    parents = _join([sets[same[0]] for same in ordered], threshold)
    clusters: dict[int, list[Prompt]] = defaultdict(list)
    for item, same in enumerate(ordered):
        clusters[_root(parents, item)] += [prompts[index] for index in same]
    return list(clusters.values())


def _user_text(prompt: Prompt) -> str:
    return "\n".join(str(m["content"]) for m in prompt.messages if m["role"] == "user")


def _ranked_shingles(texts: Sequence[str]) -> list[NDArray[np.int64]]:
    """Each text's shingles as sorted numbers, 0 = the rarest of all."""
    if not texts:
        return []
    vocabulary: dict[str, int] = {}
    sets = [_shingles(text, vocabulary) for text in texts]
    _, inverse, counts = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
    ranks = np.empty(len(counts), dtype=np.int64)
    ranks[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    return [np.sort(part) for part in np.split(ranks[inverse], np.cumsum([len(s) for s in sets])[:-1])]


def _shingles(text: str, vocabulary: dict[str, int]) -> NDArray[np.int64]:
    """Distinct runs of 3 words, or the words of a shorter text, as numbers. No words (say "??"): the text is the word.

    Three word numbers of 21 bits make one of 63: exact up to 2 million different words, practically so beyond.
    """
    words = re.findall(r"\w+", text.lower()) or [text.strip()]
    ids = np.array([vocabulary.setdefault(word, len(vocabulary)) for word in words], dtype=np.int64)
    if len(ids) < 3:
        return np.unique(-1 - ids)
    return np.unique((ids[:-2] << 42) + (ids[1:-1] << 21) + ids[2:])


def _join(sets: Sequence[NDArray[np.int64]], threshold: float) -> list[int]:
    """Union-find parents of sets that are ordered by size and differ.

    A smaller set is looked up under a shorter prefix: its partner is at least as large, so they must share
    ceil(2t/(1+t)·size). Candidates are kept by cluster: thousands of copies of a template are passed over in one step.
    """
    parents = list(range(len(sets)))
    shared = np.bincount(np.concatenate(sets)) > 1 if sets else np.array([])  # a shingle of one set finds nobody
    seen: dict[int, dict[int, set[int]]] = defaultdict(dict)  # shingle -> cluster -> smaller sets that start with it
    for item, shingles in enumerate(sets):
        own, tried = set(shingles.tolist()), set[int]()
        for shingle in _prefix(shingles, threshold, shared):
            for cluster, others in seen[shingle].items():
                if _root(parents, cluster) == _root(parents, item):
                    continue
                if any(other not in tried and _alike(own, sets[other], threshold) for other in others):
                    parents[_root(parents, item)] = _root(parents, cluster)
                else:
                    tried |= others
        for shingle in _prefix(shingles, 2 * threshold / (1 + threshold), shared):
            seen[shingle].setdefault(_root(parents, item), set()).add(item)
    return parents


def _prefix(shingles: NDArray[np.int64], share: float, shared: NDArray[np.bool_]) -> list[int]:
    """The rarest shingles, one of which any set with this share of them must have; without those nobody else has."""
    least = math.ceil(share * len(shingles) - 1e-9)  # 0.55 * 100 is a little over 55
    prefix = shingles[: len(shingles) - least + 1]
    own: list[int] = prefix[shared[prefix]].tolist()
    return own


def _alike(own: set[int], other: NDArray[np.int64], threshold: float) -> bool:
    """Jaccard >= threshold; `other` is not the larger one."""
    if len(other) < threshold * len(own) - 1e-9:  # J <= smaller size / larger size
        return False
    common = len(own.intersection(other.tolist()))
    return common / (len(own) + len(other) - common) >= threshold


def _root(parents: list[int], item: int) -> int:
    while parents[item] != item:
        parents[item] = item = parents[parents[item]]  # halve the path on the way
    return item
