"""Matrices as MLX multiplies by them: plain or quantised, alone or in a stack."""

from dataclasses import dataclass

import mlx.core as mx


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
        return mx.gather_mm(x, self.weight.swapaxes(-1, -2), rhs_indices=ids, sorted_indices=in_order)


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

    def rows(self, ids: mx.array) -> mx.array:
        """Rows by id, decoded: [...] -> [...,I]."""
        biases = None if self.biases is None else self.biases[ids]
        return mx.dequantize(
            self.weight[ids], self.scales[ids], biases, group_size=self.group_size, bits=self.bits, mode=self.mode
        )

    def multiply(self, x: mx.array, bias: mx.array | None) -> mx.array:
        """x W^T + b: [...,I] -> [...,O]."""
        y = mx.quantized_matmul(
            x.astype(self.compute),
            self.weight,
            self.scales,
            self.biases,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )
        return y if bias is None else y + bias

    def gathered(self, x: mx.array, ids: mx.array, in_order: bool) -> mx.array:
        """Each row through the matrix of the stack with its id: [...,1,I] -> [...,1,O]; `in_order` if ids ascend."""
        return mx.gather_qmm(
            x.astype(self.compute),
            self.weight,
            self.scales,
            self.biases,
            rhs_indices=ids,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=in_order,
        )


@dataclass(frozen=True)
class Linear:
    """A projection with its bias [O], or a stack of them with biases [N,O]; results are rounded to `dtype`."""

    matrix: Plain | Quantised
    bias: mx.array | None
    dtype: mx.Dtype

    def __call__(self, x: mx.array) -> mx.array:
        """[...,I] -> [...,O]."""
        return self.matrix.multiply(x, self.bias).astype(self.dtype)

    def by_expert(self, x: mx.array, ids: mx.array, in_order: bool) -> mx.array:
        """Each row through its expert: x [P,1,I] or [P,1,1,I], ids [P] or [P,A] -> [P,1,O] or [P,A,1,O]."""
        y = self.matrix.gathered(x, ids, in_order)
        return (y if self.bias is None else y + self.bias[ids][..., None, :]).astype(self.dtype)
