"""Phases of jobs: every job once, after all of the phase before, however many threads come and whenever they do."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.fast.cpu.jit import address_of, kernel
from assay.fast.cpu.phases import TAKEN, call_at, finish, floats_at, new_counters, take, wait


@kernel
def run(ends, counters, sums):
    """Job j of phase p writes 1 + the sum of what the phase before wrote."""
    p, start = 0, 0
    while True:
        number = take(counters, TAKEN)
        while number >= ends[p]:
            start, p = ends[p], p + 1
            if p == len(ends):
                return
        wait(counters, start)
        total = 1
        if p > 0:
            for before in range(start - (ends[p - 2] if p > 1 else 0)):
                total += sums[p - 1, before]
        sums[p, number - start] += total
        finish(counters)


def expected(sizes):
    """Every job of a phase writes the same number."""
    value, before, values = 1, 0, []
    for size in sizes:
        value = 1 + before * value
        values.append(value)
        before = size
    return values


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=12), threads=st.integers(1, 5))
def test_every_job_once_and_in_order(sizes, threads):
    """More threads than processors among them, and threads that come when all is done."""
    counters, sums = new_counters(2), np.zeros((len(sizes), 4), np.int64)
    arguments = (np.cumsum(sizes), counters, sums)
    workers = [threading.Thread(target=run, args=arguments) for _ in range(threads - 1)]
    for worker in workers:
        worker.start()
    run(*arguments)
    for worker in workers:
        worker.join()
    run(*arguments)
    for row, size, value in zip(sums, sizes, expected(sizes), strict=True):
        np.testing.assert_array_equal(row, [value] * size + [0] * (4 - size))


@kernel
def double(x, n):
    if n < 0:
        raise ValueError("negative")
    for i in range(n):
        x[i] *= 2


@kernel
def call(address, x, n):
    call_at(address, (x, n))


def test_a_call_by_address():
    x = np.ones(5)
    address = address_of(double, (x, 3))
    call(address, x, 3)
    np.testing.assert_array_equal(x, [2, 2, 2, 1, 1])
    with pytest.raises(ValueError, match="negative"):
        call(address, x, -1)


@kernel
def fill(address, size, value):
    x = floats_at(address, size)
    for i in range(len(x)):
        x[i] = value


def test_an_array_by_address():
    x = np.zeros(6, np.float32)
    fill(x.ctypes.data + 4, 3, 7.0)
    np.testing.assert_array_equal(x, [0, 7, 7, 7, 0, 0])
