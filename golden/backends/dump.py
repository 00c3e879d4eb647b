"""Taps that another engine wrote: safetensors (or its shard index), npz, a folder of plain files, or a log.

A dump may say what it ran: a safetensors header entry `tokens` (comma-separated ids), `tokens` in a folder's
index, or the whole `assay` entry of a file that `assay record` wrote.
"""

import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from assay.golden.backends.llamacpp_nodes import FUSED, columns_of
from assay.golden.backends.plain_files import read_callback_log, read_folder
from assay.golden.errors import GoldenError
from assay.golden.store import WEIGHTS, read_taps
from assay.reference.config import Config, LlamaConfig
from assay.reference.taps import tap_table

# module outputs as Hugging Face and mlx-lm name them; {i} is the layer
_MODULES = {
    "model.embed_tokens": "embed",
    "model.layers.{i}.input_layernorm": "layers.{i}.attn_norm",
    "model.layers.{i}.self_attn.q_proj": "layers.{i}.q",
    "model.layers.{i}.self_attn.k_proj": "layers.{i}.k",
    "model.layers.{i}.self_attn.v_proj": "layers.{i}.v",
    "model.layers.{i}.self_attn.o_proj": "layers.{i}.attn_out",
    "model.layers.{i}.post_attention_layernorm": "layers.{i}.mlp_norm",
    "model.layers.{i}.mlp.router": "layers.{i}.router_logits",
    "model.layers.{i}.mlp.gate_proj": "layers.{i}.gate",
    "model.layers.{i}.mlp.up_proj": "layers.{i}.up",
    "model.layers.{i}.self_attn.qkv_proj": "layers.{i}.q+k+v",  # phi-3's, side by side
    "model.layers.{i}.mlp.gate_up_proj": "layers.{i}.gate+up",
    "model.layers.{i}.mlp": "layers.{i}.mlp_out",
    "model.layers.{i}": "layers.{i}.block_out",
    "model.norm": "final_norm",
    "lm_head": "logits",
}
# graph nodes of llama.cpp; of the nodes that share a name (Qcur, Kcur) a dump holds the last, the rotated one
_LLAMA_CPP = {
    "embd": "embed",
    "attn_norm-{i}": "layers.{i}.attn_norm",
    "Qcur-{i}": "layers.{i}.q_rope",
    "Kcur-{i}": "layers.{i}.k_rope",
    "Vcur-{i}": "layers.{i}.v",
    "kqv_out-{i}": "layers.{i}.attn_heads",
    "attn_out-{i}": "layers.{i}.attn_out",
    "ffn_inp-{i}": "layers.{i}.attn_residual",
    "attn_post_norm-{i}": "layers.{i}.mlp_norm",
    "ffn_norm-{i}": "layers.{i}.mlp_norm",
    "ffn_gate-{i}": "layers.{i}.gate",
    "ffn_up-{i}": "layers.{i}.up",
    "ffn_swiglu-{i}": "layers.{i}.act",
    "ffn_moe_probs-{i}": "layers.{i}.router_logits",
    "ffn_moe_topk-{i}": "layers.{i}.expert_ids",
    "ffn_moe_weights_softmax-{i}": "layers.{i}.expert_weights",
    "ffn_moe_gate_biased-{i}": "layers.{i}.expert_gate",
    "ffn_moe_up_biased-{i}": "layers.{i}.expert_up",
    "ffn_moe_swiglu_oai-{i}": "layers.{i}.expert_act",
    "ffn_moe_down_biased-{i}": "layers.{i}.expert_out",
    "ffn_moe_out-{i}": "layers.{i}.mlp_out",
    "ffn_out-{i}": "layers.{i}.mlp_out",
    "l_out-{i}": "layers.{i}.block_out",
    "result_norm": "final_norm",
    "result_output": "logits",
}
_LLAMA_CPP_PHI3 = _LLAMA_CPP | {"wqkv-{i}": "layers.{i}.q+k+v", "ffn_up-{i}": "layers.{i}.gate+up"}
LOGS = (".log", ".txt")
NAME_MAPS = {"hf": _MODULES, "mlx": _MODULES, "llama.cpp": _LLAMA_CPP}


@dataclass(frozen=True)
class Dump:
    """Taps by assay's names, what they were computed in, and the tokens if the file says."""

    taps: Mapping[str, np.ndarray]
    profile: str
    tokens: list[int] | None


@dataclass(frozen=True)
class _Place:
    """Where a tap lies: the stored array, the columns of it (None: all), and what these are multiplied by."""

    name: str
    columns: slice | None = None
    factor: float | None = None


class _Renamed(Mapping[str, np.ndarray]):
    """Stored arrays under tap names, read when asked for; q and k of neighbour-pair RoPE put into halves."""

    def __init__(self, arrays: Mapping[str, np.ndarray], places: dict[str, _Place], paired: bool, head_dim: int):
        self._arrays, self._places, self._paired, self._C = arrays, places, paired, head_dim

    def __getitem__(self, tap: str) -> np.ndarray:
        place = self._places[tap]
        array = self._arrays[place.name]
        if place.columns is not None and array.ndim:
            array = array[..., place.columns]
        if place.factor is not None:
            array = array.astype(np.float64) * place.factor
        rotary = self._paired and tap.endswith(("_rope", ".q", ".k"))
        if not rotary or array.ndim == 0 or array.shape[-1] % self._C:
            return array
        pairs = array.reshape(*array.shape[:-1], -1, self._C // 2, 2)
        return np.swapaxes(pairs, -1, -2).reshape(array.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def open_dump(
    path: str | Path, config: Config | None = None, names: str | None = None, *, is_phi3: bool = False
) -> Dump:
    """Read a dump; `names` is a built-in name map or a JSON file {their name: tap name}, with {i} for the layer.

    Without the model's config, phi-3's fused products cannot be taken apart; `is_phi3` says that it is one.
    Raises GoldenError for a file that is no dump or a map that fits none of its tensors.
    """
    path = Path(path)
    arrays, metadata, profile = _read(path, is_phi3)
    tokens = _tokens(metadata, path)
    if "assay" in metadata:
        profile = str(json.loads(metadata["assay"]).get("profile", profile))
    return Dump(_by_tap(arrays, path, config, names, is_phi3), profile, tokens)


def dump_of(
    arrays: Mapping[str, np.ndarray], config: Config | None = None, names: str | None = None, *, is_phi3: bool = False
) -> Dump:
    """Arrays at hand as a dump; the profile is what their dtypes suggest."""
    short = ("bfloat16", "float16")  # bfloat16 as ml_dtypes has it
    dtypes = {array.dtype.name for name, array in arrays.items() if not name.startswith(WEIGHTS)}
    profile = next((name for name in short if name in dtypes), "float32")
    widened = {name: a.astype(np.float32) if a.dtype.name in short else a for name, a in arrays.items()}
    return Dump(_by_tap(widened, None, config, names, is_phi3), profile, None)


def _by_tap(
    arrays: Mapping[str, np.ndarray], path: Path | None, config: Config | None, names: str | None, is_phi3: bool
) -> Mapping[str, np.ndarray]:
    weights = {name: name for name in arrays if name.startswith(WEIGHTS)}  # by their own names under any map
    phi3_nodes = is_phi3 and names == "llama.cpp"
    table = _LLAMA_CPP_PHI3 if phi3_nodes else _name_map(names) if names else None
    stored = _matched(list(arrays), table) | weights if table is not None else {name: name for name in arrays}
    places = _places(stored, config, phi3_nodes)
    if not arrays:
        raise GoldenError("a dump without a tensor in it", where=path)
    if not places:
        raise GoldenError(
            f"the name map {names!r} fits none of the tensors", where=path, got=", ".join(list(arrays)[:5])
        )
    own_map = names is not None and names not in NAME_MAPS
    taps = [name for name in places if name not in weights]
    if own_map and config and (unknown := [tap for tap in taps if tap not in tap_table(config)]):
        raise GoldenError(f"the name map leads to {unknown[0]!r}, which is no tap of this model", where=names)
    # llama.cpp rotates Llama in neighbour pairs, phi-3 in halves
    by_llama_cpp = names == "llama.cpp" or (path is not None and path.suffix in LOGS)
    paired = by_llama_cpp and isinstance(config, LlamaConfig) and not is_phi3
    return _Renamed(arrays, places, paired, config.head_dim if config is not None else 2)


def _places(stored: Mapping[str, str], config: Config | None, phi3_nodes: bool) -> dict[str, _Place]:
    """Where each tap lies; those of a product that was fused (`layers.0.q+k+v`) each in its own columns."""
    places: dict[str, _Place] = {}
    for tap, name in stored.items():
        layer, _, kind = tap.rpartition(".")
        if (together := tuple(kind.split("+"))) in FUSED.values():
            if config is not None:
                places |= {f"{layer}.{part}": _Place(name, columns_of(config, part)) for part in together}
        elif phi3_nodes and kind == "q_rope" and config is not None:  # its last Qcur is the scaled one
            places[tap] = _Place(name, factor=config.head_dim**0.5)
        else:
            places.setdefault(tap, _Place(name))
    return places


def _read(path: Path, is_phi3: bool) -> tuple[Mapping[str, np.ndarray], dict[str, str], str]:
    if path.is_dir():
        return read_folder(path)
    if path.suffix in LOGS:
        return read_callback_log(path, is_phi3), {}, "llama.cpp"
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError, TypeError, EOFError, NotImplementedError, zlib.error, zipfile.BadZipFile) as error:
            raise GoldenError(f"not an npz file of plain arrays: {error}", where=path) from error
        half = any(a.dtype == np.float16 for name, a in arrays.items() if not name.startswith(WEIGHTS))
        return arrays, {}, "float16" if half else "float32"
    taps, metadata = read_taps(path)
    dtypes = taps.dtypes
    profile = "bfloat16" if "BF16" in dtypes else "float16" if "F16" in dtypes else "float32"
    return taps, metadata, profile


def _tokens(metadata: Mapping[str, str], path: Path) -> list[int] | None:
    try:
        if "assay" in metadata:
            return list(json.loads(metadata["assay"])["tokens"])
        if "tokens" in metadata:
            return [int(token) for token in metadata["tokens"].split(",")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise GoldenError(f"the header's tokens cannot be read: {error}", where=path) from error
    return None


def _name_map(names: str) -> Mapping[str, str]:
    if names in NAME_MAPS:
        return NAME_MAPS[names]
    try:
        table = json.loads(Path(names).read_text("utf-8"))
    except OSError as error:
        known = ", ".join(NAME_MAPS)
        raise GoldenError(f"no such name map: {names}", expected=f"{known}, or a JSON file") from error
    except (ValueError, RecursionError) as error:
        raise GoldenError(f"not JSON: {error}", where=names) from error
    if not isinstance(table, dict) or not all(
        isinstance(tap, str) and pattern.count("{i}") == tap.count("{i}") <= 1 for pattern, tap in table.items()
    ):
        raise GoldenError("not a name map", where=names, expected='{"their.name.{i}": "layers.{i}.q", ...}')
    return table


def _matched(names: list[str], table: Mapping[str, str]) -> dict[str, str]:
    """Tap name -> stored name, for the stored names that a pattern of the table fits."""
    found = {}
    for pattern, tap in table.items():
        regex = re.compile(r"(\d+)".join(re.escape(piece) for piece in pattern.split("{i}")))
        for name in names:
            if match := regex.fullmatch(name):
                found[tap.replace("{i}", match.group(1)) if match.groups() else tap] = name
    return found
