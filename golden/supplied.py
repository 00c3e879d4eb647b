"""The taps that a backend supplied, brought to their own shapes; rows that it did not compute are marked and filled.

An engine that is asked for the last position only computes the last layer from its queries on, the final norm
and the logits for that position alone (llama.cpp: for those whose logits are wanted). Such taps have fewer rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from assay.golden.errors import GoldenError
from assay.golden.store import Golden
from assay.reference.config import Config
from assay.reference.ops import attention_mask
from assay.reference.taps import TapSpec, tap_shape, tap_table

WHOLE = ("attn_norm", "k", "v", "k_rope")  # what every later position needs of every earlier one
HIDDEN = -1e4  # a score below it, where the mask hides the key, is a mask's value and no score


@dataclass(frozen=True)
class Supplied:
    """Taps by name in the order of computation; of those in `rows` only these positions are the backend's."""

    taps: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]

    def filled(self, expected: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The taps with the oracle's values in the rows that the backend did not compute."""
        taps = dict(self.taps)
        for name, positions in self.rows.items():
            taps[name] = expected[name].copy()
            taps[name][positions] = self.taps[name][positions]
        return taps

    def of_backend(self, name: str, array: np.ndarray) -> np.ndarray:
        """The rows of an array of a tap's shape that the backend computed."""
        return array[self.rows[name]] if name in self.rows else array


def supplied(taps: Mapping[str, np.ndarray], golden: Golden, config: Config) -> Supplied:
    """The taps of this model among a backend's; rows it did not compute are NaN until they are `filled`.

    Raises GoldenError for one whose shape or values cannot be those of its tap.
    """
    arrays, rows = {}, {}
    for name, spec in tap_table(config).items():
        if name in taps:
            arrays[name], present_T = _fitting(name, spec, taps[name], golden, config)
            if present_T is not None:
                rows[name] = present_T
    return Supplied(arrays, rows)


def _fitting(
    name: str, spec: TapSpec, array: np.ndarray, golden: Golden, config: Config
) -> tuple[np.ndarray, np.ndarray | None]:
    """A tap in its own shape: a batch axis of one dropped, heads split where they were joined, rows at their places."""
    require_numbers(name, array)
    T = len(golden.provenance.tokens)
    wanted = tap_shape(spec, config, T, T)
    T_first = spec.axes[0] == "T"
    if array.shape[:1] == (1,) and array.ndim > 1 and (array.ndim > len(wanted) or array.size == np.prod(wanted)):
        array = array[0] if T > 1 else array
    present_T = _present(array, wanted, golden) if T_first and _may_be_partial(name, config) else None
    if present_T is not None:
        array = array.reshape(len(present_T), *wanted[1:])
    elif array.size != np.prod(wanted) or (T_first and array.shape[0] != T):
        raise GoldenError(f"tap {name!r} has the wrong shape", expected=list(wanted), got=list(array.shape))
    else:
        array = array.reshape(wanted)
    if spec.integer:
        array = _as_ids(name, array, config)
    if name.endswith("attn_scores"):
        array = _without_mask_values(array, int(name.split(".")[1]), config)
    if present_T is not None:
        whole = np.full(wanted, np.nan, np.float64 if spec.integer else array.dtype)
        whole[present_T] = array
        array = whole
    return array, present_T


def _may_be_partial(name: str, config: Config) -> bool:
    """Whether nothing later at another position needs this tap: the last layer's, from its queries on."""
    layer, _, kind = name.rpartition(".")
    return kind in ("final_norm", "logits") or (layer == f"layers.{config.num_hidden_layers - 1}" and kind not in WHOLE)


def _present(array: np.ndarray, wanted: tuple[int, ...], golden: Golden) -> np.ndarray | None:
    """Which positions an array with fewer rows than T holds: the last of each chunk, or the last ones."""
    T, chunks = wanted[0], golden.provenance.chunks
    rows, left = divmod(array.size, int(np.prod(wanted[1:])))
    if left or not 0 < rows < T or array.shape[0] != rows:
        return None
    return np.cumsum(chunks) - 1 if rows == len(chunks) else np.arange(T - rows, T)


def _as_ids(name: str, array: np.ndarray, config: Config) -> np.ndarray:
    N = config.dims["N"]
    if not np.all(np.isin(array, np.arange(N))):
        raise GoldenError(f"tap {name!r} holds something else than expert ids", expected=f"integers 0 to {N - 1}")
    return array.astype(np.int64)


def _without_mask_values(scores_HTS: np.ndarray, layer: int, config: Config) -> np.ndarray:
    """Scores with 0 for -inf, the dtype's least value or the like, where the mask hides the key anyway."""
    T, S = scores_HTS.shape[1:]
    hidden_TS = ~attention_mask(np.arange(T), np.arange(S), config.window(layer))
    return np.where(hidden_TS & (scores_HTS < HIDDEN), 0, scores_HTS)


def require_numbers(name: str, array: np.ndarray) -> None:
    """GoldenError for anything but integers, floats and booleans."""
    if array.dtype.kind not in "fiub":
        raise GoldenError(f"tap {name!r} does not hold real numbers", expected="real numbers", got=array.dtype)


def by_id(array_TA: np.ndarray, ids_TA: np.ndarray) -> np.ndarray:
    """Rows of chosen experts [T,A,...] in the order of the experts' ids, in which two backends can be compared."""
    order_TA = np.argsort(ids_TA, axis=1, kind="stable")
    return array_TA[np.arange(len(order_TA))[:, None], order_TA]
