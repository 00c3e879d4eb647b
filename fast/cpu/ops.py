"""Kernels between the matrix products; float32 in and out, serial, for they take little of the time.

Each is the twin of the function of the same name in `reference/ops.py` (`apply_rope`: `reference/rope.py`).
"""

import math

import numpy as np

from assay.fast.cpu.elementwise import exp, sigmoid
from assay.fast.cpu.jit import kernel, leaf, leaf_kernel, piece
from assay.fast.cpu.linear import dot


@leaf
def norm_row(x_D, weight_D, eps, y_D):
    """RMSNorm of one row."""
    D = len(weight_D)
    scale = np.float32(1 / math.sqrt(np.float64(dot(x_D, x_D)) / D + eps))
    for d in range(D):
        y_D[d] = x_D[d] * scale * weight_D[d]


@kernel
def _rms_norm(x_TD, weight_D, eps, y_TD):
    for t in range(len(x_TD)):
        norm_row(x_TD[t], weight_D, eps, y_TD[t])


def rms_norm(x_TD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight; [T,D] -> [T,D]."""
    y_TD = np.empty_like(x_TD)
    _rms_norm(x_TD, weight_D, eps, y_TD)
    return y_TD


@leaf
def rope_head(x_C, cos, sin, y_C):
    """RoPE of one head."""
    half = len(x_C) // 2
    for j in range(half):
        first, second = x_C[j], x_C[j + half]  # half-split layout
        y_C[j] = first * cos[j] - second * sin[j]
        y_C[j + half] = second * cos[j] + first * sin[j]


@kernel
def _apply_rope(x_THC, cos, sin, y_THC):
    for t in range(len(x_THC)):
        for h in range(x_THC.shape[1]):
            rope_head(x_THC[t, h], cos[t], sin[t], y_THC[t, h])


def apply_rope(x_THC: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn pair (j, j + C/2) of every head by its angle; x [T,H,C], cos and sin [T,C/2]."""
    y_THC = np.empty_like(x_THC)
    _apply_rope(x_THC, cos, sin, y_THC)
    return y_THC


@leaf_kernel
def swiglu_of(gate_P, up_P, act_P):
    for p in range(len(act_P)):
        act_P[p] = gate_P[p] * sigmoid(gate_P[p]) * up_P[p]


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up, element by element."""
    act = np.empty_like(gate)
    swiglu_of(gate.ravel(), up.ravel(), act.ravel())
    return act


@leaf_kernel
def clamped_swiglu_of(gate_P, up_P, alpha, limit, act_P):
    for p in range(len(act_P)):
        g, u = gate_P[p], up_P[p]
        # comparisons that are false for NaN, so that it passes
        if g > limit:
            g = limit
        if u > limit:
            u = limit
        elif u < -limit:
            u = -limit
        act_P[p] = g * sigmoid(alpha * g) * (u + np.float32(1))


def clamped_swiglu(gate: np.ndarray, up: np.ndarray, alpha: float, limit: float) -> np.ndarray:
    """g sigmoid(alpha g) (u + 1), g = min(gate, limit), u = clip(up, -limit, limit), element by element."""
    act = np.empty_like(gate)
    clamped_swiglu_of(gate.ravel(), up.ravel(), np.float32(alpha), np.float32(limit), act.ravel())
    return act


@piece
def choose(logits_N, ids_A):
    """Ids of the largest logits."""
    taken = np.zeros(len(logits_N), np.bool_)
    for a in range(len(ids_A)):
        best = -1
        for n in range(len(logits_N)):
            if taken[n]:
                continue
            # strictly larger: of equal logits the lower id wins; any number beats NaN, as in NumPy's sort
            x = logits_N[n]
            if best < 0 or x > logits_N[best] or (np.isnan(logits_N[best]) and not np.isnan(x)):
                best = n
        taken[best] = True
        ids_A[a] = best


@kernel
def _top_k(logits_TN, ids_TA):
    for t in range(len(logits_TN)):
        choose(logits_TN[t], ids_TA[t])


def top_k(logits_TN: np.ndarray, A: int) -> np.ndarray:
    """Ids of the A largest logits of each row, largest first, ties to the lower id; int64 [T,A]."""
    ids_TA = np.empty((len(logits_TN), A), np.int64)
    _top_k(logits_TN, ids_TA)
    return ids_TA


@leaf
def weigh(logits_N, ids_A, weights_A):
    """Softmax over the chosen logits."""
    total = np.float32(0)
    for a in range(len(ids_A)):
        # the first chosen is the largest: its exponential is 1
        weights_A[a] = exp(logits_N[ids_A[a]] - logits_N[ids_A[0]])
        total += weights_A[a]
    for a in range(len(ids_A)):
        weights_A[a] /= total


@kernel
def _expert_weights(logits_TN, ids_TA, weights_TA):
    for t in range(len(ids_TA)):
        weigh(logits_TN[t], ids_TA[t], weights_TA[t])


def expert_weights(logits_TN: np.ndarray, ids_TA: np.ndarray) -> np.ndarray:
    """Softmax over the chosen experts' logits only, [T,A]; twin of `softmax` in `reference.gpt_oss.route`."""
    weights_TA = np.empty(ids_TA.shape, np.float32)
    _expert_weights(logits_TN, ids_TA, weights_TA)
    return weights_TA


@leaf
def weighted_row(weight, x_D, y_D):
    """Add a row times its weight."""
    for d in range(len(y_D)):
        y_D[d] += weight * x_D[d]


@kernel
def _weighted_sum(weights_TA, x_TAD, y_TD):
    for t in range(len(x_TAD)):
        for a in range(x_TAD.shape[1]):
            weighted_row(weights_TA[t, a], x_TAD[t, a], y_TD[t])


def weighted_sum(weights_TA: np.ndarray, x_TAD: np.ndarray) -> np.ndarray:
    """Sum over a token's experts, in the order of `expert_ids`: [T,D]."""
    y_TD = np.zeros((x_TAD.shape[0], x_TAD.shape[2]), np.float32)
    _weighted_sum(weights_TA, x_TAD, y_TD)
    return y_TD
