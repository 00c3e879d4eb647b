"""A model's weights as records of addresses, which one compiled function can walk; and views of them inside it."""

import numpy as np

from assay.fast.cpu.attention import attend_some
from assay.fast.cpu.cache import CpuCache, empty_slots
from assay.fast.cpu.decode import decode_row_at
from assay.fast.cpu.jit import Address, address_of, piece
from assay.fast.cpu.linear import rows_times_one
from assay.fast.cpu.phases import address, bytes_at, codes_at, floats_at, int32s_at, int64s_at
from assay.fast.cpu.products import IN_REGISTERS, ROWS_BY_TILE, ROWS_IN_REGISTERS
from assay.fast.cpu.quantise import BLOCK, NO_ROWS, Panels, empty_columns, quantise_column
from assay.fast.cpu.rows import Rows
from assay.fast.cpu.weights import Linear, Weights
from assay.reference.config import Config, GptOssConfig

ROWS = np.dtype(
    [
        *((name, np.int64) for name in ("kind", "columns", "groups", "side_kind")),
        *(
            (part + field, np.int64)
            for part in ("codes", "scales", "biases")
            for field in ("", "_size", "_stride", "_bytes")
        ),
    ]
)
ROWS_TIMES_ONE, QUANTISE_COLUMN = Address(rows_times_one), Address(quantise_column)
KERNELS = ("rows_in_registers", "rows_by_tile", "rows_times_one", "decode_row", "quantise_column")  # and where they lie
# `column`: which of the quantised inputs it takes; `prepares`: whether those are to be formed for it, or are there
MATRIX = np.dtype(
    [
        ("rows", ROWS),
        *((name, np.int64) for name in ("stack", "outputs", "bias", "quantised", "column", "prepares", "no_rows")),
        *((name, np.int64) for name in ("in_registers", *KERNELS)),
    ]
)
NAMES = ("q", "k", "v", "o", "router", "gate", "up", "down")
LAYER = np.dtype(
    [*((name, MATRIX) for name in NAMES), *((name, np.int64) for name in ("attn_norm", "mlp_norm", "sinks"))]
)
MODEL = np.dtype(
    [
        ("embed", ROWS),
        ("head", MATRIX),
        *((name, np.int64) for name in ("final_norm", "D", "H", "K", "C", "F", "A", "N", "decode_row", "attend_some")),
        ("eps", np.float64),
        ("alpha", np.float32),
        ("limit", np.float32),
    ]
)
PAST = np.dtype([(name, np.int64) for name in ("k", "v", "blocks", "window", "half")])
PANELS = np.dtype([(part + field, np.int64) for part in Panels._fields for field in ("", "_size")])


def _rows(rows: Rows) -> tuple[int, ...]:
    parts = (
        (rows.codes, rows.codes_stride, rows.codes_bytes),
        (rows.scales, rows.scales_stride, rows.scales_bytes),
        (rows.biases, rows.biases_stride, rows.biases_bytes),
    )
    fields = [(address(data), data.size, stride, length) for data, stride, length in parts]
    return (rows.kind, rows.columns, rows.groups, rows.side_kind, *(number for part in fields for number in part))


def _kernels(rows: Rows) -> tuple[int, ...]:
    """Where the kernels of a product lie: called there, they are compiled once and not into every caller anew."""
    columns, x, place = empty_columns(1, BLOCK), np.zeros(BLOCK, np.float32), np.int64(0)
    some = (rows, place, place, place)
    return (
        bool(IN_REGISTERS[rows.kind]),
        ROWS_IN_REGISTERS.of((*some, columns, place, x, x)),
        ROWS_BY_TILE.of((*some, columns, place, place, NO_ROWS, x, x[None])),
        ROWS_TIMES_ONE.of((place, *some, x, x, x)),
        decode_row_at(),
        QUANTISE_COLUMN.of((x, place, place, columns)),
    )


def _matrix(linear: Linear, before: tuple[Linear, ...] = ()) -> tuple:
    """A matrix that shares its input with those before it: quantised once for all of the same kind."""
    kinds = [other.rows.kind for other in before if other.quantised]
    kind, stack = linear.rows.kind, len(linear.bias)
    shared = linear.quantised and kind in kinds
    column = [other.rows.kind for other in before].index(kind) if shared else len(before)
    return (
        _rows(linear.rows),
        *(stack, linear.bias.shape[1], address(linear.bias), linear.quantised, column, linear.quantised and not shared),
        address(NO_ROWS),
        *_kernels(linear.rows),
    )


def layer_records(weights: Weights) -> np.ndarray:
    """One record a layer. `weights` must outlive them."""
    records = np.zeros(len(weights.layers), LAYER)
    for record, layer in zip(records, weights.layers, strict=True):
        for name, before in (("q", ""), ("k", "q"), ("v", "qk"), ("o", ""), ("down", "")):
            record[name] = _matrix(getattr(layer, name), tuple(getattr(layer, other) for other in before))
        record["gate"], record["up"] = _matrix(layer.gate), _matrix(layer.up, (layer.gate,))
        if layer.router is not None:
            record["router"] = _matrix(layer.router, (layer.gate, layer.up))
        for name in ("attn_norm", "mlp_norm", "sinks"):
            record[name] = address(getattr(layer, name))
    return records


def model_record(config: Config, weights: Weights) -> np.ndarray:
    """The rest of the model, one record. `weights` must outlive it."""
    record = np.zeros(1, MODEL)
    record["embed"], record["head"] = _rows(weights.embed.rows), _matrix(weights.head)
    record["final_norm"], record["eps"] = address(weights.final_norm), config.rms_norm_eps
    record["D"], record["F"] = config.hidden_size, config.intermediate_size
    record["H"], record["K"] = config.num_attention_heads, config.num_key_value_heads
    record["C"], record["A"], record["N"] = config.head_dim, 1, 0
    vector, place = np.zeros(1, np.float32), np.int64(0)
    slots = empty_slots(1, 1, 1, np.dtype(np.float32))
    record["decode_row"] = decode_row_at()
    queries = (vector, place, place, vector, place, place)
    record["attend_some"] = address_of(attend_some, (*queries, slots.in_bytes(), *[place] * 4, vector))
    if isinstance(config, GptOssConfig):
        record["A"], record["N"] = config.num_experts_per_tok, config.num_local_experts
        record["alpha"], record["limit"] = config.swiglu_alpha, config.swiglu_limit
    return record


def panels_record(panels: Panels) -> tuple[int, ...]:
    """Where quantised inputs lie; they must outlive it."""
    return tuple(number for part in panels for number in (address(part), part.size))


def past_records(cache: CpuCache) -> np.ndarray:
    """Where each layer's slots lie now; the cache must outlive them and not grow."""
    records = np.zeros(len(cache.layers), PAST)
    for i, layer in enumerate(cache.layers):
        slots = layer.slots
        half = slots.v.dtype == np.float16
        records[i] = (address(slots.k), address(slots.v), len(slots.k), layer.window, half)
    return records


@piece
def rows_of(record):
    """A record's rows, for the kernels that take them."""
    return Rows(
        record.kind,
        record.columns,
        record.groups,
        record.side_kind,
        bytes_at(record.codes, record.codes_size),
        record.codes_stride,
        record.codes_bytes,
        bytes_at(record.scales, record.scales_size),
        record.scales_stride,
        record.scales_bytes,
        bytes_at(record.biases, record.biases_size),
        record.biases_stride,
        record.biases_bytes,
    )


@piece
def bias_of(matrix):
    """A matrix's biases, one row of the stack after the other."""
    return floats_at(matrix.bias, matrix.stack * matrix.outputs)


@piece
def panels_of(record):
    """A record's quantised inputs."""
    return Panels(
        codes_at(record.codes, record.codes_size),
        floats_at(record.scale, record.scale_size),
        int32s_at(record.correction, record.correction_size),
        floats_at(record.sums, record.sums_size),
        int64s_at(record.column, record.column_size),
        int64s_at(record.at, record.at_size),
        int64s_at(record.first_panel, record.first_panel_size),
    )
