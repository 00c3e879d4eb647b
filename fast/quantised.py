"""Which weights the CPU path's mode q8 multiplies with inputs rounded to int8; needs no Numba to say."""

from assay.reference.weights import Tensor

BLOCK = 32
ENCODINGS = ("MXFP4", "Q8_0", "Q4_0", "Q4_1", "affine4", "affine8")


def quantises_inputs(tensor: Tensor) -> bool:
    """Whether the tensor's encoding has one scale for each whole block of 32 elements, or for several."""
    name, _, group = tensor.encoding.name.partition("/")
    return name in ENCODINGS and int(group or BLOCK) % BLOCK == 0 and tensor.shape[-1] % BLOCK == 0
