"""Tokenizers, as `tokenizers.Tokenizer`: read from a tokenizer.json, or built from the metadata of a GGUF.

From a GGUF the ids are those of llama.cpp (src/llama-vocab.cpp) with special tokens parsed:
`tokenizer.encode(text).ids` is its `llama_tokenize(..., add_special=True, parse_special=True)`, and
`encode(text, add_special_tokens=False)` leaves out the BOS and EOS. To take the text of control tokens as plain text,
set `tokenizer.encode_special_tokens = True` first; user-defined tokens are parsed even then, as in llama.cpp. (There
gpt-oss's <|start|>, <|channel|>, <|message|>, <|constrain|> and <|end|> count as user-defined, here as control tokens.)
Decoding inverts encoding, for text without special tokens to the last byte.

Where the ids can still differ from llama.cpp's, because of how `tokenizers` works inside:
- characters that Unicode assigned after version 15.0: letters here, unknown to llama.cpp's tables;
- special tokens whose texts overlap inside the input: here the leftmost wins, in llama.cpp the longest;
- Phi-3, after a special token that swallows the white space behind it: here also white space outside ASCII;
- SentencePiece, a piece with a character that is not itself a piece: it cannot be reached by merging here.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from assay.loaders.errors import CheckpointError
from assay.loaders.pretokenizers import PreTokenizer, byte_level_splitter, find_pre_tokenizer

KEY = "tokenizer.ggml."
GIVE_IDS = "give token ids instead of text: they need no tokenizer"
SPACE = "▁"  # how SentencePiece writes a space
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


class TokenType(IntEnum):
    """The values of tokenizer.ggml.token_type."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


SPECIAL_TYPES = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)

# Texts after which llama.cpp ends the generation, whatever the metadata say: ends of an answer, a turn, a file.
END_TEXTS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<|eom_id|>"),
    *("<end_of_turn>", "<turn|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "<|tool_response>"),
    *("</s>", "<eos>", "[EOS]", "<EOT>", "_<EOT>", "[EOT]", "[e~[", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|file_sep|>"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
}
# Beside these, the texts that it takes for control tokens whatever type the file gives them: of fill-in-the-middle.
CONTROL_TEXTS = END_TEXTS | {
    *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", "<|code_prefix|>"),
    *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>", "<|code_suffix|>"),
    *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>", "<|code_middle|>"),
    *("<|prefix|>", "<|suffix|>", "<|middle|>", "<PRE>", "\u2581<PRE>", "<SUF>", "\u2581<SUF>", "<MID>", "\u2581<MID>"),
}
END_ROLES = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")


def stop_tokens_from_gguf(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids after which llama.cpp ends the generation: those that the metadata name, and those of `END_TEXTS`."""
    named = [metadata.get(f"{KEY}{role}_token_id") for role in END_ROLES]
    tokens = metadata.get(f"{KEY}tokens")
    ids = {text: i for i, text in enumerate(tokens) if text in END_TEXTS} if isinstance(tokens, list) else {}
    if ids.keys() >= {"<|return|>", "<|call|>"} or ids.keys() >= {"<|calls|>", "<|flush|>"}:
        ids.pop("<|end|>", None)  # there it ends a message, of which an answer has several
    return tuple(dict.fromkeys(i for i in (*named, *sorted(ids.values())) if isinstance(i, int)))


def tokenizer_from_file(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json. Raises CheckpointError when it is absent or damaged."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError("no tokenizer here", where=path, expected="a tokenizer.json", remedy=GIVE_IDS)
    try:
        return Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and where its Rust panics a BaseException
        raise CheckpointError(
            "not a readable tokenizer.json", where=path, got=error, remedy=f"fetch the file again, or {GIVE_IDS}"
        ) from error


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that the `tokenizer.ggml.*` metadata of a GGUF describe, giving llama.cpp's ids.

    String arrays are lists of str, numeric arrays NumPy arrays or lists. Supported are byte-level BPE (model `gpt2`)
    and SentencePiece with byte fallback (`llama`). Raises CheckpointError for what is missing, inconsistent or neither.
    """
    model = _string(metadata, "model")
    vocabulary = _read_vocabulary(metadata)
    if model == "gpt2":
        pre_tokenizer = find_pre_tokenizer(_string(metadata, "pre", default="default"))
        tokenizer = _byte_level(vocabulary, _merges(metadata, vocabulary), pre_tokenizer)
        ends = _ends(metadata, vocabulary, add_bos=pre_tokenizer.add_bos, bos=None, eos=None)
    elif model == "llama":
        scores = _numbers(metadata, "scores", len(vocabulary.tokens), "fiu").astype(np.float32)
        tokenizer = _sentencepiece(vocabulary, scores, _flag(metadata, "add_space_prefix", default=True))
        ends = _ends(metadata, vocabulary, add_bos=True, bos=1, eos=2)
    else:
        raise CheckpointError(
            f"unknown tokenizer model {model!r}", where=f"{KEY}model", expected="gpt2 or llama", remedy=GIVE_IDS
        )
    _add_special_tokens(tokenizer, vocabulary, strips_right=_is_phi_3(metadata))
    tokenizer.post_processor = _add_ends(*ends)
    return tokenizer


# Reading metadata


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, ids by token, and the TokenType of each."""

    tokens: list[str]
    ids: dict[str, int]
    types: np.ndarray


def _read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    # an empty token cannot be looked up: llama.cpp gives it this name
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(_strings(metadata, "tokens"))]
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twin = next(i for i, token in enumerate(tokens) if ids[token] != i)
        raise CheckpointError(
            f"token {tokens[twin]!r} is there twice", where=f"{KEY}tokens", got=f"ids {twin} and {ids[tokens[twin]]}"
        )
    if f"{KEY}token_type" not in metadata:
        return Vocabulary(tokens, ids, _override(ids, np.full(len(tokens), TokenType.NORMAL)))
    types = _numbers(metadata, "token_type", len(tokens), "iu")
    unknown = np.flatnonzero(~np.isin(types, list(TokenType)))
    if unknown.size:
        raise CheckpointError(
            f"token {unknown[0]} has an unknown type",
            where=f"{KEY}token_type",
            expected=f"0 to {max(TokenType)}",
            got=int(types[unknown[0]]),
        )
    return Vocabulary(tokens, ids, _override(ids, types))


def _override(ids: dict[str, int], types: np.ndarray) -> np.ndarray:
    types = types.copy()
    types[[ids[text] for text in CONTROL_TEXTS & ids.keys()]] = TokenType.CONTROL
    return types


def _merges(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Pairs in rank order; of a pair given twice the first counts."""
    ids = vocabulary.ids
    pairs: dict[tuple[str, str], None] = {}
    for rank, merge in enumerate(_strings(metadata, "merges")):
        left, _, right = merge.partition(" ")
        if not (left in ids and right in ids and left + right in ids):
            raise CheckpointError(
                f"merge {rank} does not join two tokens into a third",
                where=f"{KEY}merges",
                expected="two tokens with one space between them",
                got=repr(merge),
            )
        pairs.setdefault((left, right))
    return list(pairs)


def _ends(
    metadata: Mapping[str, Any], vocabulary: Vocabulary, *, add_bos: bool, bos: int | None, eos: int | None
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """What goes before and what goes after a text: at most one (token, id) each; the arguments are the defaults."""
    before, after = [], []
    if _flag(metadata, "add_bos_token", default=add_bos):
        before.append(_token(metadata, "bos_token_id", vocabulary, default=bos))
    if _flag(metadata, "add_eos_token", default=False):
        after.append(_token(metadata, "eos_token_id", vocabulary, default=eos))
    return before, after


def _is_phi_3(metadata: Mapping[str, Any]) -> bool:
    """llama.cpp's own test: a GGUF does not record which tokens swallow the white space behind them."""
    name = metadata.get("general.name", "")
    return isinstance(name, str) and any(mark in name.lower() for mark in ("phi-3", "phi3"))


def _get(metadata: Mapping[str, Any], name: str) -> Any:
    if KEY + name not in metadata:
        raise CheckpointError(f"no {KEY}{name} in the metadata", remedy=f"convert the model again, or {GIVE_IDS}")
    return metadata[KEY + name]


def _string(metadata: Mapping[str, Any], name: str, *, default: str | None = None) -> str:
    value = _get(metadata, name) if default is None else metadata.get(KEY + name, default)
    if not isinstance(value, str):
        raise CheckpointError("wrong type", where=KEY + name, expected="a string", got=_kind(value))
    return value


def _flag(metadata: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = metadata.get(KEY + name, default)
    if not isinstance(value, bool | np.bool_):
        raise CheckpointError("wrong type", where=KEY + name, expected="true or false", got=_kind(value))
    return bool(value)


def _token(metadata: Mapping[str, Any], name: str, vocabulary: Vocabulary, *, default: int | None) -> tuple[str, int]:
    value = _get(metadata, name) if default is None else metadata.get(KEY + name, default)
    size = len(vocabulary.tokens)
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 0 <= value < size:
        raise CheckpointError("not a token id", where=KEY + name, expected=f"0 to {size - 1}", got=repr(value))
    return vocabulary.tokens[value], int(value)


def _strings(metadata: Mapping[str, Any], name: str) -> Sequence[str]:
    value = _get(metadata, name)
    if not isinstance(value, list | tuple):
        raise CheckpointError("wrong type", where=KEY + name, expected="an array of strings", got=_kind(value))
    odd = next((item for item in value if not isinstance(item, str)), None)
    if odd is not None:
        raise CheckpointError("wrong type", where=KEY + name, expected="an array of strings", got=f"with {_kind(odd)}")
    return value


def _numbers(metadata: Mapping[str, Any], name: str, count: int, kinds: str) -> np.ndarray:
    value = _get(metadata, name)
    try:
        array = np.asarray(value if isinstance(value, np.ndarray | list | tuple) else None)
    except ValueError:  # a ragged list
        array = np.asarray(None)
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise CheckpointError("wrong type", where=KEY + name, expected="an array of numbers", got=_kind(value))
    if len(array) != count:
        raise CheckpointError("wrong length", where=KEY + name, expected=f"{count}, one a token", got=len(array))
    if not np.isfinite(array).all():
        raise CheckpointError("not all finite", where=KEY + name, got=f"token {np.flatnonzero(~np.isfinite(array))[0]}")
    return array


def _kind(value: object) -> str:
    return f"{type(value).__name__} of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


# Building


def _byte_level(vocabulary: Vocabulary, merges: list[tuple[str, str]], pre_tokenizer: PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=pre_tokenizer.ignore_merges))
    tokenizer.pre_tokenizer = byte_level_splitter(pre_tokenizer, vocabulary.ids)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary, scores: np.ndarray, add_space_prefix: bool) -> Tokenizer:
    missing = next((piece for piece in BYTE_PIECES if piece not in vocabulary.ids), None)
    if missing is not None:
        raise CheckpointError(
            f"no piece {missing} for a byte that no other piece covers", where=f"{KEY}tokens", remedy=GIVE_IDS
        )
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, _score_merges(vocabulary, scores), byte_fallback=True))
    escape = normalizers.Replace(" ", SPACE)
    unescape = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape])
        tokenizer.decoder = decoders.Sequence([*unescape, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = escape
        tokenizer.decoder = decoders.Sequence(unescape)
    return tokenizer


def _score_merges(vocabulary: Vocabulary, scores: np.ndarray) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score of the third first.

    llama.cpp settles equal scores by position, leftmost first, which ranks cannot say in general. Llama's own
    vocabulary has such a tie, the runs of 2 to 16 spaces: longest first lets the leftmost run grow on, as there.
    Raises CheckpointError for equal scores of pieces that can compete for a place in some text.
    """
    joins = [
        (-score, -len(piece), -cut, piece)
        for piece, score in zip(vocabulary.tokens, scores.tolist(), strict=True)
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary.ids and piece[cut:] in vocabulary.ids
    ]
    special = {vocabulary.tokens[i] for i in np.flatnonzero(np.isin(vocabulary.types, SPECIAL_TYPES))}
    _refuse_ties([(score, piece[:-cut], piece[-cut:]) for score, _, cut, piece in joins if piece not in special])
    return [(piece[:-cut], piece[-cut:]) for _, _, cut, piece in sorted(joins)]


def _refuse_ties(joins: list[tuple[float, str, str]]) -> None:
    """Two joins of one score compete where the right part of one is the left part of the other."""
    by_left = defaultdict(list)
    for score, left, right in joins:
        by_left[score, left].append(right)
    for score, left, right in joins:
        for beyond in by_left.get((score, right), ()):
            if left + right != right + beyond and len(set(left + right + beyond)) > 1:  # not a run of one character
                raise CheckpointError(
                    f"pieces {left + right!r} and {right + beyond!r} have the same score and share {right!r}",
                    where=f"{KEY}scores",
                    expected="different scores: which of the two wins in a text depends on its position there",
                    remedy=GIVE_IDS,
                )


def _add_special_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary, *, strips_right: bool) -> None:
    for kinds, add in (
        ((TokenType.UNKNOWN, TokenType.CONTROL), tokenizer.add_special_tokens),
        ((TokenType.USER_DEFINED,), tokenizer.add_tokens),
    ):
        texts = [vocabulary.tokens[i] for i in np.flatnonzero(np.isin(vocabulary.types, kinds))]
        keeps = {"<unk>", "<s>", "<|endoftext|>"}  # Phi-3's tokens that leave the white space behind them alone
        add([AddedToken(text, rstrip=strips_right and text not in keeps, normalized=False) for text in texts])


def _add_ends(before: list[tuple[str, int]], after: list[tuple[str, int]]) -> processors.TemplateProcessing:
    ends = [*(("bos", token, i) for token, i in before), *(("eos", token, i) for token, i in after)]
    first, second = ([*("bos" for _ in before), f"${text}", *("eos" for _ in after)] for text in "AB")
    return processors.TemplateProcessing(
        single=first,
        pair=[*first, *(f"{piece}:1" for piece in second)],
        special_tokens=[{"id": name, "ids": [i], "tokens": [token]} for name, token, i in ends],
    )
