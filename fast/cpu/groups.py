"""Which inputs go through which matrix of a stack: one group for a plain matrix, one an expert otherwise."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Groups(NamedTuple):
    """P products in E groups: those from start[e] to start[e + 1] go through matrix[e] of the stack.

    Product p reads row x_row[p] of the input and writes row y_row[p] of the output; all int64.
    """

    matrix: np.ndarray
    start: np.ndarray
    x_row: np.ndarray
    y_row: np.ndarray


@lru_cache(maxsize=16)
def one_group(T: int) -> Groups:
    """All T inputs through one and the same matrix."""
    rows = np.arange(T)
    return Groups(np.zeros(1, np.int64), np.array([0, T]), rows, rows)


def by_expert(ids_TA: np.ndarray) -> Groups:
    """Token t's input through the matrix of each of its experts; results in the order of `ids_TA`, flattened."""
    ids_P = ids_TA.ravel()
    order_P = np.argsort(ids_P, kind="stable")
    experts_E, start_E = np.unique(ids_P[order_P], return_index=True)
    return Groups(experts_E, np.append(start_E, len(ids_P)), order_P // ids_TA.shape[1], order_P)
