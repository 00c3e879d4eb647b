"""The exponential and the sigmoid against NumPy's in float64, over all of float32's range that matters."""

import numpy as np

from assay.fast.cpu.elementwise import exp, sigmoid
from assay.fast.cpu.jit import kernel

U = 2.0**-24


@kernel
def exp_of(x, y):
    for i in range(len(x)):
        y[i] = exp(x[i])


@kernel
def sigmoid_of(x, y):
    for i in range(len(x)):
        y[i] = sigmoid(x[i])


def applied(kernel_, x):
    y = np.empty_like(x)
    kernel_(x, y)
    return y


def test_exp():
    """Half a unit for the last rounding, and about as much for those before it."""
    x = np.linspace(-87.3, 88.7, 2_000_001).astype(np.float32)
    np.testing.assert_allclose(applied(exp_of, x), np.exp(x.astype(np.float64)), rtol=3 * U)


def test_sigmoid():
    """exp, a sum, a quotient and a product."""
    x = np.linspace(-87, 87, 2_000_001).astype(np.float32)
    np.testing.assert_allclose(applied(sigmoid_of, x), 1 / (1 + np.exp(-x.astype(np.float64))), rtol=6 * U)


def test_ends():
    x = np.float32([-np.inf, -1e30, -104, -87.4, 0, 88.8, 1e30, np.inf, np.nan])
    np.testing.assert_array_equal(applied(exp_of, x), np.float32([0, 0, 0, 0, 1, np.inf, np.inf, np.inf, np.nan]))
    np.testing.assert_array_equal(applied(sigmoid_of, x), np.float32([0, 0, 0, 0, 0.5, 1, 1, 1, np.nan]))
