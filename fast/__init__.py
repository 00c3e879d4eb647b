"""Fast paths: engines that compute the oracle's taps with their own mathematics (Numba here, MLX later)."""
