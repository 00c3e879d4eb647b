"""Kernels between the matrix products; float32 in and out, serial, for they take little of the time.

Each is the twin of the function of the same name in `reference/ops.py` (`apply_rope`: `reference/rope.py`).
"""

import math

import numpy as np

from assay.fast.cpu.jit import kernel
from assay.fast.cpu.linear import dot


@kernel
def _rms_norm(x_TD, weight_D, eps, y_TD):
    D = len(weight_D)
    for t in range(len(x_TD)):
        x_D, y_D = x_TD[t], y_TD[t]
        scale = np.float32(1 / math.sqrt(np.float64(dot(x_D, x_D)) / D + eps))
        for d in range(D):
            y_D[d] = x_D[d] * scale * weight_D[d]


def rms_norm(x_TD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight; [T,D] -> [T,D]."""
    y_TD = np.empty_like(x_TD)
    _rms_norm(x_TD, weight_D, eps, y_TD)
    return y_TD


@kernel
def _apply_rope(x_THC, cos, sin, y_THC):
    T, H, C = x_THC.shape
    half = C // 2
    for t in range(T):
        for h in range(H):
            for j in range(half):
                first, second = x_THC[t, h, j], x_THC[t, h, j + half]  # half-split layout
                y_THC[t, h, j] = first * cos[t, j] - second * sin[t, j]
                y_THC[t, h, j + half] = second * cos[t, j] + first * sin[t, j]


def apply_rope(x_THC: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn pair (j, j + C/2) of every head by its angle; x [T,H,C], cos and sin [T,C/2]."""
    y_THC = np.empty_like(x_THC)
    _apply_rope(x_THC, cos, sin, y_THC)
    return y_THC


@kernel
def sigmoid(x):
    """1 / (1 + exp(-x)), by the branch whose exponential cannot overflow."""
    one = np.float32(1)
    if x >= 0:
        return one / (one + math.exp(-x))
    e = math.exp(x)
    return e / (one + e)


@kernel
def _swiglu(gate_P, up_P, act_P):
    for p in range(len(act_P)):
        act_P[p] = gate_P[p] * sigmoid(gate_P[p]) * up_P[p]


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up, element by element."""
    act = np.empty_like(gate)
    _swiglu(gate.ravel(), up.ravel(), act.ravel())
    return act


@kernel
def _clamped_swiglu(gate_P, up_P, alpha, limit, act_P):
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
    _clamped_swiglu(gate.ravel(), up.ravel(), np.float32(alpha), np.float32(limit), act.ravel())
    return act


@kernel
def _top_k(logits_TN, ids_TA):
    N = logits_TN.shape[1]
    for t in range(len(logits_TN)):
        taken = np.zeros(N, np.bool_)
        for a in range(ids_TA.shape[1]):
            best = -1
            for n in range(N):
                if taken[n]:
                    continue
                # strictly larger: of equal logits the lower id wins; any number beats NaN, as in NumPy's sort
                x = logits_TN[t, n]
                if best < 0 or x > logits_TN[t, best] or (np.isnan(logits_TN[t, best]) and not np.isnan(x)):
                    best = n
            taken[best] = True
            ids_TA[t, a] = best


def top_k(logits_TN: np.ndarray, A: int) -> np.ndarray:
    """Ids of the A largest logits of each row, largest first, ties to the lower id; int64 [T,A]."""
    ids_TA = np.empty((len(logits_TN), A), np.int64)
    _top_k(logits_TN, ids_TA)
    return ids_TA


@kernel
def _expert_weights(logits_TN, ids_TA, weights_TA):
    T, A = ids_TA.shape
    for t in range(T):
        total = np.float32(0)
        for a in range(A):
            # the first chosen is the largest: its exponential is 1
            weights_TA[t, a] = math.exp(logits_TN[t, ids_TA[t, a]] - logits_TN[t, ids_TA[t, 0]])
            total += weights_TA[t, a]
        for a in range(A):
            weights_TA[t, a] /= total


def expert_weights(logits_TN: np.ndarray, ids_TA: np.ndarray) -> np.ndarray:
    """Softmax over the chosen experts' logits only, [T,A]; twin of `softmax` in `reference.gpt_oss.route`."""
    weights_TA = np.empty(ids_TA.shape, np.float32)
    _expert_weights(logits_TN, ids_TA, weights_TA)
    return weights_TA


@kernel
def _weighted_sum(weights_TA, x_TAD, y_TD):
    T, A, D = x_TAD.shape
    for t in range(T):
        for a in range(A):
            for d in range(D):
                y_TD[t, d] += weights_TA[t, a] * x_TAD[t, a, d]


def weighted_sum(weights_TA: np.ndarray, x_TAD: np.ndarray) -> np.ndarray:
    """Sum over a token's experts, in the order of `expert_ids`: [T,D]."""
    y_TD = np.zeros((x_TAD.shape[0], x_TAD.shape[2]), np.float32)
    _weighted_sum(weights_TA, x_TAD, y_TD)
    return y_TD
