"""float32 arrays to encoded parts by name, and how much was lost on the way.

Names say the format and, where several are in use, whose rules: "Q8_0", "MXFP4" (OCP's: scale `floor`, ties to
even), "MXFP4:rceil" (another scale rule), "GGUF MXFP4" (ggml's), "MLX mxfp4" (mx.quantize's), "affine4/64" (MLX's,
scales in BF16), "affine4/64 F16", "TQ2_0 (by gguf-py)".
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from assay.loaders.delegated import DELEGATED
from assay.loaders.errors import CheckpointError
from assay.loaders.gguf_file import GGML_TYPES
from assay.reference.formats import (
    BF16,
    F16,
    F32,
    FP4_F16,
    GGML_BLOCKS,
    MICROSCALED,
    MLX_BITS,
    MLX_MODES,
    NVFP4,
    AffineGroups,
    FloatFormat,
)
from assay.reference.formats.encode_ggml import GGML_ENCODERS
from assay.reference.formats.encode_mlx import encode_affine, encode_mxfp4, encode_mxfp8, encode_nvfp4, round_to
from assay.reference.formats.encode_mx import encode_microscaled
from assay.reference.formats.encode_scales import SCALE_RULES, e4m3, float16
from assay.reference.weights import Encoding

Parts = dict[str, np.ndarray]
MLX_GROUPS = (32, 64, 128)
GGUF_NAMES = {type.name for type in GGML_TYPES.values()} | {delegated.name for delegated in DELEGATED.values()}


@dataclass(frozen=True)
class Encoder:
    """An encoding and the function that makes its parts of values [..., I]."""

    encoding: Encoding
    encode: Callable[[np.ndarray], Parts]


def encode(array: np.ndarray, target: str | Encoding) -> Parts:
    """The parts of values [..., I] in an encoding, by name or by its record.

    For a record the rules are ggml's for its blocks, OCP's for microscaling and MLX's for affine groups.
    Raises CheckpointError for an unknown target and for values that it cannot hold.
    """
    encoder = encoder_of(target)
    try:
        return encoder.encode(array)
    except ValueError as error:
        raise CheckpointError(f"cannot be encoded as {encoder.encoding.name}: {error}") from error


def encoder_of(target: str | Encoding) -> Encoder:
    """The encoder of a name, or the first of an encoding; CheckpointError if there is none."""
    if isinstance(target, AffineGroups):
        return Encoder(target, partial(encode_affine, encoding=target))
    if isinstance(target, str) and target in ENCODERS:
        return ENCODERS[target]
    for encoder in ENCODERS.values():
        if encoder.encoding == target:
            return encoder
    name = target if isinstance(target, str) else target.name
    remedy = f"write F16 or BF16 and let llama.cpp's llama-quantize make {name} of it" if name in GGUF_NAMES else None
    raise CheckpointError(f"no encoder for {name!r}", expected=f"one of {', '.join(ENCODERS)}", remedy=remedy)


def _plain(format: FloatFormat, array: np.ndarray) -> Parts:
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ValueError("NaN or infinity (in float32) cannot be quantised")
    return {"values": round_to(values, format)}


def _blocks(encode_blocks: Callable[[np.ndarray], np.ndarray], array: np.ndarray) -> Parts:
    return {"blocks": encode_blocks(array)}


def _by_gguf_py(number: int, array: np.ndarray) -> Parts:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    type = GGML_TYPES[number]
    if array.ndim == 0 or array.shape[-1] % type.elements:
        raise ValueError(f"rows of shape {list(array.shape)} do not divide into blocks of {type.elements}")
    rows = quantize(np.ascontiguousarray(array, dtype=np.float32), GGMLQuantizationType(number))
    return {"blocks": rows.reshape(*array.shape[:-1], -1, type.nbytes)}


def _gguf() -> dict[str, Encoder]:
    by_name = {format.name: format for format in GGML_BLOCKS.values()}
    named = {name: f"GGUF {name}" if name in MICROSCALED else name for name in GGML_ENCODERS}
    own = {named[name]: Encoder(by_name[name], partial(_blocks, make)) for name, make in GGML_ENCODERS.items()}
    # gguf-py encodes no K-quant and no IQ type
    ternary = {d.name: Encoder(d, partial(_by_gguf_py, n)) for n, d in DELEGATED.items() if d.name.startswith("TQ")}
    return own | ternary


def _microscaled() -> dict[str, Encoder]:
    encoders: dict[str, Encoder] = {}
    for name, format in MICROSCALED.items():
        if name.startswith("MX") and name != "MXFP4_METAL":
            for rule, scale_rule in SCALE_RULES.items():
                encoder = Encoder(format, partial(encode_microscaled, encoding=format, scale_rule=scale_rule))
                encoders |= {f"{name}:{rule}": encoder} | ({name: encoder} if rule == "floor" else {})
    encoders["NVFP4"] = Encoder(NVFP4, partial(encode_microscaled, encoding=NVFP4, scale_rule=e4m3))
    encoders["FP4_F16"] = Encoder(FP4_F16, partial(encode_microscaled, encoding=FP4_F16, scale_rule=float16))
    return encoders


def _mlx() -> dict[str, Encoder]:
    makers = {"mxfp4": encode_mxfp4, "mxfp8": encode_mxfp8, "nvfp4": encode_nvfp4}
    encoders = {f"MLX {mode}": Encoder(MLX_MODES[mode], make) for mode, make in makers.items()}
    for bits in MLX_BITS:
        for group in MLX_GROUPS:
            for format in (BF16, F16, F32):
                encoding = AffineGroups(bits, group, format)
                name = encoding.name if format is BF16 else f"{encoding.name} {format.name}"
                encoders[name] = Encoder(encoding, partial(encode_affine, encoding=encoding))
    return encoders


def _all() -> dict[str, Encoder]:
    plain = {format.name: Encoder(format, partial(_plain, format)) for format in (F32, F16, BF16)}
    return plain | _gguf() | _microscaled() | _mlx()


ENCODERS = _all()


@dataclass(frozen=True)
class Accuracy:
    """What an encoding did to a tensor. An element's relative error is |decoded - original| / |original|.

    A zero that stays zero has none, one that does not has an infinite one. `sqnr_db` is 10 log10 of the power
    of the original over that of the error, infinite without error.
    """

    elements: int
    median_relative_error: float
    worst_relative_error: float
    worst_index: tuple[int, ...]
    sqnr_db: float

    def __str__(self) -> str:
        return (
            f"relative error {self.median_relative_error:.2e} median, {self.worst_relative_error:.2e} worst "
            f"(at {list(self.worst_index)}); SQNR {self.sqnr_db:.1f} dB"
        )


def accuracy(original: np.ndarray, decoded: np.ndarray) -> Accuracy:
    """Compare two arrays of one shape, at 4 bytes an element; ValueError for other shapes or no elements."""
    if original.shape != decoded.shape or original.size == 0:
        raise ValueError(f"cannot compare shapes {list(original.shape)} and {list(decoded.shape)}")
    sums = AccuracySums()
    relative = sums.add(original, decoded)
    return replace(sums.result(original.shape), median_relative_error=float(np.median(relative)))


class AccuracySums:
    """The accuracy of a tensor that passes in pieces, in order.

    Its median comes from a histogram of the relative errors' float32 codes without their last 12 bits, and so is at
    most one part in 2048 too small.
    """

    STEP = 1 << 20  # elements looked at together
    DROPPED = 12  # bits

    def __init__(self) -> None:
        self.elements, self.worst_at, self.worst = 0, 0, -1.0
        self.signal = self.noise = 0.0
        self.counts = np.zeros(1 << (31 - self.DROPPED), np.int64)

    def add(self, original: np.ndarray, decoded: np.ndarray) -> np.ndarray:
        """Count a piece; the relative errors of its elements, flat float32."""
        a, b = original.reshape(-1), decoded.reshape(-1)
        relative = np.empty(a.size, np.float32)
        for start in range(0, a.size, self.STEP):
            here = slice(start, start + self.STEP)
            x, error = a[here].astype(np.float64), np.abs(b[here] - a[here].astype(np.float64))
            self.signal, self.noise = self.signal + float(x @ x), self.noise + float(error @ error)
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                relative[here] = np.where(error == 0, 0, error / np.abs(x))
            codes = relative[here].view(np.uint32) >> self.DROPPED
            self.counts += np.bincount(codes, minlength=self.counts.size)
        at = int(relative.argmax())
        if relative[at] > self.worst:
            self.worst, self.worst_at = float(relative[at]), self.elements + at
        self.elements += a.size
        return relative

    def result(self, shape: tuple[int, ...]) -> Accuracy:
        """The record of a tensor of that shape, once all its elements were counted."""
        middle = np.array([(self.elements - 1) // 2, self.elements // 2])
        bins = np.searchsorted(np.cumsum(self.counts), middle, side="right")
        median = float((bins << self.DROPPED).astype(np.uint32).view(np.float32).mean())
        index = tuple(int(i) for i in np.unravel_index(self.worst_at, shape))
        with np.errstate(divide="ignore", invalid="ignore"):
            sqnr = np.inf if self.noise == 0 else float(10 * np.log10(np.float64(self.signal) / self.noise))
        return Accuracy(self.elements, median, self.worst, index, float(sqnr))
