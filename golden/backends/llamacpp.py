"""llama.cpp on the CPU as a backend: taps from the evaluation callback of llama-cpp-python's library.

The callback is asked about every node of the graph before it is computed. Wanting a node ends the stretch of
nodes that are handed to the CPU at once; the kernels and their threads stay the same, and so do their bits
(RMSNorm and its gain are one kernel: only the gain's node is asked for, so that they are not torn apart).
Nodes are told apart as in llamacpp_nodes.py.
"""

import ctypes
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp._ggml import libggml

from assay.golden.backends import Progress
from assay.golden.backends.llamacpp_nodes import columns_of, taps_of_node
from assay.golden.errors import GoldenError
from assay.loaders.checkpoint import Checkpoint
from assay.reference.ops import attention_mask
from assay.reference.taps import Recorder, kind_of, tap_shape, tap_table

_DTYPES: dict[int, np.dtype] = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    26: np.dtype(np.int32),
}  # enum ggml_type
_silent = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
_PROFILES = {"default": "llama.cpp", "float32": "llama.cpp-float32"}


class _GgmlTensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h; `_require_known_layout` compares it with what the library says."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


def _function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function = getattr(libggml, name)
    function.restype, function.argtypes = result, arguments
    return function


_get_name = _function("ggml_get_name", ctypes.c_void_p, ctypes.c_void_p)
_op_name = _function("ggml_op_name", ctypes.c_char_p, ctypes.c_int)
_nbytes = _function("ggml_nbytes", ctypes.c_size_t, ctypes.c_void_p)
_copy_out = _function(
    "ggml_backend_tensor_get", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
)


class LlamaCppBackend:
    """A GGUF file in llama.cpp on the CPU.

    Mode `default` is what a user gets: flash attention where llama.cpp chooses it, a cache in float16.
    `float32` has neither, and shows attn_scores and attn_weights. Both round activations as the weights' type asks.
    """

    name = "llama.cpp"

    def __init__(self, checkpoint: Checkpoint, mode: str):
        if checkpoint.format != "gguf":
            raise GoldenError(
                f"backend 'llama.cpp' reads GGUF files, not {checkpoint.format}",
                where=checkpoint.path,
                remedy="give the GGUF file with --model (llama.cpp's convert_hf_to_gguf.py makes one)",
            )
        self.profile = _PROFILES[mode]
        self.versions = {"llama-cpp-python": llama_cpp.__version__}
        self.config = checkpoint.config
        self._mode, self._is_phi3 = mode, checkpoint.is_phi3
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        llama_cpp.llama_log_set(_silent, None)
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(checkpoint.path), params)
        if not self._model:
            raise GoldenError(
                f"llama.cpp (llama-cpp-python {llama_cpp.__version__}) does not load this checkpoint",
                where=checkpoint.path,
            )
        # LLAMA_ROPE_TYPE_NORM turns the neighbours 2j and 2j + 1, and the file's rows of q and k are permuted for it
        self._paired = llama_cpp.llama_model_rope_type(self._model) == llama_cpp.LLAMA_ROPE_TYPE_NORM

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            llama_cpp.llama_model_free(self._model)

    def run(
        self, tokens: list[int], chunks: list[int], names: Collection[str], progress: Progress = None
    ) -> Mapping[str, np.ndarray]:
        trace = _Trace(self.config, names, self._paired, self._is_phi3, progress)
        self.evaluate(tokens, chunks, trace)
        return trace.recorder.values

    def evaluate(self, tokens: list[int], chunks: list[int], trace: "_Trace | None") -> np.ndarray:
        """Run chunk after chunk, each as one batch; logits [T,V] of all positions, traced or not."""
        callback = llama_cpp.ggml_backend_sched_eval_callback(trace.see if trace is not None else 0)
        context = self._new_context(len(tokens), max(chunks), callback)
        logits, start = [], 0
        try:
            for T in chunks:
                if trace is not None:
                    trace.begin(start, T)
                logits.append(self._decode(context, tokens[start : start + T], start))
                if trace is not None and trace.error is not None:
                    raise trace.error
                start += T
        finally:
            llama_cpp.llama_free(context)
        return np.concatenate(logits)

    def _new_context(self, length: int, longest_chunk: int, callback: Any) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = length
        params.n_batch = params.n_ubatch = longest_chunk
        params.n_threads = params.n_threads_batch = os.cpu_count() or 1
        params.cb_eval = callback
        if self._mode == "float32":
            params.type_k = params.type_v = 0  # GGML_TYPE_F32
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise GoldenError("llama.cpp cannot make a context", got=f"{length} tokens, mode {self._mode}")
        return context

    def _decode(self, context: Any, tokens: list[int], start: int) -> np.ndarray:
        """One batch at positions start, start + 1, ...; every position's logits are wanted, so no row is left out."""
        T, V = len(tokens), self.config.vocab_size
        batch = llama_cpp.llama_batch_init(T, 0, 1)
        try:
            batch.n_tokens = T
            for t, token in enumerate(tokens):
                batch.token[t], batch.pos[t], batch.logits[t] = token, start + t, 1
                batch.n_seq_id[t], batch.seq_id[t][0] = 1, 0
            if status := llama_cpp.llama_decode(context, batch):
                raise GoldenError(f"llama.cpp cannot run tokens {start} to {start + T - 1}", got=f"status {status}")
            return np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (T, V)).copy()
        finally:
            llama_cpp.llama_batch_free(batch)


class _Trace:
    """The evaluation callback of a run: answers which nodes are wanted, and keeps them under their taps' names."""

    def __init__(self, config: Any, names: Collection[str], paired: bool, is_phi3: bool, progress: Progress):
        self.recorder = Recorder(config, names, progress)
        self.error: Exception | None = None
        self._config, self._paired, self._is_phi3 = config, paired, is_phi3
        self._table = tap_table(config)
        self._start = self._T = 0

    def begin(self, start: int, T: int) -> None:
        """The chunk that is evaluated next."""
        self._start, self._T = start, T

    def see(self, address: int, ask: bool, user_data: Any) -> bool:
        """Called by llama.cpp before (`ask`) and after each wanted node; answering False after one stops the graph."""
        try:
            node = _GgmlTensor.from_address(address)
            taps = [tap for tap in self._taps_of(address, node) if tap in self.recorder.names]
            if ask or not taps:
                return bool(taps)
            array = _values(address, node)
            for tap in taps:
                self.recorder(tap, self._as_tap(tap, array))
        except Exception as error:  # nothing can be raised through llama.cpp: it is raised after the batch
            self.error = error
            return False
        return True

    def _taps_of(self, address: int, node: _GgmlTensor) -> tuple[str, ...]:
        if _get_name(address) != ctypes.addressof(node) + _GgmlTensor.name.offset:
            raise GoldenError(
                "this llama.cpp lays its tensors out in another way", expected="ggml_tensor of llama-cpp-python 0.3.36"
            )
        return taps_of_node(node.name.decode("utf-8", "replace"), _op_name(node.op).decode(), self._is_phi3)

    def _as_tap(self, tap: str, array: np.ndarray) -> np.ndarray:
        """ggml's [.., T] in the tap's axes."""
        spec, T, kind = self._table[tap], self._T, kind_of(tap)
        if spec.heavy:
            return self._attention_matrix(int(tap.split(".")[1]), kind, array)
        if self._is_phi3 and kind in ("q", "k", "v", "gate", "up"):
            array = array[..., columns_of(self._config, kind)]
        array = array.reshape(tap_shape(spec, self._config, T, self._start + T))
        if self._paired and kind in ("q", "k", "q_rope", "k_rope"):
            array = np.concatenate((array[..., 0::2], array[..., 1::2]), axis=-1)
        return array.astype(np.int64) if spec.integer else array

    def _attention_matrix(self, layer: int, kind: str, array: np.ndarray) -> np.ndarray:
        """[H,T,S] of what is padded to the cache's size; scores go on where the mask hides, and most are unscaled."""
        S = self._start + self._T
        array = array.reshape(array.shape[-3:])[..., :S]
        if kind == "attn_weights":
            return array
        query_T = np.arange(self._start, S)
        mask_TS = attention_mask(query_T, np.arange(S), self._config.window(layer))
        scale = 1.0 if self._is_phi3 else self._config.head_dim**-0.5
        return np.where(mask_TS, array * np.float32(scale), np.float32(0))


def _values(address: int, node: _GgmlTensor) -> np.ndarray:
    """A copy of a node's values, axes slowest first, whatever its strides."""
    if node.type not in _DTYPES:
        raise GoldenError(f"llama.cpp's node {node.name.decode()!r} is of a type that is not read here", got=node.type)
    dtype = _DTYPES[node.type]
    raw = np.empty(_nbytes(address), np.uint8)
    _copy_out(address, raw.ctypes.data, 0, raw.nbytes)
    shape, strides = tuple(node.ne)[::-1], tuple(node.nb)[::-1]
    return np.ndarray(shape, dtype, raw, strides=strides).copy()


open_backend = LlamaCppBackend
