"""Which weights the CPU path's mode q8 multiplies with inputs rounded to int8; needs no Numba to say."""

from assay.reference.weights import Tensor

BLOCK, SUPERBLOCK = 32, 256
ENCODINGS = ("MXFP4", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "affine4", "affine8")
SUPERBLOCK_ENCODINGS = ("Q4_K", "Q5_K", "Q6_K")


def input_block(tensor: Tensor) -> int:
    """How many inputs of the tensor's products are rounded with one scale: 32, for K-quants 256, or 0 for none.

    An encoding must have one scale for each whole block of 32 elements, or for several, and whole blocks of inputs.
    """
    name, _, group = tensor.encoding.name.partition("/")
    if name in SUPERBLOCK_ENCODINGS:
        return SUPERBLOCK
    fits = name in ENCODINGS and int(group or BLOCK) % BLOCK == 0 and tensor.shape[-1] % BLOCK == 0
    return BLOCK if fits else 0
