"""How byte-level BPE vocabularies cut text into words before merging, by the name a GGUF gives in tokenizer.ggml.pre.

The names, the patterns and their flags are those of llama.cpp (src/llama-vocab.cpp, src/unicode.cpp), because in a GGUF
the name is all there is. Where llama.cpp departs from the pattern a model was trained with, so do we: its `gpt-4o` and
`tekken` tell upper from lower case in ASCII only and leave combining marks out of words, while tokenizer.json of the
same models covers every script. Text such as "ÉcoleÉté" or "e" + U+0301 then gets other ids from a GGUF than from a
tokenizer.json.
"""

from collections.abc import Container
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

from assay.loaders.errors import CheckpointError

# Each letter is spelt in both cases: (?i) would also let U+017F stand for s.
_CONTRACTION = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
# llama.cpp's stand-ins for \p{Lu}... and \p{Ll}...: a letter that is not an ASCII letter of the other case
_NOT_LOWER, _NOT_UPPER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_CASED_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"


def _cased_words(suffix: str) -> str:
    lead = r"[^\r\n\p{L}\p{N}]?"
    return f"{lead}{_NOT_LOWER}*{_NOT_UPPER}+{suffix}|{lead}{_NOT_LOWER}+{_NOT_UPPER}*{suffix}"


_GPT_2 = r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA_3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
_QWEN_2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
_GPT_4O = rf"{_cased_words(f'(?:{_CONTRACTION})?')}|\p{{N}}{{1,3}}|{_CASED_SYMBOLS}|{_SPACES}"
_TEKKEN = rf"{_cased_words('')}|\p{{N}}|{_CASED_SYMBOLS}|{_SPACES}"


@dataclass(frozen=True)
class PreTokenizer:
    """Patterns applied in order, each to the pieces the one before left; and what else the name implies."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is itself a token is taken whole, whatever the merges would make of it
    add_bos: bool = False  # what holds where tokenizer.ggml.add_bos_token is absent


_FAMILIES = {
    ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"): PreTokenizer((_GPT_4O,)),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"): (
        PreTokenizer((_LLAMA_3,), ignore_merges=True, add_bos=True)
    ),
    ("dbrx", "smaug-bpe", "chatglm-bpe"): PreTokenizer((_LLAMA_3,)),
    ("glm4", "glm5"): PreTokenizer((_LLAMA_3,), ignore_merges=True),
    ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"): (
        PreTokenizer((_QWEN_2,))
    ),
    ("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "mpt", "olmo", "jais", "trillion"): (
        PreTokenizer((_GPT_2,))
    ),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"): (
        PreTokenizer((r"\p{N}", _GPT_2))
    ),
    ("tekken",): PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    # what llama.cpp falls back to for files from before the key existed
    ("default",): PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT_2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
PRE_TOKENIZERS = {name: pre_tokenizer for names, pre_tokenizer in _FAMILIES.items() for name in names}


def find_pre_tokenizer(name: str) -> PreTokenizer:
    """The entry of that name in the table. Raises CheckpointError, listing the known names, when there is none."""
    if name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"unknown pre-tokenizer {name!r}",
            where="tokenizer.ggml.pre",
            expected=f"one of {', '.join(sorted(PRE_TOKENIZERS))}",
            remedy="give token ids instead of text: they need no tokenizer",
        )
    return PRE_TOKENIZERS[name]


def byte_level_splitter(pre_tokenizer: PreTokenizer, tokens: Container[str]) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer as `tokenizers` runs it: the patterns in turn, then bytes written as GPT-2's characters.

    A byte that is no token is dropped, and nothing merges across it.
    """
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre_tokenizer.patterns
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    missing = sorted(character for character in pre_tokenizers.ByteLevel.alphabet() if character not in tokens)
    if missing:
        codes = "".join(rf"\x{{{ord(character):x}}}" for character in missing)
        steps.append(pre_tokenizers.Split(Regex(f"[{codes}]"), "removed"))
    return pre_tokenizers.Sequence(steps)
