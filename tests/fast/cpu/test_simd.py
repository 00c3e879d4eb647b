"""Every vector piece against its twin in NumPy; with ASSAY_CPU=portable the same tests judge the other lane."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from assay.fast.cpu import simd
from assay.fast.cpu.jit import kernel

BYTES = arrays(np.uint8, 64)
FLOATS = arrays(np.float32, 16, elements=st.floats(-1e3, 1e3, width=32))
quick = settings(max_examples=40, deadline=None)


load_bytes = simd._loader(simd.BYTES)


def joined(*arrays_):
    """One array of bytes, and room behind it that a wrong offset would show."""
    return np.concatenate([a.view(np.uint8).ravel() for a in arrays_] + [np.full(64, 0xEE, np.uint8)])


@kernel
def run_codes(codes, out):
    simd.store_floats(out, 0, simd.halves_to_floats(simd.load_16_halfwords(codes, 1)))
    simd.store_floats(out, 16, simd.bfloats_to_floats(simd.load_16_halfwords(codes, 1)))
    simd.store_floats(out, 32, simd.load_half(codes, 1))
    simd.store_floats(out, 48, simd.load_power_of_two(codes, 1))


def test_every_scale():
    """All 65536 halves and bfloats, all 256 powers of two, bit for bit, at an odd place."""
    out, halves = np.empty((4, 16), np.float32), np.arange(65536, dtype=np.uint16)
    for first in range(0, 65536, 16):
        some = halves[first : first + 16]
        run_codes(joined(np.zeros(1, np.uint8), some), out.ravel())
        values = some.view(np.float16).astype(np.float32)
        np.testing.assert_array_equal(out[0], values)
        np.testing.assert_array_equal(out[1].view(np.uint32), some.astype(np.uint32) << 16)
        np.testing.assert_array_equal(out[2], np.repeat(values[0], 16))
    for code in range(256):
        run_codes(joined(np.zeros(1, np.uint8), np.full(32, code, np.uint8)), out.ravel())
        np.testing.assert_array_equal(out[3], np.full(16, np.nan if code == 255 else np.exp2(code - 127.0)))


ENTRIES = bytes(np.random.default_rng(3).permutation(256)[:16].tolist())
low_entries = simd._unary(simd.BYTES, simd.BYTES, lambda b, v: simd._lookup_nibbles(b, ENTRIES, v, 0))
high_entries = simd._unary(simd.BYTES, simd.BYTES, lambda b, v: simd._lookup_nibbles(b, ENTRIES, v, 4))
floats_of_exponents = simd._unary(
    simd.INTS, simd.FLOATS, lambda b, v: simd._float_of_exponent(b, b.shl(v, simd._splat(v.type, 23)))
)


@kernel
def run_entries(data, out, powers):
    v = load_bytes(data, 1)
    simd.store_bytes(out, 0, low_entries(v))
    simd.store_bytes(out, 64, high_entries(v))
    simd.store_floats(powers, 0, floats_of_exponents(simd.load_16_unsigned(data, 1)))


@given(BYTES)
@quick
def test_entries_of_nibbles(data):
    """Whatever is in the other half of a byte, or in its neighbour."""
    out = np.empty(128, np.uint8)
    run_entries(joined(np.zeros(1, np.uint8), data), out, np.empty(16, np.float32))
    table = np.frombuffer(ENTRIES, np.uint8)
    np.testing.assert_array_equal(out.reshape(2, 64), [table[data & 15], table[data >> 4]])


def test_every_exponent():
    """2^-127, the subnormal one, for 0, and NaN for 255."""
    codes = np.arange(256, dtype=np.uint8)
    powers = np.empty((16, 16), np.float32)
    for first in range(0, 256, 16):
        data = joined(np.zeros(1, np.uint8), codes[first : first + 16], np.zeros(48, np.uint8))
        run_entries(data, np.empty(128, np.uint8), powers[first // 16])
    expected = np.where(codes == 255, np.nan, np.exp2(codes.astype(np.float64) - 127))
    np.testing.assert_array_equal(powers.ravel(), expected)


@kernel
def run_floats(x, out):
    a, b, c = simd.load_floats(x, 0), simd.load_floats(x, 16), simd.load_floats(x, 32)
    simd.store_floats(out, 0, simd.multiply_add(a, b, c))
    simd.store_floats(out, 16, simd.splat(simd.largest_float(a)))
    out[32] = simd.sum_floats(a)
    simd.store_floats(out, 33, simd.add(a, b))
    simd.store_floats(out, 49, simd.zeros())


@given(FLOATS, FLOATS, FLOATS)
@quick
def test_floats(a, b, c):
    out = np.full(65, np.nan, np.float32)
    run_floats(np.concatenate((a, b, c)), out)
    exact = a.astype(np.float64) * b + c
    np.testing.assert_allclose(out[:16], exact, rtol=1e-6, atol=0.13 * 2**-3)  # rounded once or twice, up to 1e6 + 1e3
    np.testing.assert_array_equal(out[16:32], np.repeat(a.max(), 16))
    tree = a
    while len(tree) > 1:
        tree = tree[: len(tree) // 2] + tree[len(tree) // 2 :]
    np.testing.assert_array_equal(out[32], tree[0])
    np.testing.assert_array_equal(out[33:49], a + b)
    np.testing.assert_array_equal(out[49:], 0)


@kernel
def run_wide(data, out):
    """Bytes and halfwords made 32 bits wide, and floats of them."""
    unsigned = simd.load_16_unsigned(data, 5)
    simd.store_floats(out, 0, simd.ints_to_floats(unsigned))
    simd.store_floats(out, 16, simd.ints_to_floats(simd.load_16_signed(data, 5)))
    simd.store_floats(out, 32, simd.ints_to_floats(simd.low_nibbles_of_ints(unsigned)))
    simd.store_floats(out, 48, simd.ints_to_floats(simd.high_nibbles_of_ints(unsigned)))
    simd.store_floats(out, 64, simd.e2m1_to_floats(simd.low_nibbles_of_ints(unsigned)))
    halfwords = simd.load_16_halfwords(data, 5)
    simd.store_floats(out, 80, simd.halves_to_floats(halfwords))
    simd.store_floats(out, 96, simd.bfloats_to_floats(halfwords))


@given(BYTES)
@quick
def test_widened(data):
    """Every float16 and bfloat16 there is among them: NaN, infinity, subnormal numbers."""
    out = np.empty(112, np.float32)
    run_wide(np.concatenate((np.zeros(5, np.uint8), data)), out)
    bytes_, halfwords = data[:16], data[:32].view("<u2")
    magnitudes = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    e2m1 = np.concatenate((magnitudes, -magnitudes))[bytes_ & 15]
    plain = [bytes_, bytes_.view(np.int8), bytes_ & 15, bytes_ >> 4, e2m1, halfwords.view(np.float16)]
    want = np.concatenate([*plain, (halfwords.astype(np.uint32) << 16).view(np.float32)]).astype(np.float32)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(np.signbit(out[~np.isnan(out)]), np.signbit(want[~np.isnan(want)]))


@kernel
def run_more_floats(a, b, out):
    x, y = simd.load_floats(a, 0), simd.load_floats(b, 0)
    simd.store_floats(out, 0, simd.multiply(x, y))
    simd.store_floats(out, 16, simd.larger(x, y))
    simd.store_floats(out, 32, simd.splat(a[3]))


@given(FLOATS, FLOATS)
@quick
def test_more_floats(a, b):
    out = np.empty(48, np.float32)
    run_more_floats(a, b, out)
    np.testing.assert_array_equal(out, np.concatenate((a * b, np.maximum(a, b), np.full(16, a[3]))))
    for nan, other in ((np.full(16, np.nan, np.float32), b), (a, np.full(16, np.nan, np.float32))):
        run_more_floats(nan, other, out)
        np.testing.assert_array_equal(out[16:32], other)  # the second where either is NaN


load_ints, store_ints = simd._loader(simd.INTS), simd.store_bytes


@simd.intrinsic
def dot_bytes(typing_context, total, unsigned, signed):
    signature = simd.INTS(simd.INTS, simd.BYTES, simd.BYTES)
    return signature, lambda context, builder, signature, args: simd._dot_bytes(builder, *args)


@kernel
def run_dot(totals, unsigned, signed, out):
    both = load_bytes(unsigned, 0), load_bytes(signed, 0)
    store_ints(out, 0, dot_bytes(load_ints(totals, 0), *both))


@given(arrays(np.int32, 16, elements=st.integers(-(2**30), 2**30)), BYTES, arrays(np.int8, 64))
@quick
def test_dot_bytes(totals, unsigned, signed):
    """255 x -128 four times included: nothing saturates."""
    for u in (unsigned, np.full(64, 255, np.uint8)):
        out = np.empty(16, np.int32)
        run_dot(totals, u, signed.view(np.uint8), out)
        products = (u.astype(np.int64) * signed).reshape(16, 4).sum(axis=1)
        np.testing.assert_array_equal(out, totals + products)


@kernel
def read_beyond(data):
    simd.store_bytes(data, 1, load_bytes(data, 0))


@pytest.mark.parametrize("place", ["ASSAY_CPU", "ASSAY_CPU_CHECK"])
def test_lanes(place):
    """The environment chooses the portable lane, and bounds checks that see a vector which ends outside."""
    code = """
import numpy as np
from assay.fast.cpu import simd
from tests.fast.cpu.test_simd import read_beyond
print(simd.LANE, simd.CHECKED)
if simd.CHECKED:
    try:
        read_beyond(np.zeros(64, np.uint8))
    except IndexError as error:
        print(error)
"""
    value = {"ASSAY_CPU": "portable", "ASSAY_CPU_CHECK": "1"}[place]
    env = os.environ | {place: value, "PYTHONPATH": os.getcwd()}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    if place == "ASSAY_CPU":
        assert out.startswith("portable")
    else:
        assert "vector beyond the end" in out


@pytest.mark.parametrize(
    ("value", "message"),
    [("sse2", "kernels that there are not: ASSAY_CPU=sse2"), ("avx512vnni", "kernels that this CPU cannot run")],
)
def test_a_lane_that_is_not_there(value, message):
    """By name, and by processor: this one is told that it has no features. One message on the command line."""
    code = """
import llvmlite.binding
llvmlite.binding.get_host_cpu_features = dict
from assay.cli.main import main
main(["warmup"])
"""
    env = os.environ | {"ASSAY_CPU": value}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 2
    assert run.stderr.startswith("assay: the environment asks for ")
    assert message in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(("features", "lane"), [("", "portable"), ("+avx512vnni,+avx512bw,+avx512vbmi", "avx512vnni")])
def test_the_processor_that_numba_is_told_to_compile_for(features, lane):
    """Its features count, not those of the machine: an instruction that it lacks ends the process inside LLVM."""
    env = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features, "ASSAY_CPU": ""}
    code = "from assay.fast.cpu import simd; print(simd.LANE)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert run.stdout == f"{lane}\n"
