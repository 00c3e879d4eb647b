"""Tokenizers from files and from GGUF metadata, on vocabularies small enough to follow by hand."""

import inspect
import json
import string
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from assay.loaders.errors import CheckpointError
from assay.loaders.tokenizer import tokenizer_from_file, tokenizer_from_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = {"<unk>": UNKNOWN, "<mark>": USER_DEFINED, "<|im_start|>": CONTROL, "<s>": CONTROL, "</s>": CONTROL}
A, B, C = 69, 70, 71  # ids of the letters, behind the special tokens; the first merge makes 261
PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="<"))  # no special token among it


def with_changes(values: dict, changes: dict) -> dict:
    """Metadata under their full keys; a change to None removes the key."""
    merged = values | changes
    return {f"tokenizer.ggml.{name}": value for name, value in merged.items() if value is not None}


def gpt2_metadata(merges: list[str], words: tuple[str, ...] = (), **changes: object) -> dict:
    """A byte-level BPE: five special tokens, the 256 bytes, what the merges make, and words that no merges make."""
    tokens = list(dict.fromkeys([*SPECIAL, *ALPHABET, *(merge.replace(" ", "") for merge in merges), *words]))
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [SPECIAL.get(token, NORMAL) for token in tokens],
        "merges": merges,
        "bos_token_id": 3,
        "eos_token_id": 4,
    }
    return with_changes(values, changes)


def llama_metadata(scores: dict[str, float], **changes: object) -> dict:
    """SentencePiece: <unk>, <s>, </s>, the 256 bytes from id 3, then the pieces of `scores` from id 259."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *scores]
    values = {
        "model": "llama",
        "tokens": tokens,
        "scores": np.array([0.0] * 259 + list(scores.values()), np.float32),
        "token_type": np.array([UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(scores), np.int32),
    }
    return with_changes(values, changes)


def train_merges(vocabulary_size: int) -> list[str]:
    """Merges of a byte-level BPE over modules of the standard library and a line in some other scripts.

    Trained on text that is not cut into words or lines, so that where a text is cut shows in its ids.
    """
    text = "".join(map(inspect.getsource, (string, tempfile, inspect)))
    text += (
        "naïve café École ПриветМир 你好世界 ภาษาไทย 1234567 12 345 I'M isn't WE'LL 'S \u3000 é 😀👨‍👩‍👧 !\n/?\n" * 40
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=vocabulary_size, show_progress=False, initial_alphabet=ALPHABET)
    tokenizer.train_from_iterator([text[at : at + 500] for at in range(0, len(text), 500)], trainer)
    return [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def ids(metadata: dict, text: str, **options) -> list[int]:
    return tokenizer_from_gguf(metadata).encode(text, **options).ids


def tokens(metadata: dict, text: str) -> list[str]:
    return tokenizer_from_gguf(metadata).encode(text, add_special_tokens=False).tokens


# --- byte-level BPE ---


def test_merges_apply_in_the_order_of_the_list():
    assert ids(gpt2_metadata(["a b", "b c"]), "abc") == [261, C]
    assert ids(gpt2_metadata(["b c", "a b"]), "abc") == [A, 261]


def test_of_a_merge_given_twice_the_first_counts():
    assert ids(gpt2_metadata(["a b", "b c", "a b"]), "abc") == [261, C]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["1234", "Ġ12", "a", "'", "S"]),
        ("gpt-4o", ["12", "3", "4", "Ġ", "12", "a'", "S"]),
        ("llama-bpe", ["12", "3", "4", "Ġ", "12", "a", "'S"]),
        ("qwen2", ["1", "2", "3", "4", "Ġ", "1", "2", "a", "'S"]),
        ("smollm", ["1", "2", "3", "4", "Ġ", "1", "2", "a", "'", "S"]),
        ("tekken", ["1", "2", "3", "4", "Ġ", "1", "2", "a", "'S"]),
        ("default", ["12", "3", "4", "Ġ", "12", "a", "'", "S"]),
        (None, ["12", "3", "4", "Ġ", "12", "a", "'", "S"]),
    ],
)
def test_pre_tokenizers_cut_digits_and_contractions_their_own_way(pre, pieces):
    merges = ["1 2", "3 4", "12 34", "Ġ 12", "4 Ġ", "2 a", "a '", "' S"]
    assert tokens(gpt2_metadata(merges, pre=pre), "1234 12a'S") == pieces


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-4o", ["a", "b", "C", "ĊĊ", "?", "Ċ/", "Ġ", "Ġ!", "ĊĊ"]),
        ("llama-bpe", ["a", "bC", "ĊĊ", "?", "Ċ", "/", "Ġ", "Ġ!", "ĊĊ"]),
        ("gpt-2", ["a", "bC", "Ċ", "Ċ", "?", "Ċ", "/", "Ġ", "Ġ!", "ĊĊ"]),
    ],
)
def test_pre_tokenizers_cut_case_and_lines_their_own_way(pre, pieces):
    merges = ["b C", "Ċ Ċ", "Ċ /", "Ġ Ġ", "Ġ !"]
    assert tokens(gpt2_metadata(merges, pre=pre), "abC\n\n?\n/  !\n\n") == pieces


def test_llama_3_takes_a_word_that_is_a_token_whole():
    assert ids(gpt2_metadata(["a b"], words=("abc",), pre="llama-bpe"), "abc") == [3, 262]
    assert ids(gpt2_metadata(["a b"], words=("abc",), pre="gpt-4o"), "abc") == [261, C]


def test_a_byte_without_a_token_is_dropped_and_stays_a_border():
    vocabulary = [token for token in (*SPECIAL, *ALPHABET, "ab") if token != "Ā"]  # byte 0
    metadata = gpt2_metadata(["a b"], tokens=vocabulary, token_type=None)
    assert tokens(metadata, "ab a\x00b") == ["ab", "Ġ", "a", "b"]


def test_an_empty_token_gets_llama_cpp_s_name():
    tokenizer = tokenizer_from_gguf(gpt2_metadata([], tokens=[*ALPHABET, ""], token_type=None))
    assert tokenizer.token_to_id("[EMPTY_256]") == 256


@settings(deadline=None)
@given(PLAIN)
def test_byte_level_decoding_inverts(text):
    tokenizer = tokenizer_from_gguf(gpt2_metadata(["a b", "Ã ©", "Ġ Ġ"], pre="gpt-4o"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


# --- special tokens and ends ---


def test_special_tokens_are_found_in_text():
    metadata = gpt2_metadata([])
    assert ids(metadata, "a<mark>b<|im_start|><unk>c") == [A, 1, B, 2, 0, C]


def test_control_tokens_can_be_taken_as_text():
    tokenizer = tokenizer_from_gguf(gpt2_metadata([]))
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("<s><mark>").tokens == ["<", "s", ">", "<mark>"]


def test_control_texts_are_special_whatever_their_type():
    normal = [NORMAL] * 261
    assert ids(gpt2_metadata([], token_type=normal), "</s>") == [4]
    assert tokens(gpt2_metadata([], token_type=normal), "<s>") == ["<", "s", ">"]


def test_white_space_behind_special_tokens_stays_except_in_phi_3():
    metadata = llama_metadata({"▁": -9.0, "a": -1.0})
    phi_3 = metadata | {"general.name": "Phi3 mini"}
    assert ids(metadata, "</s>\n a", add_special_tokens=False) == [2, 259, 13, 259, 260]
    assert ids(phi_3, "</s>\n a", add_special_tokens=False) == [2, 259, 260]
    assert ids(phi_3, "<s>\n a", add_special_tokens=False) == [1, 259, 13, 259, 260]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pre": "gpt-4o"}, [A]),
        ({"pre": "llama-bpe"}, [3, A]),
        ({"pre": "llama-bpe", "add_bos_token": False}, [A]),
        ({"add_bos_token": True, "add_eos_token": True}, [3, A, 4]),
        ({"add_eos_token": True, "eos_token_id": np.uint32(2)}, [A, 2]),
    ],
)
def test_ends_follow_the_keys_then_the_pre_tokenizer(changes, expected):
    assert ids(gpt2_metadata([], **changes), "a") == expected
    assert ids(gpt2_metadata([], **changes), "a", add_special_tokens=False) == [A]


def test_llama_adds_bos_1_unless_told_otherwise():
    scores = {"▁": -9.0, "a": -1.0}
    assert ids(llama_metadata(scores), "a") == [1, 259, 260]
    assert ids(llama_metadata(scores), "") == [1]
    assert ids(llama_metadata(scores, add_bos_token=False, add_eos_token=True), "a") == [259, 260, 2]


def test_a_pair_of_texts_gets_both_ends():
    tokenizer = tokenizer_from_gguf(gpt2_metadata([], add_bos_token=True, add_eos_token=True))
    assert tokenizer.encode("a", "b").ids == [3, A, 4, 3, B, 4]


# --- SentencePiece ---

LETTERS = {"▁": -100.0, "a": -101.0, "b": -102.0, "c": -103.0}


def test_the_best_score_merges_first():
    assert tokens(llama_metadata(LETTERS | {"ab": -1.0, "bc": -2.0}), "abc") == ["▁", "ab", "c"]
    assert tokens(llama_metadata(LETTERS | {"ab": -2.0, "bc": -1.0}), "abc") == ["▁", "a", "bc"]
    assert tokens(llama_metadata(LETTERS | {"ab": -2.0, "▁ab": -3.0, "bc": -1.0}), "abc ab") == ["▁", "a", "bc", "▁ab"]


def test_runs_of_spaces_of_one_score_grow_from_the_left():
    runs = {"▁" * n: -1e9 for n in range(2, 5)}
    assert tokens(llama_metadata(LETTERS | runs, add_space_prefix=False), " " * 10) == ["▁▁▁▁", "▁▁▁▁", "▁▁"]


def test_what_is_no_piece_becomes_bytes():
    assert ids(llama_metadata(LETTERS), "é\n", add_special_tokens=False) == [259, 3 + 0xC3, 3 + 0xA9, 3 + 0x0A]


def test_a_space_goes_before_the_text_and_behind_every_special_token():
    assert tokens(llama_metadata(LETTERS), "a</s>a") == ["▁", "a", "</s>", "▁", "a"]
    assert tokens(llama_metadata(LETTERS, add_space_prefix=False), "a</s>a") == ["a", "</s>", "a"]
    assert tokens(llama_metadata(LETTERS), "") == []


@settings(deadline=None)
@given(PLAIN | st.text(" ▁ab\n"), st.booleans())
def test_sentencepiece_decoding_inverts(text, prefix):
    tokenizer = tokenizer_from_gguf(llama_metadata(LETTERS | {"ab": -1.0, "▁a": -2.0}, add_space_prefix=prefix))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text.replace("▁", " ")


# --- bad metadata ---

GPT2, LLAMA = gpt2_metadata(["a b"]), llama_metadata(LETTERS | {"ab": -1.0})
SIZE = len(GPT2["tokenizer.ggml.tokens"])


@pytest.mark.parametrize(
    ("base", "name", "value", "says"),
    [
        (GPT2, "model", None, "no tokenizer.ggml.model"),
        (GPT2, "model", 7, "tokenizer.ggml.model: wrong type\n  expected: a string\n  got: int"),
        (GPT2, "model", "t5", "unknown tokenizer model 't5'\n  expected: gpt2 or llama"),
        (GPT2, "pre", "made-up", "unknown pre-tokenizer 'made-up'"),
        (GPT2, "pre", ["gpt-2"], "tokenizer.ggml.pre: wrong type"),
        (GPT2, "tokens", None, "no tokenizer.ggml.tokens"),
        (GPT2, "tokens", "abc", "tokenizer.ggml.tokens: wrong type"),
        (GPT2, "tokens", np.arange(SIZE), "expected: an array of strings\n  got: ndarray of int64"),
        (GPT2, "tokens", ["a", 3], "got: with int"),
        (GPT2, "tokens", ["a", "b", "a"], "token 'a' is there twice\n  got: ids 0 and 2"),
        (GPT2, "tokens", ["a", "", "[EMPTY_1]"], "token '[EMPTY_1]' is there twice"),
        (GPT2, "token_type", [1, 2], f"wrong length\n  expected: {SIZE}, one a token\n  got: 2"),
        (GPT2, "token_type", [1.5] * SIZE, "tokenizer.ggml.token_type: wrong type"),
        (GPT2, "token_type", [1] * (SIZE - 1) + [9], "token 261 has an unknown type\n  expected: 0 to 6\n  got: 9"),
        (GPT2, "token_type", [[1], [1, 2]], "tokenizer.ggml.token_type: wrong type"),
        (GPT2, "merges", None, "no tokenizer.ggml.merges"),
        (GPT2, "merges", ["a b", "ab"], "merge 1 does not join two tokens into a third"),
        (GPT2, "merges", ["a c"], "got: 'a c'"),
        (GPT2, "merges", ["a qq"], "got: 'a qq'"),
        (GPT2, "merges", ["a  b"], "got: 'a  b'"),
        (GPT2, "merges", [" ab"], "got: ' ab'"),
        (GPT2, "merges", [b"a b"], "got: with bytes"),
        (GPT2, "bos_token_id", None, "no tokenizer.ggml.bos_token_id"),
        (GPT2, "bos_token_id", SIZE, f"not a token id\n  expected: 0 to {SIZE - 1}\n  got: {SIZE}"),
        (GPT2, "bos_token_id", -1, "tokenizer.ggml.bos_token_id: not a token id"),
        (GPT2, "bos_token_id", True, "tokenizer.ggml.bos_token_id: not a token id"),
        (GPT2, "bos_token_id", "3", "tokenizer.ggml.bos_token_id: not a token id"),
        (GPT2, "add_eos_token", 1, "tokenizer.ggml.add_eos_token: wrong type"),
        (LLAMA, "scores", None, "no tokenizer.ggml.scores"),
        (LLAMA, "scores", [0.0], "tokenizer.ggml.scores: wrong length"),
        (LLAMA, "scores", ["x"] * 264, "tokenizer.ggml.scores: wrong type"),
        (LLAMA, "scores", 3.5, "tokenizer.ggml.scores: wrong type"),
        (LLAMA, "scores", [float("nan")] * 264, "tokenizer.ggml.scores: not all finite\n  got: token 0"),
        (LLAMA, "tokens", [str(i) for i in range(264)], "no piece <0x00>"),
        (LLAMA, "add_space_prefix", "yes", "tokenizer.ggml.add_space_prefix: wrong type"),
        (LLAMA, "eos_token_id", 264, "tokenizer.ggml.eos_token_id: not a token id"),
    ],
)
def test_bad_metadata_is_said_clearly(base, name, value, says):
    metadata = base | {f"tokenizer.ggml.{flag}": True for flag in ("add_bos_token", "add_eos_token")}
    metadata[f"tokenizer.ggml.{name}"] = value
    if value is None:
        del metadata[f"tokenizer.ggml.{name}"]
    with pytest.raises(CheckpointError) as error:
        tokenizer_from_gguf(metadata)
    assert says in str(error.value)


def test_an_unknown_pre_tokenizer_lists_the_known_ones_and_the_way_round():
    with pytest.raises(CheckpointError, match=r"one of .*gpt-2, gpt-4o.*smollm") as error:
        tokenizer_from_gguf(gpt2_metadata([], pre="made-up"))
    assert "what to do: give token ids instead of text" in str(error.value)


def test_equal_scores_that_only_position_could_settle_are_refused():
    with pytest.raises(CheckpointError, match="pieces 'ab' and 'bc' have the same score and share 'b'"):
        tokenizer_from_gguf(llama_metadata(LETTERS | {"ab": -1.0, "bc": -1.0}))


# --- tokenizer.json ---


def test_tokenizer_json_is_read_as_it_is(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer_from_gguf(gpt2_metadata(["a b"], add_bos_token=True)).save(str(path))
    assert tokenizer_from_file(path).encode("abc<mark>").ids == [3, 261, C, 1]


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b'{"version": "1.0", "mod', b"\xff\xfe", b"\0" * 99])
def test_a_damaged_tokenizer_json_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a readable tokenizer\.json"):
        tokenizer_from_file(path)


def test_a_tokenizer_json_that_makes_the_library_panic_is_named_too(tmp_path):
    path = tmp_path / "tokenizer.json"
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    path.write_text(json.dumps({"version": "1.0", "model": model | {"continuing_subword_prefix": "long"}}))
    with pytest.raises(CheckpointError, match="not a readable"):
        tokenizer_from_file(path)


def test_an_absent_tokenizer_json_is_named(tmp_path):
    for path in (tmp_path / "tokenizer.json", tmp_path):
        with pytest.raises(CheckpointError, match="no tokenizer here"):
            tokenizer_from_file(path)
