"""The engines that paired runs compare, behind the same four questions; each is imported when it is asked for."""

import importlib.metadata
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np

Row = np.ndarray  # token ids, int64 [T]


class Engine(Protocol):
    """A model that is ready to run; each method answers the seconds that the engine took, prompts not counted."""

    info: dict[str, str]  # versions and settings

    def prefill(self, tokens: Row) -> float:
        """A prompt in one piece, with the logits of its last token."""
        ...

    def decode(self, prompt: Row, tokens: Row) -> float:
        """The tokens one by one after the prompt, with the logits of each."""
        ...

    def batch(self, prompts: Sequence[Row], tokens_NB: np.ndarray) -> float:
        """N steps of one token for each of B sequences, each after its own prompt, with the logits of each."""
        ...

    def logits(self, tokens: Row) -> np.ndarray:
        """Of every position: float32 [T,V]."""
        ...


def open_engine(name: str, path: Path, threads: int, longest: int, sequences: int) -> Engine:
    """`cpu:q8`, `llama.cpp`, `metal:bfloat16`, `mlx-lm:bfloat16`; room for so many tokens and sequences."""
    kind, _, mode = name.partition(":")
    engines: dict[str, Callable[..., Engine]] = {
        "cpu": Cpu,
        "llama.cpp": LlamaCpp,
        "metal": Metal,
        "mlx-lm": MlxLm,
    }
    return engines[kind](path, mode, threads, longest, sequences)


class Cpu:
    """`assay.fast.cpu`."""

    def __init__(self, path: Path, mode: str, threads: int, longest: int, sequences: int) -> None:
        from assay.fast.cpu.engine import CpuModel
        from assay.loaders import open_checkpoint

        checkpoint = open_checkpoint(path)
        self.model = CpuModel(checkpoint.config, checkpoint.tensors, mode=mode, threads=threads)
        self.info = {"assay": version("assay"), "numba": version("numba"), "mode": mode}

    def prefill(self, tokens: Row) -> float:
        from assay.fast.cpu.batch import forward_batch

        started = perf_counter()
        forward_batch(self.model, [tokens], [self.model.new_cache()]).argmax()  # logits of the last token alone
        return perf_counter() - started

    def decode(self, prompt: Row, tokens: Row) -> float:
        cache = self.model.new_cache()
        self.model.forward(prompt, cache=cache)
        started = perf_counter()
        for t in range(len(tokens)):
            self.model.forward(tokens[t : t + 1], cache=cache)[-1].argmax()
        return perf_counter() - started

    def batch(self, prompts: Sequence[Row], tokens_NB: np.ndarray) -> float:
        from assay.fast.cpu.batch import forward_batch

        caches = [self.model.new_cache() for _ in prompts]
        for cache, prompt in zip(caches, prompts, strict=True):
            self.model.forward(prompt, cache=cache)
        started = perf_counter()
        for token_B in tokens_NB:
            forward_batch(self.model, token_B[:, None], caches).argmax(axis=-1)
        return perf_counter() - started

    def logits(self, tokens: Row) -> np.ndarray:
        return self.model.forward(tokens)


class LlamaCpp:
    """llama.cpp by the functions of its C library; settings are its defaults, with weights repacked at load."""

    def __init__(self, path: Path, mode: str, threads: int, longest: int, sequences: int) -> None:
        import llama_cpp

        self.api, self.threads, self.longest, self.sequences = llama_cpp, threads, longest, sequences
        self._silent = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
        llama_cpp.llama_log_set(self._silent, None)
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = mode != "mapped"  # else weights are used where the file is mapped
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}")
        self.V = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        system = llama_cpp.llama_print_system_info().decode().strip(" |")
        self.info = {"llama-cpp-python": version("llama_cpp_python"), "system": system}
        if mode:
            self.info["weights"] = mode

    def prefill(self, tokens: Row) -> float:
        with Context(self, 1) as context:
            started = perf_counter()
            context.run(np.zeros(len(tokens), int), tokens, last_only=True).argmax()
            return perf_counter() - started

    def decode(self, prompt: Row, tokens: Row) -> float:
        with Context(self, 1) as context:
            context.run(np.zeros(len(prompt), int), prompt, last_only=True)
            started, sequence = perf_counter(), np.zeros(1, int)
            for t in range(len(tokens)):
                context.run(sequence, tokens[t : t + 1]).argmax()
            return perf_counter() - started

    def batch(self, prompts: Sequence[Row], tokens_NB: np.ndarray) -> float:
        with Context(self, len(prompts)) as context:
            for b, prompt in enumerate(prompts):
                context.run(np.full(len(prompt), b), prompt, last_only=True)
            started, sequence_B = perf_counter(), np.arange(len(prompts))
            for token_B in tokens_NB:
                context.run(sequence_B, token_B).argmax(axis=-1)
            return perf_counter() - started

    def logits(self, tokens: Row) -> np.ndarray:
        with Context(self, 1) as context:
            return context.run(np.zeros(len(tokens), int), tokens).copy()


class Context:
    """A context of llama.cpp with so many sequences."""

    def __init__(self, engine: LlamaCpp, sequences: int) -> None:
        self.api, self.engine = engine.api, engine
        params = self.api.llama_context_default_params()
        params.n_ctx = sequences * engine.longest
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = engine.threads
        self.context = self.api.llama_init_from_model(engine.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot make a context of {params.n_ctx} tokens")
        self.lengths = [0] * sequences

    def __enter__(self) -> "Context":
        return self

    def __exit__(self, *exception: object) -> None:
        self.api.llama_free(self.context)

    def run(self, sequence_T: np.ndarray, token_T: Row, last_only: bool = False) -> np.ndarray:
        """One batch of tokens, each of a sequence; logits [T,V] or [1,V], valid until the next."""
        T, api = len(token_T), self.api
        batch = api.llama_batch_init(T, 0, 1)
        try:
            batch.n_tokens = T
            for t, (sequence, token) in enumerate(zip(sequence_T.tolist(), token_T.tolist(), strict=True)):
                batch.token[t], batch.pos[t] = token, self.lengths[sequence]
                batch.logits[t] = not last_only or t == T - 1
                batch.n_seq_id[t], batch.seq_id[t][0] = 1, sequence
                self.lengths[sequence] += 1
            if status := api.llama_decode(self.context, batch):
                raise SystemExit(f"llama_decode: status {status}")
            return np.ctypeslib.as_array(api.llama_get_logits(self.context), (1 if last_only else T, self.engine.V))
        finally:
            api.llama_batch_free(batch)


class Metal:
    """`assay.fast.metal` on MLX's default device."""

    def __init__(self, path: Path, mode: str, threads: int, longest: int, sequences: int) -> None:
        import mlx.core as mx

        from assay.fast.metal import MetalModel
        from assay.loaders import open_checkpoint

        checkpoint = open_checkpoint(path)
        self.mx, self.model = mx, MetalModel(checkpoint.config, checkpoint.tensors, mode)
        self.info = {"assay": version("assay"), "mlx": version("mlx"), "device": str(mx.default_device()), "mode": mode}

    def prefill(self, tokens: Row) -> float:
        return self._timed(self.model.greedy(tokens), 1)

    def decode(self, prompt: Row, tokens: Row) -> float:
        """Its own greedy tokens: each is chosen on the device while the one before is used."""
        tokens_of = self.model.greedy(prompt)
        next(tokens_of)
        return self._timed(tokens_of, len(tokens))

    def _timed(self, tokens_of: Iterator[Any], N: int) -> float:
        """Seconds of N tokens; the step under way after them ends before anybody else's turn."""
        seconds = fetch(tokens_of, N)
        self.mx.synchronize()
        return seconds

    def batch(self, prompts: Sequence[Row], tokens_NB: np.ndarray) -> float:
        """Prompts are cut to the shortest: sequences are of equal length here."""
        shortest = min(map(len, prompts))
        cache = self.model.new_cache()
        self.model.forward_batch(np.stack([prompt[:shortest] for prompt in prompts]), cache=cache)
        started = perf_counter()
        for token_B in tokens_NB:
            self.model.forward_batch(token_B[:, None], cache=cache).argmax(axis=-1)
        return perf_counter() - started

    def logits(self, tokens: Row) -> np.ndarray:
        return self.model.forward(tokens)


class MlxLm:
    """mlx-lm, its parameters cast to the mode's dtype."""

    def __init__(self, path: Path, mode: str, threads: int, longest: int, sequences: int) -> None:
        import mlx.core as mx
        from mlx_lm.generate import generate_step, generation_stream
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model

        self.mx, self.new_cache = mx, make_prompt_cache
        self.generate_step, self.stream = generate_step, generation_stream
        self.model, _ = load_model(path)
        self.model.set_dtype(getattr(mx, mode))
        mx.eval(self.model.parameters())
        self.info = {
            "mlx-lm": version("mlx-lm"),
            "mlx": version("mlx"),
            "device": str(mx.default_device()),
            "mode": mode,
        }

    def prefill(self, tokens: Row) -> float:
        """As its own generation does it, which leaves out the logits of all but the last token."""
        return self._timed(self.generate_step(self.mx.array(tokens), self.model, max_tokens=1), 1)

    def decode(self, prompt: Row, tokens: Row) -> float:
        """Its own greedy tokens, the next step under way while the token before is fetched."""
        tokens_of = self.generate_step(self.mx.array(prompt), self.model, max_tokens=len(tokens) + 1)
        next(tokens_of)
        return self._timed(tokens_of, len(tokens))

    def _timed(self, tokens_of: Iterator[Any], N: int) -> float:
        """Seconds of N tokens; the step under way after them ends before anybody else's turn."""
        seconds = fetch(tokens_of, N)
        self.mx.synchronize(self.stream)
        return seconds

    def batch(self, prompts: Sequence[Row], tokens_NB: np.ndarray) -> float:
        """Prompts are cut to the shortest: sequences are of equal length here."""
        shortest, cache = min(map(len, prompts)), self.new_cache(self.model)
        self.mx.eval(self._next(np.stack([prompt[:shortest] for prompt in prompts]), cache))
        started = perf_counter()
        for token_B in tokens_NB:
            self.mx.eval(self._next(token_B[:, None], cache))
        return perf_counter() - started

    def logits(self, tokens: Row) -> np.ndarray:
        return np.array(self.model(self.mx.array(tokens[None]))[0].astype(self.mx.float32))

    def _next(self, tokens_BT: Any, cache: Any) -> Any:
        """The most likely token [B] after the last."""
        logits_BTV = self.model(self.mx.array(tokens_BT), cache=cache)
        return self.mx.argmax(logits_BTV[:, -1], axis=-1)


def fetch(tokens_of: Iterator[Any], N: int) -> float:
    """Seconds that the next N tokens took."""
    started = perf_counter()
    for _ in range(N):
        next(tokens_of)
    return perf_counter() - started


def version(package: str) -> str:
    return importlib.metadata.version(package)
