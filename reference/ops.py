"""The leaf operations of the models, in plain NumPy, each with its equation.

Dimension key, used in names, comments, the tap table and the docs:
`T` query positions, `S` key positions, `D` hidden, `H` query heads, `K` key/value heads, `G` = H/K,
`C` head size, `N` experts, `A` experts per token, `F` feed-forward width, `V` vocabulary.
A name ends in the letters of its axes: `q_THC` is [T, H, C].

No operation here sets a dtype: it computes in the dtype of its inputs, float64 for the oracle proper.
"""

import numpy as np


def rms_norm(x_TD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, eq. 4); [T,D] -> [T,D].

    eps is added inside the root, and the gain is `weight`, not Gemma's 1 + weight.
    """
    mean_square_T1 = np.mean(x_TD * x_TD, axis=-1, keepdims=True)
    return x_TD / np.sqrt(mean_square_T1 + x_TD.dtype.type(eps)) * weight_D


def linear(x: np.ndarray, weight_OI: np.ndarray, bias_O: np.ndarray | None = None) -> np.ndarray:
    """x W^T + b; weights are stored [out, in], so [..., I] -> [..., O]."""
    y = x @ weight_OI.T
    return y if bias_O is None else y + bias_O


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) / sum(exp(x)) over the last axis; the maximum is subtracted first, which cancels."""
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), written as tanh so that no x overflows."""
    half = x.dtype.type(0.5)
    return half * (1 + np.tanh(half * x))


def attention_mask(query_position_T: np.ndarray, key_position_S: np.ndarray, window: int | None) -> np.ndarray:
    """True where a query may look at a key, bool [T,S].

    Causal: keys up to the query's own position. `window` counts the query's own position, so a window
    of 128 is the query and the 127 keys before it.
    """
    distance_TS = query_position_T[:, None] - key_position_S[None, :]
    visible_TS = distance_TS >= 0
    return visible_TS if window is None else visible_TS & (distance_TS < window)


def attention_scores(q_THC: np.ndarray, k_SKC: np.ndarray, mask_TS: np.ndarray) -> np.ndarray:
    """q k / sqrt(C) (Vaswani et al. 2017, eq. 1), 0 where the mask hides the key; -> [H,T,S].

    Grouped-query attention: query head h reads key head h // G, that is, heads of a group are neighbours.
    """
    T, H, C = q_THC.shape
    K = k_SKC.shape[1]
    q_TKGC = q_THC.reshape(T, K, H // K, C)
    scores_KGTS = np.einsum("TKGC,SKC->KGTS", q_TKGC, k_SKC) * q_THC.dtype.type(C**-0.5)
    return np.where(mask_TS, scores_KGTS.reshape(H, T, -1), 0)


def attention_weights(scores_HTS: np.ndarray, mask_TS: np.ndarray, sink_H: np.ndarray | None = None) -> np.ndarray:
    """Softmax over the visible keys, with each head's sink as one more logit in the denominator; [H,T,S].

    The sink takes weight but has no value: the weights of a row sum to less than one. It is a logit
    on the scale of the scaled scores (openai/gpt-oss `sdpa`: concatenated after the scaling by 1/sqrt(C)).
    """
    scores_HTS = np.where(mask_TS, scores_HTS, -np.inf)
    largest_HT1 = np.max(scores_HTS, axis=-1, keepdims=True)
    if sink_H is not None:
        largest_HT1 = np.maximum(largest_HT1, sink_H[:, None, None])
    e_HTS = np.exp(scores_HTS - largest_HT1)
    total_HT1 = np.sum(e_HTS, axis=-1, keepdims=True)
    if sink_H is not None:
        total_HT1 = total_HT1 + np.exp(sink_H[:, None, None] - largest_HT1)
    return e_HTS / total_HT1


def attention_heads(weights_HTS: np.ndarray, v_SKC: np.ndarray) -> np.ndarray:
    """Weighted sum of values for each query head; [H,T,S] x [S,K,C] -> [T,H,C]."""
    H, T, S = weights_HTS.shape
    K = v_SKC.shape[1]
    weights_KGTS = weights_HTS.reshape(K, H // K, T, S)
    return np.einsum("KGTS,SKC->TKGC", weights_KGTS, v_SKC).reshape(T, H, -1)


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up, silu(x) = x sigmoid(x) (Shazeer 2020, arXiv:2002.05202, eq. 6 with beta 1)."""
    return gate * sigmoid(gate) * up


def clamped_swiglu(gate: np.ndarray, up: np.ndarray, alpha: float, limit: float) -> np.ndarray:
    """gpt-oss's activation: g sigmoid(alpha g) (u + 1) (openai/gpt-oss torch/model.py `swiglu`).

    The gate is clamped from above only, g = min(gate, limit); the linear branch on both sides,
    u = clip(up, -limit, limit), and has 1 added to it.
    """
    g = np.minimum(gate, limit)
    u = np.clip(up, -limit, limit)
    return g * sigmoid(gate.dtype.type(alpha) * g) * (u + 1)


def top_k(logits_TN: np.ndarray, A: int) -> np.ndarray:
    """Ids of the A largest logits of each row, largest first, ties to the lower id; int64 [T,A]."""
    return np.argsort(-logits_TN, axis=-1, kind="stable")[:, :A]
