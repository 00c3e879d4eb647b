"""The operations that MLX lacks, composed from its own: inside in float32, the result rounded once."""

import mlx.core as mx


def on_cpu() -> bool:
    """Whether MLX's default device is the CPU, whose kernels add up otherwise than its Metal kernels."""
    return mx.default_device().type == mx.cpu


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """RMSNorm; [...,D] -> [...,D].

    MLX's CPU adds up 2880 squares one after the other in float32, ten times the error of a sum in pairs:
    there the mean is taken in float64, which its GPUs do not have.
    """
    if not on_cpu():
        return mx.fast.rms_norm(x, weight, eps).astype(x.dtype)
    mean_square = mx.mean(mx.square(x.astype(mx.float64)), axis=-1, keepdims=True)
    return (x * mx.rsqrt(mean_square + eps).astype(mx.float32) * weight).astype(x.dtype)


def top_k(logits: mx.array, A: int) -> mx.array:
    """Ids of the A largest logits of each row, largest first; [...,N] -> [...,A]."""
    return mx.argsort(-logits, axis=-1)[..., :A]


def expert_weights(logits: mx.array, ids: mx.array) -> mx.array:
    """Softmax of the chosen logits only; [...,N] and [...,A] -> [...,A]."""
    return mx.softmax(mx.take_along_axis(logits, ids, axis=-1), axis=-1, precise=True)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    g = gate.astype(mx.float32)
    return (g * mx.sigmoid(g) * up).astype(gate.dtype)


def clamped_swiglu(gate: mx.array, up: mx.array, alpha: float, limit: float) -> mx.array:
    """gpt-oss's activation: g sigmoid(alpha g) (u + 1), g clamped from above, u on both sides."""
    g = mx.minimum(gate.astype(mx.float32), limit)
    u = mx.clip(up.astype(mx.float32), -limit, limit)
    return (g * mx.sigmoid(alpha * g) * (u + 1)).astype(gate.dtype)


def weighted_sum(weights: mx.array, outputs: mx.array) -> mx.array:
    """Sum over each token's experts; [...,A] and [...,A,D] -> [...,D]."""
    return (weights[..., None].astype(mx.float32) * outputs).sum(axis=-2).astype(outputs.dtype)
