"""Which names of a checkpoint to change, so that it fits.

A guess is tried before it is believed: the checkpoint is renamed in memory,
and what does not fit is counted again.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection, Iterator, Mapping

from dtrain.bundle.problems import Problems, find_problems
from dtrain.bundle.tree import Tree
from dtrain.errors import UserError

# To try one takes milliseconds, and a tenth of a second in a large network; the
# best of a round is kept.
_MAX_TRIES = 60
_MAX_ROUNDS = 5
_Kind = tuple[tuple[str, tuple[int, ...]], ...]


def find_renames(have: Tree, want: Tree, problems: Problems) -> dict[str, str]:
    """Finds renames after which less is wrong: round by round the best one."""
    renames: dict[str, str] = {}
    fewest = len(problems)
    candidates = list(
        itertools.islice(_candidates(have, want, problems), _MAX_TRIES)
    )
    for _ in range(_MAX_ROUNDS):
        best: dict[str, str] | None = None
        for candidate in candidates:
            number = _tried(have, want, renames, candidate)
            if number is not None and number < fewest:
                best, fewest = candidate, number
            if not fewest:
                break
        if best is None:
            break
        renames = {**renames, **best}
        if not fewest:
            break
    return _needed(have, want, renames, fewest)


def _tried(
    have: Tree,
    want: Tree,
    renames: Mapping[str, str],
    candidate: Mapping[str, str],
) -> int | None:
    """Counts what would not fit; None if it cannot be renamed like that."""
    new = {*renames.values()} & {*candidate.values()}
    if new or renames.keys() & candidate.keys():
        return None
    try:
        tried = have.renamed({**renames, **candidate})
    except UserError:
        return None
    return len(find_problems(tried, want))


def _needed(
    have: Tree, want: Tree, renames: dict[str, str], number: int
) -> dict[str, str]:
    """Leaves out renames that change nothing, now that there are later ones."""
    for old in list(renames):
        fewer = {name: new for name, new in renames.items() if name != old}
        rest = _tried(have, want, fewer, {})
        if rest is not None and rest <= number:
            renames = fewer
    return renames


def _candidates(
    have: Tree, want: Tree, problems: Problems
) -> Iterator[dict[str, str]]:
    """Yields renames that may repair something, the likeliest first."""
    bad = {*problems.missing, *problems.shapes}
    bad |= {*problems.dtypes, *problems.others}
    targets = _inside(bad, want)
    mixed = {name for pair in problems.others.values() for name in pair}
    sources = _inside({*problems.left_over, *mixed, *(bad & set(have))}, have)
    pairs = []
    for target, source in itertools.product(targets, sources):
        if source != target and targets[target] == sources[source]:
            close = difflib.SequenceMatcher(None, source, target).ratio()
            pairs.append((target.count("/"), -close, source, target))
    pairs.sort()
    # Objects of other contents, as two optimizers, or one with less below it.
    tops = {
        name.partition("/")[0] for name in {*bad, *problems.left_over, *mixed}
    }
    for one, two in itertools.combinations(sorted(tops & {*have.places}), 2):
        yield {one: two, two: one}
    for *_, source, target in pairs:
        yield {source: target}
        if sources.get(target) == targets.get(source, sources.get(target)):
            yield {source: target, target: source}
    for one, two in itertools.product(
        sorted(set(have.top()) - set(want.top())),
        sorted(set(want.top()) - set(have.top())),
    ):
        yield {one: two}


def _inside(names: Collection[str], tree: Tree) -> dict[str, _Kind]:
    """Finds the objects of which all tensors are among these."""
    return {
        place: _kind(tree, place)
        for place in tree.places
        if set(tree.below(place)) <= set(names)
    }


def _kind(tree: Tree, top: str) -> _Kind:
    """Describes what is below a name, whatever it is called above."""
    own = [name for name in tree.below(top) if name not in tree.slots]
    return tuple((name[len(top) :], tree[name].shape) for name in own)
