"""Matrices as MLX multiplies by them: plain or quantised, alone or in a stack."""

from dataclasses import dataclass
from math import gcd, prod
from typing import TypeAlias

import mlx.core as mx

from assay.fast.metal.ops import on_cpu
from assay.fast.metal.shares import in_shares

PANEL = 128  # rows: with 2880 columns 1.5 MB; 64 and 256 measured alike
DECODED_FROM = 8  # rows from which on the CPU decodes an affine matrix: twice as fast with 64, alike with 8
DECODED_AT_A_TIME = 1 << 22  # values


@dataclass(frozen=True)
class Plain:
    """A matrix [O,I], or a stack of them [N,O,I], in a float dtype."""

    weight: mx.array

    def rows(self, ids: mx.array) -> mx.array:
        """Rows by id: [...] -> [...,I]."""
        return self.weight[ids]

    def multiply(self, x: mx.array, bias: mx.array | None) -> mx.array:
        """x W^T + b: [...,I] -> [...,O]."""
        return x @ self.weight.T if bias is None else mx.addmm(bias, x, self.weight.T)

    def gathered(self, x: mx.array, ids: mx.array, in_order: bool) -> mx.array:
        """Each row through the matrix of the stack with its id: [...,1,I] -> [...,1,O]; `in_order` if ids ascend."""
        turned = self.weight.swapaxes(-1, -2)
        return in_shares(
            lambda share: mx.gather_mm(x[share], turned, rhs_indices=ids[share], sorted_indices=in_order),
            len(x),
            x.size * self.weight.shape[1],
            axis=0,
        )


@dataclass(frozen=True)
class Panels:
    """A plain matrix [O,I] for the CPU: float32, turned, in panels of a few rows [P,I,O/P].

    There MLX hands products in float32 to the reference BLAS, which adds to a row of a panel at once, but up to one
    number of [O,I] at a time: 2 times as fast for one row of x, 2.3 times for 64, and panels stay in the processor's
    cache. The sums are the same, bit for bit. MLX's own products of bfloat16 matrices take up to 1.1 times as long for
    many rows, 2 times for one.
    """

    weight: mx.array

    @classmethod
    def of(cls, weight: mx.array) -> "Panels":
        """From [O,I]."""
        O, I = weight.shape  # noqa: E741
        width = gcd(O, PANEL)
        panels = weight.reshape(-1, width if width > 16 else O, I).swapaxes(1, 2)
        return cls(mx.contiguous(panels).astype(mx.float32))

    def rows(self, ids: mx.array) -> mx.array:
        """Rows of [O,I] by id: [...] -> [...,I]."""
        width = self.weight.shape[2]
        return self.weight[ids // width, :, ids % width]

    def multiply(self, x: mx.array, bias: mx.array | None) -> mx.array:
        """x W^T + b, in float32: [...,I] -> [...,O]."""
        work = prod(x.shape[:-1]) * self.weight.size
        y = in_shares(lambda share: Panels(self.weight[share]).product(x), len(self.weight), work, axis=-1)
        return y if bias is None else y + bias

    def product(self, x: mx.array) -> mx.array:
        """x W^T, in float32, on one thread."""
        y_PRo = x.reshape(-1, x.shape[-1]).astype(mx.float32) @ self.weight
        return y_PRo.swapaxes(0, 1).reshape(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Quantised:
    """A matrix, or a stack, in one of MLX's quantised layouts; `compute` is the dtype of the product's inputs.

    MLX's Metal kernels add up in float32 whatever goes in. Its CPU kernels add up in the dtype of their
    inputs, unless built for Arm, so there everything goes in as float32.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: str
    compute: mx.Dtype

    def rows(self, ids: mx.array | slice) -> mx.array:
        """Rows by id, decoded: [...] -> [...,I]."""
        biases = None if self.biases is None else self.biases[ids]
        return mx.dequantize(
            self.weight[ids], self.scales[ids], biases, group_size=self.group_size, bits=self.bits, mode=self.mode
        )

    def multiply(self, x: mx.array, bias: mx.array | None) -> mx.array:
        """x W^T + b: [...,I] -> [...,O]."""
        x = x.astype(self.compute)
        decoded = self.mode == "affine" and prod(x.shape[:-1]) >= DECODED_FROM and on_cpu()
        product, unit = (self._decoded_product, PANEL) if decoded else (self._product, 1)
        O = len(self.weight)  # noqa: E741
        y = in_shares(lambda share: product(x, share), O, x.size * O, axis=-1, unit=unit)
        return y if bias is None else y + bias

    def _product(self, x: mx.array, share: slice) -> mx.array:
        """x W^T, of a share of W's rows."""
        return mx.quantized_matmul(
            x,
            self.weight[share],
            self.scales[share],
            None if self.biases is None else self.biases[share],
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )

    def _decoded_product(self, x: mx.array, share: slice) -> mx.array:
        """As `_product`, bit for bit, from decoded panels."""
        step = max(1, DECODED_AT_A_TIME // x.shape[-1] // PANEL) * PANEL
        starts = range(share.start, share.stop, step)
        pieces = [self.rows(slice(start, min(start + step, share.stop))) for start in starts]
        return mx.concatenate([Panels.of(piece).product(x) for piece in pieces], axis=-1)

    def gathered(self, x: mx.array, ids: mx.array, in_order: bool) -> mx.array:
        """Each row through the matrix of the stack with its id: [...,1,I] -> [...,1,O]; `in_order` if ids ascend."""
        x = x.astype(self.compute)

        def product(share: slice) -> mx.array:
            return mx.gather_qmm(
                x[share],
                self.weight,
                self.scales,
                self.biases,
                rhs_indices=ids[share],
                transpose=True,
                group_size=self.group_size,
                bits=self.bits,
                mode=self.mode,
                sorted_indices=in_order,
            )

        return in_shares(product, len(x), x.size * self.weight.shape[1], axis=0)


Matrix: TypeAlias = Plain | Panels | Quantised


@dataclass(frozen=True)
class Linear:
    """A projection with its bias [O], or a stack of them with biases [N,O]; results are rounded to `dtype`."""

    matrix: Matrix
    bias: mx.array | None
    dtype: mx.Dtype

    def __call__(self, x: mx.array) -> mx.array:
        """[...,I] -> [...,O]."""
        return self.matrix.multiply(x, self.bias).astype(self.dtype)

    def by_expert(self, x: mx.array, ids: mx.array, in_order: bool) -> mx.array:
        """Each row through its expert: x [P,1,I] or [P,1,1,I], ids [P] or [P,A] -> [P,1,O] or [P,A,1,O]."""
        assert not isinstance(self.matrix, Panels)  # of single matrices only
        y = self.matrix.gathered(x, ids, in_order)
        return (y if self.bias is None else y + self.bias[ids][..., None, :]).astype(self.dtype)
