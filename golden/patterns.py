"""What could have been done to a tensor: each pattern fitted to what came, to be judged by what it leaves.

A pattern is a change of the whole tensor. It is fitted where the error is and changes nothing elsewhere; the
noisy values go through the same change, so that what it leaves is measured in the noise that it would have.
"""

import math
from collections.abc import Iterator
from functools import partial

import numpy as np

from assay.golden.fitting import ENOUGH, LISTED, SLIGHT, Array, Pattern, Seen
from assay.golden.orders import orders, other_axes
from assay.golden.places import NOUNS, at, numbers, placed
from assay.golden.rounding import round_mantissa


def patterns(seen: Seen) -> Iterator[Pattern]:
    """Every pattern that can be fitted, the plainest first."""
    yield from _factor(seen)
    yield from _offset(seen)
    yield from orders(seen)
    yield from other_axes(seen)
    yield from _factors_along(seen)
    yield from _vectors(seen)
    yield from _rounded(seen)
    yield from _clamped(seen)
    yield from _other_tensors(seen)
    yield from _turned(seen)


def _factor(seen: Seen) -> Iterator[Pattern]:
    e, g = seen.expected[seen.block], seen.got[seen.block]
    a, where = _ratio(e, g), seen.where()
    change = seen.within(lambda x: a * x)
    if not g.any():
        yield Pattern("zero", f"zero{where}", {"factor": 0.0}, seen.within(np.zeros_like))
    elif a is not None and abs(a + 1) < SLIGHT:
        yield Pattern("sign", f"the opposite sign{where}", {"factor": -1.0}, seen.within(np.negative))
    elif a is not None and e.size >= ENOUGH:
        yield Pattern("factor", f"{_called(a, seen)} times what it should be{where}", {"factor": a}, change)


def _offset(seen: Seen) -> Iterator[Pattern]:
    e, g = seen.expected[seen.block], seen.got[seen.block]
    if e.size < 2 * ENOUGH:
        return
    c, where = float(np.mean(g - e)), seen.where()
    yield Pattern("offset", f"{c:.4g} added to every value{where}", {"offset": c}, seen.within(lambda x: x + c))
    centred = e - e.mean()
    if (a := _ratio(centred, g)) is not None:
        b = float(g.mean() - a * e.mean())
        sentence = f"{a:.4g} times what it should be, plus {b:.4g}{where}"
        if abs(a) * float(np.abs(e).max()) < SLIGHT * abs(b):
            sentence = f"{b:.4g} in place of every value{where}"
        yield Pattern("affine", sentence, {"factor": a, "offset": b}, seen.within(lambda x: a * x + b))


def _factors_along(seen: Seen) -> Iterator[Pattern]:
    """A factor for each entry of an axis."""
    e, g = seen.expected[seen.block], seen.got[seen.block]
    for axis, letter in enumerate(seen.axes):
        n = e.shape[axis]
        if n < 2 or e.size < ENOUGH * n:
            continue
        rest = tuple(i for i in range(e.ndim) if i != axis)
        energy = np.sum(e * e, axis=rest, keepdims=True)
        factors = np.where(energy > 0, np.sum(e * g, axis=rest, keepdims=True) / np.where(energy > 0, energy, 1), 1)
        signs = np.round(factors)
        is_sign = bool(np.all(np.abs(factors - signs) < SLIGHT) and np.all(np.abs(signs) == 1))
        factors = signs if is_sign else factors
        places = seen.affected[axis]
        parameters = {"axis": letter, "places": places.tolist()[:LISTED], "factors": factors.ravel().tolist()[:LISTED]}
        change = seen.within(partial(np.multiply, factors))
        if is_sign:
            turned = places[factors.ravel() < 0]
            where = at(letter, turned, seen.expected.shape[axis])
            yield Pattern(f"sign along {letter}", f"the opposite sign at {where}", parameters, change)
            continue
        every = len(places) == seen.expected.shape[axis]
        which = NOUNS[letter] if every else f"of {at(letter, places, seen.expected.shape[axis])}"
        sentence = f"a factor of its own for each {which}: {numbers(factors.ravel())}"
        yield Pattern(f"factor along {letter}", sentence, parameters, change)


def _vectors(seen: Seen) -> Iterator[Pattern]:
    """Something added that is the same at every position, or for every channel of one, or whenever an expert runs."""
    difference = seen.got[seen.block] - seen.expected[seen.block]
    T = max(seen.axes.find("T"), 0)
    where = seen.where()
    if difference.shape[T] >= ENOUGH and difference[0].size > 1:
        mean = difference.mean(axis=T, keepdims=True)
        sentence = f"the same vector added at every position{where}, of size {np.sqrt(np.mean(mean**2)):.3g}"
        yield Pattern("vector", sentence, {"vector": mean.ravel().tolist()[:LISTED]}, seen.within(lambda x: x + mean))
    last = difference.ndim - 1
    if last != T and difference.shape[last] >= ENOUGH and difference.size > difference.shape[last]:
        means = difference.mean(axis=last, keepdims=True)
        sentence = f"one number added to all channels, another at each position{where}: {numbers(means.ravel())}"
        change = seen.within(lambda x: x + means)
        yield Pattern("offset along T", sentence, {"offsets": means.ravel().tolist()[:LISTED]}, change)
    if seen.ids_TA is None or seen.axes not in ("TAF", "TAD"):
        return
    whole = seen.got - seen.expected
    added = np.zeros_like(whole)
    counts = []
    for id in np.unique(seen.ids_TA):
        rows = seen.ids_TA == id
        counts.append(int(rows.sum()))
        added[rows] = whole[rows].mean(axis=0)
    if np.mean(counts) >= ENOUGH:
        sentence = "a vector added that belongs to the expert: a bias missing, doubled or another expert's"
        yield Pattern("vector by expert", sentence, {}, lambda x: x + added)


def _rounded(seen: Seen) -> Iterator[Pattern]:
    """Values that a coarser format holds exactly, where the expected ones do not fit it."""
    g, e = seen.got[seen.block], seen.expected[seen.block]
    for name, bits in (("bfloat16", 7), ("float16", 10)):
        if np.array_equal(_to(g, bits), g) and not np.array_equal(_to(e, bits), e):
            near = np.abs(g - e) <= 2.0**-bits * np.abs(e) + 1e-30  # the neighbour on either side
            rounded = seen.within(partial(_to_or, g, near, bits))
            yield Pattern("rounding", f"every value fits {name}{seen.where()}", {"format": name}, rounded)
            return


def _to_or(got: Array, near: Array, bits: int, x: Array) -> Array:
    """x rounded, or what came where that is near."""
    return np.where(near, got, _to(x, bits))


def _to(x: Array, bits: int) -> Array:
    return round_mantissa(x.astype(np.float32), bits).astype(np.float64)


def _clamped(seen: Seen) -> Iterator[Pattern]:
    """Large values cut to one, or expected so and not cut."""
    for sign in (1, -1):
        top = float((sign * seen.got).max())
        cut = sign * seen.expected > top
        if np.count_nonzero(cut) >= 2:
            words = "above" if sign > 0 else "below"
            change = lambda x, top=top, sign=sign: sign * np.minimum(sign * x, top)  # noqa: E731
            yield Pattern("clamp", f"nothing is {words} {sign * top:.6g}", {"limit": sign * top}, change)
    top = float(np.abs(seen.got).max())
    if np.count_nonzero(np.abs(seen.expected) > top) >= 2:
        yield Pattern("clamp", f"nothing is beyond ±{top:.6g}", {"limit": top}, lambda x: np.clip(x, -top, top))


def _other_tensors(seen: Seen) -> Iterator[Pattern]:
    """What belongs to another tap stands here, or is added or left out."""
    difference = seen.got - seen.expected
    for name, other in seen.others.items():
        if other.shape != seen.expected.shape or not np.isfinite(other).all():
            continue
        replaced = lambda x, other=other: other + (x - seen.expected)  # noqa: E731
        yield Pattern("another tensor", f"the values of {name}", {"tap": name}, replaced)
        a = _ratio(other, difference)
        if a is None or abs(a) < SLIGHT:
            continue
        rounded = float(np.round(a))
        a = rounded if abs(a - rounded) < SLIGHT else a
        words = f"{name} is left out" if a == -1 else f"{name} is added" if a == 1 else f"{a:.4g} times {name} is added"
        added = lambda x, other=other, a=a: x + a * other  # noqa: E731
        yield Pattern("sum with another tensor", words, {"tap": name, "factor": a}, added)


def _turned(seen: Seen) -> Iterator[Pattern]:
    """Rotary pairs (j, j + C/2) turned on by an angle that grows with the position, each pair by its own."""
    if seen.axes not in ("THC", "TKC") or seen.expected.shape[2] % 2 or seen.expected.shape[0] < ENOUGH:
        return
    e, g = _complex(seen.expected), _complex(seen.got)
    turn_TJ = np.sum(g * np.conj(e), axis=1)  # over heads: they share the angle
    T = len(turn_TJ)
    energy = np.sum(np.abs(e) ** 2, axis=(0, 1))
    if not energy.all() or (np.count_nonzero(turn_TJ, axis=0) < ENOUGH).any():
        return  # of a pair that is zero nearly everywhere nobody can say how far it turned
    rate_J = np.angle(np.sum(turn_TJ[1:] * np.conj(turn_TJ[:-1]), axis=0))
    for _ in range(3):  # the phase left over, a straight line through it, each position by its weight
        left_TJ = turn_TJ * np.exp(-1j * np.outer(np.arange(T), rate_J))
        start_J = np.angle(left_TJ.sum(axis=0))
        phase_TJ = np.angle(left_TJ * np.exp(-1j * start_J))
        weight_TJ = np.abs(turn_TJ)
        t = np.arange(T)[:, None] - np.sum(weight_TJ * np.arange(T)[:, None], axis=0) / weight_TJ.sum(axis=0)
        rate_J = rate_J + np.sum(weight_TJ * t * phase_TJ, axis=0) / np.sum(weight_TJ * t * t, axis=0)
    turn = np.exp(1j * (start_J + np.outer(np.arange(T), rate_J)))[:, None]
    size = float(np.sum(np.real(g * np.conj(e * turn))) / np.sum(np.abs(e) ** 2))
    turn = size * turn
    off = np.flatnonzero(np.abs(np.exp(1j * rate_J) - 1) + np.abs(np.exp(1j * start_J) - 1) > SLIGHT)
    if not len(off):
        return
    pairs, starts = placed(off, len(rate_J)), numbers(start_J[off], 2)
    if np.abs(np.exp(1j * rate_J) - 1).max() * T < SLIGHT:
        sentence = f"rotary pairs {pairs} turned further by the same angle at every position, radians: {starts}"
    else:
        sentence = f"rotary pairs {pairs} turned further, radians a position: {numbers(rate_J[off], 2)}"
        if np.abs(np.exp(1j * start_J) - 1).max() > SLIGHT:
            sentence += f"; at position 0 already by {starts}"
    if abs(size - 1) > SLIGHT:
        sentence += f"; and {size:.4g} times as large"
    parameters = {"pairs": off.tolist(), "rates": rate_J[off].tolist(), "starts": start_J[off].tolist(), "factor": size}
    yield Pattern("rotation", sentence, parameters, lambda x: _real(_complex(x) * turn))


def _complex(x_THC: Array) -> Array:
    half = x_THC.shape[2] // 2
    return x_THC[..., :half] + 1j * x_THC[..., half:]


def _real(z_THJ: Array) -> Array:
    return np.concatenate((z_THJ.real, z_THJ.imag), axis=-1)


def _ratio(e: Array, g: Array) -> float | None:
    """The factor that takes e nearest to g."""
    energy = float(np.sum(e * e))
    return float(np.sum(e * g)) / energy if energy > 0 else None


def _called(a: float, seen: Seen) -> str:
    """A factor, with what it may be."""
    sizes = {letter: n for letter, n in zip(seen.axes, seen.expected.shape, strict=True) if letter in "CDHA"}
    known = {f"the root of the number of {NOUNS[letter]}s": math.sqrt(n) for letter, n in sizes.items()}
    known |= {f"the number of {NOUNS[letter]}s": float(n) for letter, n in sizes.items() if n > 4}
    known |= {"log2(e)": math.log2(math.e)}
    for words, value in known.items():
        if value > 1 and abs(a / value - 1) < SLIGHT:
            return f"{a:.6g} ({words})"
        if value > 1 and abs(a * value - 1) < SLIGHT:
            return f"{a:.6g} (1 / {words})"
    return f"{a:.6g}"
