"""Why two tensors differ: the known slips of layout, scale and rounding, each tried on one until it gives the other.

Every change is judged by bits, on all elements: an explanation here is a proof, not a likeness.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np

from assay.reference.config import Config
from assay.reference.weights import Tensor

MOST = 1 << 28  # elements decoded at once; of a longer tensor the first rows are judged
Change = Callable[[np.ndarray], np.ndarray]


def explain(name: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor], config: Config) -> str | None:
    """What makes tensor `name` of `b` from `a`, in words; None where no known change does. Shapes must be equal."""
    mine, other = a[name], b[name]
    x, y = next(matrices(mine)), next(matrices(other))  # decoded once: most changes fail on these
    for words, change in _changes(name, config):
        if same_bits(change(x), y) and _gives(change, mine, other):
            return words
    for words, change in _roundings():
        if same_bits(change(x), y) and _gives(change, mine, other):
            return f"B is A {words}"
        if same_bits(change(y), x) and _gives(change, other, mine):
            return f"A is B {words}"
    return _scaled(mine, other) or _fused(name, a, b) or _permuted(mine, other)


def same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether two float32 arrays hold the same bits, NaN and the sign of zero included."""
    return x.shape == y.shape and np.array_equal(_bits(x), _bits(y))


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint32)


def matrices(tensor: Tensor) -> Iterator[np.ndarray]:
    """A tensor's matrices one at a time, float32 [rows, columns]; a vector, also that of an expert, is one column."""
    if _is_of_experts(tensor):
        for expert in range(tensor.shape[0]):
            matrix = tensor[expert].decode()
            yield matrix.reshape(len(matrix), -1)
    elif tensor.size > MOST and len(tensor.shape) == 2:
        yield tensor[: MOST // tensor.shape[1]].decode()
    else:
        yield tensor.decode().reshape(tensor.shape[0] if tensor.shape else 1, -1)


def _is_of_experts(tensor: Tensor) -> bool:
    """Whether the first axis counts experts: matrices [N, F, D], biases [N, F]."""
    return len(tensor.shape) == 3 or (len(tensor.shape) == 2 and tensor.name.endswith(".bias"))


def _gives(change: Change, a: Tensor, b: Tensor) -> bool:
    return all(same_bits(change(x), y) for x, y in zip(matrices(a), matrices(b), strict=True))


def _changes(name: str, config: Config) -> Iterator[tuple[str, Change]]:
    """Orders of elements that are easily mistaken for each other."""
    yield "B holds it transposed", lambda x: np.reshape(x.T, x.shape)
    yield "B holds it transposed", lambda x: np.reshape(x, x.shape[::-1]).T
    if name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
        C = config.head_dim
        to_pairs = (
            "B's RoPE rows are in neighbour pairs, A's in halves: a permutation is missing from one of them, or B's "
            "file (a GGUF of a Llama) was permuted twice"
        )
        yield to_pairs, lambda x: _regrouped(x, 2, C // 2)
        to_halves = (
            "B's RoPE rows were put into halves once more than A's: a permutation was applied twice, or B's file (a "
            "GGUF of a Llama, whose rows are read as neighbour pairs) was never permuted"
        )
        yield to_halves, lambda x: _regrouped(x, C // 2, 2)
    for n in (32, 16):
        order = np.arange(n).reshape(2, -1).T.ravel()  # 0, n/2, 1, n/2 + 1, ...
        words = f"nibble order in blocks of {n}"
        yield (
            f"{words}: B takes its codes for split halves, A for adjacent ones",
            partial(_in_blocks, np.argsort(order)),
        )
        yield f"{words}: B takes its codes for adjacent ones, A for split halves", partial(_in_blocks, order)
    for n in (2, 16, 32, 64):  # elements of a byte are neighbours, or half a block apart
        order = np.roll(np.arange(n), n // 2)
        yield "nibble order: high and low nibble of each byte are swapped", partial(_in_blocks, order)


def _regrouped(x: np.ndarray, outer: int, inner: int) -> np.ndarray:
    """Rows [heads, outer, inner, ...] as [heads, inner, outer, ...]."""
    return x.reshape(-1, outer, inner, x.shape[1]).swapaxes(1, 2).reshape(x.shape)


def _in_blocks(order: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The elements of every block of a row in another order."""
    if x.shape[1] % len(order):
        return x[:0]
    return x.reshape(-1, len(order))[:, order].reshape(x.shape)


def _roundings() -> list[tuple[str, Change]]:
    return [
        ("rounded to bfloat16", _to_bfloat16),
        ("cut to bfloat16", lambda x: (_bits(x) & np.uint32(0xFFFF0000)).view(np.float32)),
        ("rounded to float16", _to_float16),
        ("with every zero positive", lambda x: x + np.float32(0)),
    ]


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The nearest bfloat16, ties to even; finite values only."""
    bits = _bits(x)
    return (bits + (0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def _to_float16(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        return x.astype(np.float16).astype(np.float32)


def _scaled(a: Tensor, b: Tensor) -> str | None:
    """One factor, a power of two of either sign, between all elements."""
    ratio = next((r for pair in zip(matrices(a), matrices(b), strict=True) if (r := _ratio(*pair))), None)
    if ratio is None or not np.isfinite(ratio) or abs(np.frexp(ratio)[0]) != 0.5:
        return None
    with np.errstate(over="ignore"):
        if not _gives(lambda x: x * ratio, a, b):
            return None
    if ratio < 0:
        return f"B is A times {ratio:g}"
    return f"B is A times 2^{int(np.log2(ratio))}: a scale's exponent is off by that"


def _ratio(x: np.ndarray, y: np.ndarray) -> np.float32 | None:
    """y / x at the first element of x that is not zero."""
    places = np.flatnonzero(x)
    with np.errstate(all="ignore"):
        return y.flat[places[0]] / x.flat[places[0]] if places.size else None


def _fused(name: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> str | None:
    """gate and up taken out of their fused matrix in the other way: even and odd rows, or halves."""
    which = next((w for w in ("gate_proj", "up_proj") if w in name), None)
    if which is None:
        return None
    gates, ups = (a[name.replace(which, other)] for other in ("gate_proj", "up_proj"))
    is_up = which == "up_proj"
    halves_of_woven = odd_of_stacked = True
    for gate, up, got in zip(matrices(gates), matrices(ups), matrices(b[name]), strict=True):
        woven, stacked = np.stack((gate, up), 1).reshape(-1, gate.shape[1]), np.concatenate((gate, up))
        halves_of_woven &= same_bits(woven[len(gate) :] if is_up else woven[: len(gate)], got)
        odd_of_stacked &= same_bits(stacked[is_up::2], got)
    if halves_of_woven:
        return "B takes half of gate_up, whose rows alternate between gate and up: not de-interleaved"
    if odd_of_stacked:
        return "B takes every other row of gate_up, whose first half is gate: de-interleaved without need"
    return None


def _permuted(a: Tensor, b: Tensor) -> str | None:
    """The same experts, rows or columns in another order."""
    if _is_of_experts(a):
        experts = [[hashlib.sha256(x.data).digest() for x in matrices(tensor)] for tensor in (a, b)]
        if words := _order("experts", *experts):
            return words
    for what, turned in (("rows", False), ("columns", True)):
        orders = [
            _order(what, *(_rows(x.T if turned else x) for x in pair))
            for pair in zip(matrices(a), matrices(b), strict=True)
        ]
        if all(order is not None for order in orders):
            moved = {order for order in orders if order}
            return moved.pop() if len(moved) == 1 else f"{what} are in another order, in each expert its own"
    return None


def _rows(x: np.ndarray) -> list[bytes]:
    return [row.tobytes() for row in np.ascontiguousarray(x)]


def _order(what: str, a: list[bytes], b: list[bytes]) -> str | None:
    """How b orders the entries of a; empty where the order is the same, None where the entries are others."""
    if sorted(a) != sorted(b):
        return None
    places = {entry: i for i, entry in enumerate(a)}
    moved = [(i, places[entry]) for i, entry in enumerate(b) if a[i] != entry]
    if not moved:
        return ""
    shown = ", ".join(f"{i} is A's {j}" for i, j in moved[:3])
    return f"{what} are in another order: {shown}" + (f" and {len(moved) - 3} more" if len(moved) > 3 else "")
