"""Random checkpoints with the shapes of released models: speed and memory measured without a download.

Values are normal, scaled so that activations stay of the order of one. A pool of 2 million of them is made and encoded
once for each encoding and scale; the rows of every tensor are slices of a pool from places that depend on the seed,
the tensor's name and the row. So 12 GB take as long as writing them; but stretches of values do repeat, and a
compressing disk or a cache that looks for equal pages would notice.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from assay.loaders.atomic import check_free, check_room
from assay.loaders.convert import SHARD_BYTES, Progress, write_directory, write_gguf_checkpoint
from assay.loaders.errors import CheckpointError
from assay.loaders.quantise import encoder_of
from assay.loaders.registry import Shape
from assay.loaders.weight import Parts, Weight, group_of
from assay.loaders.write_gguf import is_gguf_vector
from assay.loaders.write_tokenizer import gguf_token_ids, write_tokenizer_files
from assay.reference.config import Config
from assay.reference.weights import weight_shapes

POOL = 1 << 21  # values
# encoders of the experts and of the other matrices, as the published files have them: OpenAI's and ggml-org's for
# gpt-oss, mlx-lm's 8-bit conversion
DEFAULTS = {
    "gguf": ("GGUF MXFP4", "Q8_0"),
    "safetensors": ("MXFP4", "BF16"),
    "mlx": ("MLX mxfp4", "affine8/64"),
}
# Standard deviation of a matrix's entries times the square root of its columns. With inputs of unit size, scores and
# router logits are about +-1, the two halves of the feed-forward too; what a block adds to the stream is about 0.5.
GAINS = {"embed_tokens": 3.0, "lm_head": 3.0, "router": 2.0, "o_proj": 0.5, "down_proj": 0.5}
# mean and standard deviation of vectors, by the end of their name
VECTORS = {"norm.weight": (1.0, 0.1), "sinks": (0.0, 1.0), "bias": (0.0, 0.1)}
COMMON_PAIRS = "\u0120 t|h e|\u0120t he|i n|e r|o n|\u0120 a|r e|a n|\u0120a n|\u0120an d|in g|\u0120 o|\u0120o f|o r"


@dataclass(frozen=True)
class Pool:
    """Encoded values: parts [groups, ...] of `elements` values a group."""

    parts: Parts
    elements: int
    groups: int

    def rows(self, start: int, rows: int, columns: int) -> Parts:
        """Parts [rows, ...] of rows of that many values, from a group on, and from the first again after the last."""
        per_row = columns // self.elements
        count = rows * per_row
        if start + count > self.groups:
            places = np.arange(start, start + count) % self.groups
            taken = {name: part[places] for name, part in self.parts.items()}
        else:
            taken = {name: part[start : start + count] for name, part in self.parts.items()}
        return {name: _as_rows(name, part, rows) for name, part in taken.items()}


def _as_rows(name: str, part: np.ndarray, rows: int) -> np.ndarray:
    """[rows*n, x] as [rows, n, x] for blocks, [rows, n*x] for the other parts."""
    return part.reshape(rows, -1, part.shape[-1]) if name == "blocks" else part.reshape(rows, -1)


@cache
def pool_of(encoder: str, mean: float, deviation: float, seed: int) -> Pool:
    """Normal values of that mean and standard deviation, encoded."""
    made = encoder_of(encoder)
    group = max(64, group_of(made.encoding))  # a multiple of every group of 32 or 16, and what MLX's default needs
    values = np.random.default_rng([seed, 0]).standard_normal((POOL // group, group), np.float32)
    values = values * np.float32(deviation) + np.float32(mean)
    parts = made.encode(values)
    return Pool({name: part.reshape(len(values), *part.shape[1:]) for name, part in parts.items()}, group, len(values))


def random_weight(name: str, shape: tuple[int, ...], encoder: str, seed: int) -> Weight:
    """A weight of random values; row i of an expert is the same however many rows are read at a time."""
    if len(shape) == 1 or not name.endswith(".weight"):
        mean, deviation = next(scale for end, scale in VECTORS.items() if name.endswith(end))
        return _random_vector(name, shape, encoder, seed, mean, deviation)
    gain = next((gain for end, gain in GAINS.items() if end in name), 1.0)
    pool = pool_of(encoder, 0.0, gain / math.sqrt(shape[-1]), seed)
    *experts, rows_of_one, columns = shape
    starts = np.random.default_rng([seed, zlib.crc32(name.encode())]).integers(pool.groups, size=math.prod(experts))

    def pieces(rows: int) -> Iterator[Parts]:
        for start in starts.tolist():
            for row in range(0, rows_of_one, rows):
                group = (start + row * (columns // pool.elements)) % pool.groups
                yield pool.rows(group, min(rows, rows_of_one - row), columns)

    return Weight(name, shape, encoder_of(encoder).encoding, pieces)


def _random_vector(name: str, shape: tuple[int, ...], encoder: str, seed: int, mean: float, deviation: float) -> Weight:
    def pieces(rows: int) -> Iterator[Parts]:
        noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
        values = noise * np.float32(deviation) + np.float32(mean)
        for start in range(0, shape[0], rows if len(shape) > 1 else shape[0]):
            yield encoder_of(encoder).encode(values[start : start + rows] if len(shape) > 1 else values)

    return Weight(name, shape, encoder_of(encoder).encoding, pieces)


def random_weights(config: Config, to: str, encoder: str | None, seed: int) -> dict[str, Weight]:
    """Every weight of a config in the encodings that the container's published files have.

    `encoder` replaces the one of the matrices outside the experts.
    """
    of_experts, of_matrices = DEFAULTS[to]
    of_matrices = encoder or of_matrices
    vectors = "F32" if to == "gguf" else "BF16"
    weights = {}
    for name, shape in weight_shapes(config).items():
        if len(shape) == 3:
            chosen = of_experts
        elif (to == "gguf" and is_gguf_vector(name)) or len(shape) == 1 or not name.endswith(".weight"):
            chosen = vectors
        else:
            chosen = of_matrices
            _check_rows(name, shape, chosen)
        weights[name] = random_weight(name, shape, chosen, seed)
    return weights


def _check_rows(name: str, shape: tuple[int, ...], encoder: str) -> None:
    """Raise CheckpointError if a matrix cannot be made of whole groups."""
    encoding = encoder_of(encoder).encoding
    if shape[-1] % group_of(encoding):
        raise CheckpointError(
            f"{name} has no room for {encoding.name}",
            expected=f"rows of a multiple of {group_of(encoding)}",
            got=shape[-1],
            remedy="choose another --quant",
        )


def synthetic_tokenizer(shape: Shape) -> dict[str, Any]:
    """GGUF metadata of a byte-level tokenizer that encodes any text: bytes, a few merges, and filler up to the size."""
    from tokenizers import pre_tokenizers

    merges = COMMON_PAIRS.split("|")
    ordinary = iter([*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)])
    filler = (f"\u0120w{i}" for i in range(shape.config.vocab_size))
    tokens, types = [], np.ones(shape.config.vocab_size, np.int32)
    for i in range(shape.config.vocab_size):
        if i in shape.special_tokens:
            types[i] = 3  # control
            tokens.append(shape.special_tokens[i])
        else:
            tokens.append(next(ordinary, None) or next(filler))
    values = {
        "model": "gpt2",
        "pre": shape.pre_tokenizer,
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
        "bos_token_id": shape.bos,
        "eos_token_id": shape.eos,
        "padding_token_id": shape.pad,
        "add_bos_token": False,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def synth(
    shape: Shape,
    target: Path,
    to: str,
    *,
    layers: int | None = None,
    seed: int = 0,
    encoder: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> int:
    """Write a random checkpoint of a shape, `layers` of its layers, as gguf, safetensors or mlx; answers its bytes.

    Raises CheckpointError as `convert` does.
    """
    from assay.loaders.tokenizer import tokenizer_from_gguf

    check_free(target, force)
    config = shape.shortened(layers)
    weights = random_weights(config, to, encoder, seed)
    total = sum(weight.nbytes for weight in weights.values())
    check_room(target, total)
    done = 0

    def written(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("writing", done, total)

    tokenizer = synthetic_tokenizer(shape)
    if to == "gguf":
        metadata = {"general.name": f"random {shape.source}", **tokenizer}
        write_gguf_checkpoint(target, config, shape.model_type, weights, metadata, written)
    else:
        write_directory(
            target,
            config,
            shape.model_type,
            to,
            weights,
            gguf_token_ids(tokenizer),
            shard_bytes,
            written,
            lambda directory: write_tokenizer_files(tokenizer, tokenizer_from_gguf(tokenizer), directory),
        )
    return total
