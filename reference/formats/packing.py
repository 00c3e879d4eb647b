"""Small integers packed into bytes, least significant bits first: the order of Hugging Face, MLX and ours.

8 codes of `bits` bits fill `bits` bytes exactly, so 3, 5 and 6 bits, which cross bytes, need no special case.
"""

import numpy as np


def unpack_codes(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes of 1 to 8 bits from bytes, uint8 [..., B] -> uint8 [..., 8B/bits]; B a multiple of `bits` or bits of 8."""
    if 8 % bits == 0:
        codes = packed[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & np.uint8(2**bits - 1)
    else:
        eights = packed.reshape(*packed.shape[:-1], -1, bits).astype(np.uint64)
        words = np.bitwise_or.reduce(eights << np.arange(0, 8 * bits, 8, dtype=np.uint64), axis=-1)
        codes = words[..., None] >> np.arange(0, 8 * bits, bits, dtype=np.uint64) & np.uint64(2**bits - 1)
    return codes.astype(np.uint8, copy=False).reshape(*packed.shape[:-1], -1)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """The inverse: codes below 2**bits, uint8 [..., M] -> uint8 [..., M*bits/8]; M a multiple of 8."""
    eights = codes.reshape(*codes.shape[:-1], -1, 8).astype(np.uint64)
    words = np.bitwise_or.reduce(eights << np.arange(0, 8 * bits, bits, dtype=np.uint64), axis=-1)
    packed = words[..., None] >> np.arange(0, 8 * bits, 8, dtype=np.uint64) & np.uint64(0xFF)
    return packed.astype(np.uint8).reshape(*codes.shape[:-1], -1)


def as_bytes(part: np.ndarray) -> np.ndarray:
    """The bytes of an array along its last axis: [..., W] of any dtype -> uint8 [..., W*itemsize]."""
    return np.ascontiguousarray(part).view(np.uint8)


def split_half_nibbles(packed: np.ndarray) -> np.ndarray:
    """ggml's order of 4-bit codes: all low nibbles of [..., B] bytes, then all high ones; [..., 2B]."""
    return np.concatenate((packed & 0x0F, packed >> 4), axis=-1)


def pack_split_half(codes: np.ndarray) -> np.ndarray:
    """The inverse: element j and the one half a row later share byte j; uint8 [..., 2B] -> [..., B]."""
    half = codes.shape[-1] // 2
    return codes[..., :half] | codes[..., half:] << 4
