"""One token through the whole model in one compiled function: no Python, and one parallel region, between its steps.

The steps are those of `engine.block` on the same leaf kernels, cut into phases of independent jobs (`phases.py`).
Every tap is written, always: into the same few rows layer after layer, or, when somebody looks, into a row a layer.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from assay.fast.cpu.attention import TOGETHER, heads_of_job
from assay.fast.cpu.cache import LANES, CpuCache, Slots
from assay.fast.cpu.decode import float_to_half
from assay.fast.cpu.jit import CHECKED, address_of, get_num_threads, kernel, leaf, parallel_kernel, piece, prange
from assay.fast.cpu.ops import choose, clamped_swiglu_of, norm_row, rope_head, swiglu_of, weigh, weighted_row
from assay.fast.cpu.phases import (
    TAKEN,
    address,
    call_at,
    codes_at,
    finish,
    floats_at,
    halfwords_at,
    int64s_at,
    new_counters,
    take,
    wait,
)
from assay.fast.cpu.quantise import NO_ROWS, Panels, empty_columns
from assay.fast.cpu.records import (
    LAYER,
    MODEL,
    PANELS,
    PAST,
    bias_of,
    layer_records,
    model_record,
    panels_of,
    panels_record,
    past_records,
    rows_of,
)
from assay.fast.cpu.weights import Linear, Weights
from assay.reference.config import Config, GptOssConfig
from assay.reference.taps import tap_table

EMBED, NORM, QKV, TURN, ATTEND, HEADS, OUT, MLP_NORM, ROUTER, CHOOSE, GATE_UP, ACT, DOWN, FINAL_NORM, HEAD = range(15)
LEAST_BYTES = 1 << 14  # of weights in a job: some 1 us, ten times what handing out a job costs
JOBS_A_THREAD = 2  # of a phase: few, for a job that reads but 9 KB ends when the prefetching of its rows begins to pay


class Taps(NamedTuple):
    """A token's taps, [1 or L, elements]; of a mixture of experts gate, up and act hold the chosen ones' in turn."""

    embed: np.ndarray
    attn_norm: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    q_rope: np.ndarray
    k_rope: np.ndarray
    attn_heads: np.ndarray
    attn_out: np.ndarray
    attn_residual: np.ndarray
    mlp_norm: np.ndarray
    router_logits: np.ndarray
    expert_ids: np.ndarray
    expert_weights: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    act: np.ndarray
    expert_out: np.ndarray
    mlp_out: np.ndarray
    block_out: np.ndarray
    final_norm: np.ndarray
    logits: np.ndarray


@piece
def project(matrix, i, first, last, x, inputs, column, y):
    """Outputs first .. last of matrix i of a stack; from a column of the quantised inputs, if it takes these."""
    if first >= last:
        return
    rows, count, n = rows_of(matrix.rows), last - first, matrix.outputs
    bias = bias_of(matrix)[i * n : (i + 1) * n]
    if not matrix.quantised:
        call_at(matrix.rows_times_one, (matrix.decode_row, rows, i * n, first, count, x, bias, y))
    elif matrix.in_registers:
        call_at(matrix.rows_in_registers, (rows, i * n, first, count, inputs, column, bias, y))
    else:
        y_1O, y_row, end = y.reshape((1, len(y))), int64s_at(matrix.no_rows, len(NO_ROWS)), column + 1
        call_at(matrix.rows_by_tile, (rows, i * n, first, count, inputs, column, end, y_row, bias, y_1O))


@leaf
def prepare(matrix, x, column, inputs):
    """Quantise an input for a matrix, if no other has done so."""
    if matrix.prepares:
        call_at(matrix.quantise_column, (x, matrix.rows.kind, column, inputs))


@piece
def queries_keys_values(layer, first, last, x, inputs, q, k, v):
    """Rows first .. last of the three matrices, one below the other."""
    Q, K = layer.q.outputs, layer.k.outputs
    project(layer.q, np.int64(0), first, min(last, Q), x, inputs, layer.q.column, q)
    project(layer.k, np.int64(0), max(first - Q, 0), min(last - Q, K), x, inputs, layer.k.column, k)
    project(layer.v, np.int64(0), max(first - Q - K, 0), last - Q - K, x, inputs, layer.v.column, v)


@leaf
def keep(past, K, C, slot, h, key, value):
    """One head's key and value to their slot."""
    n = past.blocks * LANES * K * C
    k_at, v_at = ((slot // LANES * K + h) * C) * LANES + slot % LANES, (slot * K + h) * C
    if past.half:
        half_keys, half_values = halfwords_at(past.k, n), halfwords_at(past.v, n)
        for c in range(C):
            half_keys[k_at + c * LANES], half_values[v_at + c] = float_to_half(key[c]), float_to_half(value[c])
    else:
        keys, values = floats_at(past.k, n), floats_at(past.v, n)
        for c in range(C):
            keys[k_at + c * LANES], values[v_at + c] = key[c], value[c]


@leaf
def turn_and_keep(model, past, position, cos, sin, q, k, v, q_rope, k_rope):
    """RoPE, and the token's key and value to their slot: of a ring, the one that no query sees any more."""
    K, C = model.K, model.C
    for h in range(model.H):
        rope_head(q[h * C : (h + 1) * C], cos, sin, q_rope[h * C : (h + 1) * C])
    for h in range(K):
        part = slice(h * C, (h + 1) * C)
        rope_head(k[part], cos, sin, k_rope[part])
        keep(past, K, C, position % (past.blocks * LANES), h, k_rope[part], v[part])


@piece
def attend_group(model, layer, past, position, job, q_rope, out):
    """Some query heads of one key head over what the cache holds, the token itself included."""
    K, C, G = model.K, model.C, model.H // model.K
    n = past.blocks * LANES * K * C * (2 if past.half else 4)
    slots = Slots(codes_at(past.k, n), codes_at(past.v, n), past.blocks, K, past.half != 0)
    head, h, some = heads_of_job(job, G)
    first = max(np.int64(0), position + 1 - past.window)  # the window counts the query's own position
    queries = (q_rope, h * C, C, floats_at(layer.sinks, model.H), h, some)
    call_at(model.attend_some, (*queries, slots, np.int64(0), first, position, head, out))


@piece
def gate_and_up(model, layer, job, step, x, inputs, ids, gate, up, act):
    """Part of the gate and up rows of one expert, or of the dense matrices, and their activation."""
    F = model.F
    parts = (F + step - 1) // step
    a, first = job // parts, job % parts * step
    last = min(first + step, F)
    e = ids[a] if model.N else 0
    begin, end = a * F + first, a * F + last
    project(layer.gate, e, first, last, x, inputs, layer.gate.column, gate[a * F : (a + 1) * F])
    project(layer.up, e, first, last, x, inputs, layer.up.column, up[a * F : (a + 1) * F])
    if model.N:
        clamped_swiglu_of(gate[begin:end], up[begin:end], model.alpha, model.limit, act[begin:end])
    else:
        swiglu_of(gate[begin:end], up[begin:end], act[begin:end])


@piece
def down(model, layer, first, last, act, inputs, ids, weights, residual, expert_out, mlp_out, block_out):
    """Some rows of the feed-forward's output and of the block's."""
    D, F = model.D, model.F
    if model.N:
        for a in range(model.A):
            x, y = act[a * F : (a + 1) * F], expert_out[a * D : (a + 1) * D]
            project(layer.down, ids[a], first, last, x, inputs, a, y)
        for r in range(first, last):
            mlp_out[r] = 0
        for a in range(model.A):
            weighted_row(weights[a], expert_out[a * D + first : a * D + last], mlp_out[first:last])
    else:
        project(layer.down, np.int64(0), first, last, act, inputs, np.int64(0), mlp_out)
    for r in range(first, last):
        block_out[r] = residual[r] + mlp_out[r]


@piece
def tap(work, address, i, width):
    """A layer's row of a tap of so many elements."""
    return floats_at(address + 4 * width * i * work.layer_rows, width)


@piece
def run_job(phase, i, job, step, model, layer, past, work, token, position, cos, sin):
    """One job of a phase of layer i. Views of bare addresses: to count references to arrays would cost more."""
    D, Q, K, AF = model.D, model.H * model.C, model.K * model.C, model.A * model.F
    before = tap(work, work.block_out, i - 1, D) if i > 0 else floats_at(work.embed, D)
    attn_norm, attn_heads = tap(work, work.attn_norm, i, D), tap(work, work.attn_heads, i, Q)
    q, k, v = tap(work, work.q, i, Q), tap(work, work.k, i, K), tap(work, work.v, i, K)
    q_rope, mlp_norm = tap(work, work.q_rope, i, Q), tap(work, work.mlp_norm, i, D)
    residual, act = tap(work, work.attn_residual, i, D), tap(work, work.act, i, AF)
    router_logits, weights = tap(work, work.router_logits, i, model.N), tap(work, work.expert_weights, i, model.A)
    ids = int64s_at(work.expert_ids + 8 * model.A * i * work.layer_rows, model.A)
    in_D, first = panels_of(work.in_D), job * step
    if phase == EMBED:
        call_at(model.decode_row, (rows_of(model.embed), token, floats_at(work.embed, D)))
    elif phase == NORM:
        norm_row(before, floats_at(layer.attn_norm, D), model.eps, attn_norm)
        prepare(layer.q, attn_norm, layer.q.column, in_D)
        prepare(layer.k, attn_norm, layer.k.column, in_D)
        prepare(layer.v, attn_norm, layer.v.column, in_D)
    elif phase == QKV:
        queries_keys_values(layer, first, min(first + step, Q + 2 * K), attn_norm, in_D, q, k, v)
    elif phase == TURN:
        turn_and_keep(model, past, position, cos, sin, q, k, v, q_rope, tap(work, work.k_rope, i, K))
    elif phase == ATTEND:
        attend_group(model, layer, past, position, job, q_rope, attn_heads)
    elif phase == HEADS:
        prepare(layer.o, attn_heads, np.int64(0), panels_of(work.in_HC))
    elif phase == OUT:
        out, last = tap(work, work.attn_out, i, D), min(first + step, D)
        project(layer.o, np.int64(0), first, last, attn_heads, panels_of(work.in_HC), np.int64(0), out)
        for r in range(first, last):
            residual[r] = before[r] + out[r]
    elif phase == MLP_NORM:
        norm_row(residual, floats_at(layer.mlp_norm, D), model.eps, mlp_norm)
        prepare(layer.gate, mlp_norm, layer.gate.column, in_D)
        prepare(layer.up, mlp_norm, layer.up.column, in_D)
        if model.N:
            prepare(layer.router, mlp_norm, layer.router.column, in_D)
    elif phase == ROUTER:
        last = min(first + step, model.N)
        project(layer.router, np.int64(0), first, last, mlp_norm, in_D, layer.router.column, router_logits)
    elif phase == CHOOSE:
        choose(router_logits, ids)
        weigh(router_logits, ids, weights)
    elif phase == GATE_UP:
        gate, up = tap(work, work.gate, i, AF), tap(work, work.up, i, AF)
        gate_and_up(model, layer, job, step, mlp_norm, in_D, ids, gate, up, act)
    elif phase == ACT:
        prepare(layer.down, act[job * model.F : (job + 1) * model.F], job, panels_of(work.in_F))
    elif phase == DOWN:
        expert_out, mlp_out = tap(work, work.expert_out, i, model.A * D), tap(work, work.mlp_out, i, D)
        block_out, last = tap(work, work.block_out, i, D), min(first + step, D)
        inputs = panels_of(work.in_F)
        down(model, layer, first, last, act, inputs, ids, weights, residual, expert_out, mlp_out, block_out)
    elif phase == FINAL_NORM:
        final_norm = floats_at(work.final_norm, D)
        norm_row(before, floats_at(model.final_norm, D), model.eps, final_norm)
        prepare(model.head, final_norm, np.int64(0), in_D)
    else:
        last, final_norm = min(first + step, model.head.outputs), floats_at(work.final_norm, D)
        logits = floats_at(work.logits, model.head.outputs)
        project(model.head, np.int64(0), first, last, final_norm, in_D, np.int64(0), logits)


@kernel
def run(schedule, counters, model, layers, past, work, token, position, cos, sin):
    """What each thread does: jobs, until there are none."""
    p, last = 0, len(layers) - 1
    while True:
        number = take(counters, TAKEN)
        while number >= schedule[p, 1]:
            p += 1
            if p == len(schedule):
                return
        start, phase, i, step = schedule[p, 0], schedule[p, 2], schedule[p, 3], schedule[p, 4]
        wait(counters, start)
        layer, slots = layers[min(i, last)], past[min(i, last)]
        run_job(phase, i, number - start, step, model[0], layer, slots, work[0], token, position, cos, sin)
        finish(counters)


@parallel_kernel
def _run_on_threads(threads, run_at, schedule, counters, model, layers, past, work, token, position, cos, sin):
    for _ in prange(threads):
        call_at(run_at, (schedule, counters, model, layers, past, work, token, position, cos, sin))


def compile_pass() -> None:
    """Compile what a pass of any model runs."""
    records, angles = (np.zeros(1, dtype) for dtype in (MODEL, LAYER, PAST, WORK)), np.zeros(1, np.float32)
    arguments = (np.zeros((1, 5), np.int64), new_counters(2), *records, 0, 0, angles, angles)
    address_of(_run_on_threads, (1, address_of(run, arguments), *arguments))


def _rows_a_job(linears: list[Linear], count: int, threads: int) -> int:
    """How many rows of some matrices side by side make a job, of `count` in all."""
    row_bytes = sum(linear.rows.codes_bytes + linear.rows.scales_bytes + linear.rows.biases_bytes for linear in linears)
    return max(-(-LEAST_BYTES // max(row_bytes, 1)), -(-count // (JOBS_A_THREAD * threads)))


def _schedule(config: Config, weights: Weights, threads: int) -> np.ndarray:
    """The phases of a token, int64 [phases, 5]: first job, first of the next, phase, layer, rows a job."""
    phases: list[tuple[int, ...]] = []

    def add(phase: int, layer: int, jobs: int, step: int = 1) -> None:
        start = phases[-1][1] if phases else 0
        phases.append((start, start + jobs, phase, layer, step))

    def add_rows(phase: int, layer: int, linears: list[Linear], count: int, times: int = 1) -> None:
        step = _rows_a_job(linears, count * times, threads)
        add(phase, layer, -(-count // step) * times, step)

    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    A = config.num_experts_per_tok if isinstance(config, GptOssConfig) else 1
    add(EMBED, 0, 1)
    for i, layer in enumerate(weights.layers):
        add(NORM, i, 1)
        add_rows(QKV, i, [layer.q], sum(linear.bias.shape[1] for linear in (layer.q, layer.k, layer.v)))
        add(TURN, i, 1)
        add(ATTEND, i, K * -(-H // (K * TOGETHER)))
        if layer.o.quantised:
            add(HEADS, i, 1)
        add_rows(OUT, i, [layer.o], D)
        add(MLP_NORM, i, 1)
        if layer.router is not None:
            add_rows(ROUTER, i, [layer.router], layer.router.bias.shape[1])
            add(CHOOSE, i, 1)
        add_rows(GATE_UP, i, [layer.gate, layer.up], config.intermediate_size, A)
        if layer.down.quantised:
            add(ACT, i, A)
        add_rows(DOWN, i, [layer.down] * A, D)
    add(FINAL_NORM, len(weights.layers), 1)
    add_rows(HEAD, len(weights.layers), [weights.head], config.vocab_size)
    return np.array(phases)


WORK = np.dtype(
    [
        *((name, np.int64) for name in (*Taps._fields, "layer_rows")),
        *((name, PANELS) for name in ("in_D", "in_HC", "in_F")),
    ]
)


class Workspace:
    """What the passes of one sequence write, one at a time; and where its cache lies."""

    def __init__(self, taps: Taps, inputs: tuple[Panels, Panels, Panels]) -> None:
        self.counters = new_counters(2)
        self.taps, self._inputs = taps, inputs
        self.work = np.zeros(1, WORK)
        for name, columns in zip(("in_D", "in_HC", "in_F"), inputs, strict=True):
            self.work[0][name] = panels_record(columns)
        self.past = np.zeros(0, PAST)
        self._slots: list = []
        self.use(taps)

    def use(self, taps: Taps) -> None:
        """Write taps there: a layer in a row, or all in the same."""
        for name, array in zip(Taps._fields, taps, strict=True):
            self.work[0][name] = address(array)
        self.work[0]["layer_rows"] = len(taps.q) > 1

    def past_of(self, cache: CpuCache) -> np.ndarray:
        """Where each layer's slots lie, after any growth."""
        slots = [layer.slots for layer in cache.layers]
        if len(slots) != len(self._slots) or any(a is not b for a, b in zip(slots, self._slots, strict=True)):
            self.past, self._slots = past_records(cache), slots
        return self.past


class TokenPass:
    """A model as `run` takes it."""

    def __init__(self, config: Config, weights: Weights, threads: int) -> None:
        self.config = config
        self._weights = weights  # the records hold addresses in it
        self._model, self._layers = model_record(config, weights), layer_records(weights)
        self._schedule = _schedule(config, weights, threads)
        self._widths = self._tap_widths()
        self._run_at: int | None = None

    def _tap_widths(self) -> dict[str, int]:
        m = {name: int(self._model[0][name]) for name in ("D", "H", "K", "C", "F", "A", "N")}
        D, Q, K, AF = m["D"], m["H"] * m["C"], m["K"] * m["C"], m["A"] * m["F"]
        widths = dict.fromkeys(Taps._fields, D) | {"q": Q, "q_rope": Q, "attn_heads": Q, "k": K, "k_rope": K, "v": K}
        widths |= {"gate": AF, "up": AF, "act": AF, "router_logits": m["N"], "expert_ids": m["A"]}
        return widths | {"expert_weights": m["A"], "expert_out": m["A"] * D if m["N"] else 0, "logits": 0}

    def _new_taps(self, rows: int) -> Taps:
        types = {"expert_ids": np.int64}
        return Taps(*(np.empty((rows, n), types.get(name, np.float32)) for name, n in self._widths.items()))

    def _new_workspace(self) -> Workspace:
        widths = self._widths
        inputs = (empty_columns(3, widths["embed"]), empty_columns(1, widths["q"]))
        A = widths["expert_weights"]
        return Workspace(self._new_taps(1), (*inputs, empty_columns(A, widths["act"] // A)))

    def __call__(
        self, token: int, cache: CpuCache, tables: tuple[np.ndarray, np.ndarray], traced: bool
    ) -> tuple[np.ndarray, Taps]:
        """One token after those in the cache, which holds its keys and values afterwards, but does not count them.

        Answers logits [1,V] and the taps: fresh arrays if traced; otherwise the next pass overwrites them.
        """
        position = cache.length
        for layer in cache.layers:
            layer.reserve(position + 1)
        if cache.workspace is None:
            cache.workspace = self._new_workspace()
        space: Workspace = cache.workspace
        logits = np.empty((1, self.config.vocab_size), np.float32)
        taps = self._new_taps(len(self._layers)) if traced else space.taps
        if traced:
            space.use(taps)
        space.work[0]["logits"] = address(logits)
        space.counters.fill(0)
        place = (token, position, tables[0][0], tables[1][0])
        past = space.past_of(cache)
        arguments = (self._schedule, space.counters, self._model, self._layers, past, space.work, *place)
        threads = get_num_threads()
        if threads == 1 or CHECKED:  # an error in a parallel region would be lost, and its job never done
            run(*arguments)
        else:
            if self._run_at is None:
                self._run_at = address_of(run, arguments)
            _run_on_threads(threads, self._run_at, *arguments)
        if traced:
            space.use(space.taps)
        return logits, taps._replace(logits=logits)


def shown(config: Config, taps: Taps) -> Iterator[tuple[str, np.ndarray]]:
    """The taps of a traced pass by name, in the order of the tap table, with a T of 1."""
    sizes = {"T": 1, "D": config.hidden_size, "C": config.head_dim, "V": config.vocab_size}
    sizes |= {"H": config.num_attention_heads, "K": config.num_key_value_heads, "F": config.intermediate_size}
    if isinstance(config, GptOssConfig):
        sizes |= {"N": config.num_local_experts, "A": config.num_experts_per_tok}
    for name, spec in tap_table(config).items():
        if not spec.heavy:
            _, i, field = ("", "0", name) if "." not in name else name.split(".")
            same = {"expert_gate": "gate", "expert_up": "up", "expert_act": "act"}
            row = getattr(taps, same.get(field, field))[int(i)]
            yield name, row.reshape([sizes[axis] for axis in spec.axes])
