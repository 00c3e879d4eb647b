"""Patterns of order: entries of an axis moved, repeated or exchanged, and axes read in another order."""

import itertools
from collections.abc import Iterator
from functools import partial

import numpy as np

from assay.golden.fitting import ENOUGH, LISTED, Array, Pattern, Seen
from assay.golden.places import NOUNS, placed

LARGEST_MATCH = 4096  # entries of an axis that are matched with one another


def orders(seen: Seen) -> Iterator[Pattern]:
    """Entries of an axis in another order, or some of them in place of others."""
    for axis, letter in enumerate(seen.axes):
        n = seen.expected.shape[axis]
        if not 1 < n <= LARGEST_MATCH or seen.expected.size < ENOUGH * n:
            continue
        source = _matched(seen, axis)
        if source is None:
            continue
        moved = np.flatnonzero(source != np.arange(n))
        name, words = _order_named(source, moved, letter)
        sentence = f"{NOUNS[letter]}s {words}"
        parameters = {"axis": letter, "places": moved.tolist()[:LISTED], "source": source[moved].tolist()[:LISTED]}
        yield Pattern(f"{name} along {letter}", sentence, parameters, partial(np.take, indices=source, axis=axis))


def _matched(seen: Seen, axis: int) -> Array | None:
    """For each entry of an axis the expected one that it is nearest to; None if it is each time its own."""
    others = [places for i, places in enumerate(seen.affected) if i != axis]
    pick = np.ix_(np.arange(seen.expected.shape[axis]), *others)
    e, g = (np.moveaxis(x, axis, 0)[pick].reshape(x.shape[axis], -1) for x in (seen.expected, seen.got))
    distance = np.sum(e * e, axis=1)[None] - 2 * g @ e.T
    own = np.arange(len(e))
    source = own.copy()
    nearest = distance.argmin(axis=1)
    # an entry that is near enough to its own stays: some may be equal
    equal = 16 * g.shape[1] * seen.level**2
    is_off = np.sum((g - e) ** 2, axis=1) > equal
    source[is_off] = nearest[is_off]
    # of entries that are equal, as rows of the same token, take the one that keeps the order of most
    steps, counts = np.unique((own - source)[is_off] % len(own), return_counts=True)
    if len(steps):
        usual = (own - steps[counts.argmax()]) % len(own)
        as_good = (is_off | (2 * is_off.sum() > len(own))) & (np.sum((g - e[usual]) ** 2, axis=1) <= equal)
        source[as_good] = usual[as_good]
    return None if np.array_equal(source, own) else source


def _order_named(source: Array, moved: Array, letter: str) -> tuple[str, str]:
    """What kind of order this is, and in words."""
    n = len(source)
    own = np.arange(n)
    steps = np.unique(moved - source[moved])
    if len(np.unique(source)) == n:
        if np.array_equal(source, own[::-1]):
            return "reversal", "in reverse"
        if len(k := np.unique((own - source) % n)) == 1:
            by = int(k[0]) if k[0] <= n // 2 else int(k[0]) - n
            return "rotation", f"moved on by {by}, the end going round to the beginning"
        for size in (s for s in range(2, n + 1, 2) if n % s == 0):
            inner = np.arange(size)
            for words, order in (
                ("neighbours exchanged", inner ^ 1),
                ("halves exchanged", np.roll(inner, size // 2)),
                ("laid out in turn where halves are expected", inner.reshape(2, -1).T.ravel()),
                ("laid out as halves where they should be in turn", inner.reshape(-1, 2).T.ravel()),
                ("in reverse", inner[::-1]),
            ):
                if np.array_equal(source, (own // size) * size + order[own % size]):
                    return "order", words + (f" within each {size}" if size < n else "")
        if len(moved) == 2:
            return "exchange", f"{moved[0]} and {moved[1]} exchanged"
        return "order", f"in another order: {_pairs(source, moved)}"
    turns = next((k for k in range(2, n // 2 + 1) if n % k == 0 and np.array_equal(source, own % k)), None)
    if turns is not None:
        return "turns", f"hold the first {turns} by turns"
    if len(steps) == 1:
        by = int(steps[0])
        side = "before" if by > 0 else "after"
        return "shift", f"{placed(moved, n)} hold what belongs {abs(by)} {side}"
    if len(set(source[moved])) == 1 and len(moved) > 1:
        return "repetition", f"{placed(moved, n)} all hold what belongs to {source[moved[0]]}"
    return "map", _pairs(source, moved)


def _pairs(source: Array, moved: Array) -> str:
    shown = ", ".join(f"{i} holds {source[i]}'s" for i in moved[:3])
    return shown + (f" and {len(moved) - 3} more" if len(moved) > 3 else "")


def other_axes(seen: Seen) -> Iterator[Pattern]:
    """The same numbers in a row, taken for a tensor with its axes in another order."""
    shape, letters = seen.expected.shape, seen.axes
    for order in itertools.permutations(range(len(shape))):
        if list(order) == sorted(order):
            continue
        names = "".join(letters[i] for i in order)
        written = lambda x, order=order: x.transpose(order).reshape(shape)  # noqa: E731
        read = lambda x, order=order: (  # noqa: E731
            x.reshape([shape[i] for i in order]).transpose(np.argsort(order))
        )
        parameters = {"axes": letters, "as": names}
        theirs, ours = (f"[{','.join(x)}]" for x in (names, letters))
        yield Pattern("transpose", f"written as {theirs} and read as {ours}", parameters, written)
        yield Pattern("transpose", f"written as {ours} and read as {theirs}", parameters, read)
