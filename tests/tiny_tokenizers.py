"""Small real tokenizers: byte-level BPE trained on the text below, split as gpt-oss and Llama 3 split."""

import json
from pathlib import Path
from typing import Any

# The regular expressions of the published tokenizer.json files: OpenAI's o200k ("gpt-4o") and Llama 3's.
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_UNCASED = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT_4O = (
    rf"{_CASED}*{_UNCASED}+{_CONTRACTION}?|{_CASED}+{_UNCASED}*{_CONTRACTION}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = {"gpt_oss": GPT_4O, "llama": LLAMA_3}
SPECIAL = {
    "gpt_oss": (
        *("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|channel|>"),
        *("<|start|>", "<|end|>", "<|message|>", "<|call|>"),
    ),
    "llama": (
        *("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"),
        *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
    ),
}
# token that plays each role; generation stops at any of the last entry
ROLES: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
        "stop": ("<|return|>", "<|endoftext|>", "<|call|>"),
    },
    "llama": {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
        "stop": ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    },
}

TEXT = """\
The river turned north below the old mill, and for a while nobody in the valley could say why.
It had always gone past the church, under the two bridges, then out through the meadows to the sea;
now it ran behind the orchard, cold and quick, as if it were late for something. "We'll ask the miller,"
said the teacher. "He's the one who measures it." But the miller didn't know either: he'd written down
the height of the water every morning for 31 years, 4 months and 12 days, and nothing in his books, not
the flood of 1953, not the dry summers of 1976 and 2003, looked at all like this.

So they went up the hill together, the teacher, the miller, three children and a dog called Pepper. The
path was steep. They counted the steps: 10, 20, 50, 100, 250, 1000... At the top there was a wall, and in
the wall there was a door, and on the door somebody had painted, in careful blue letters, WHAT YOU MEASURE
YOU WILL MISS; WHAT YOU WATCH YOU WILL KEEP. "That's not true," said the smallest child. "Isn't it?" said
the miller. He sat down on a stone and took out his notebook.

A program is a list of small promises. The first line says what comes in, the last line says what goes out,
and everything between the two is somebody's opinion about the weather. When the numbers are wrong, it is
usually because one promise was kept twice or not at all: a sign, an index, a rounding, an order of two
words. Look at the place where they first differ. Before it, nothing is wrong; after it, nothing is right.

    def mean(values):
        total = 0.0
        for value in values:
            total += value
        return total / len(values)

    if __name__ == "__main__":
        print(mean([1.5, 2.25, 3.0]), "is the mean")  # 2.25

I've heard that you're leaving tomorrow, that they've sold the house, that she'd rather stay, that I'm to
blame. Don't believe all of it! The garden still needs water; the bread needs flour, salt, yeast and time;
the letters need an answer. Paper, pencil, lamp, window, winter, summer, mountain, market, question, number,
nothing, morning, evening, thinking, reading, writing, running, standing, station, nation, motion, action.
Caf\u00e9, na\u00efve, r\u00e9sum\u00e9, \u00fcber, \u00e9t\u00e9, ni\u00f1o, \u010desky; \u03b1\u03b2\u03b3
\u2264 \u03c0 \u2248 3.14159; 5\u20137 km; \u201cquoted\u201d \u2014 and so on\u2026
\u0414\u043e\u0431\u0440\u044b\u0439 \u0434\u0435\u043d\u044c. \u4f60\u597d\uff0c\u4e16\u754c\u3002
\u3053\u3093\u306b\u3061\u306f\u3002

Once the rain began it went on for a week. The road became a stream and the stream became a lake; people
took their boats to the baker and tied them to the lamp posts, and the dog slept on the table. On the eighth
day the clouds opened like a curtain. The river lay in its old bed, past the church, under the two bridges,
through the meadows, quite still, as though it had never been anywhere else.
Grandmother folded the tablecloth, lit the kitchen stove, and whispered: "Wonderful. Breakfast, everybody!"
"""


def train_tokenizer(family: str, vocab_size: int) -> Any:
    """A `tokenizers.Tokenizer` with exactly `vocab_size` tokens, the special ones last.

    Raises ValueError if the text is too short for that many merges.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=family == "llama"))
    split = pre_tokenizers.Split(Regex(SPLIT[family]), behavior="isolated")
    bytes_as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_as_letters])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    merged_size = vocab_size - len(SPECIAL[family])
    trainer = trainers.BpeTrainer(vocab_size=merged_size, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL[family]])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the training text yields {tokenizer.get_vocab_size()} tokens, not {vocab_size}")
    if family == "llama":
        bos = SPECIAL[family][0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return tokenizer


def write_tokenizer(directory: Path, family: str, vocab_size: int) -> dict[str, Any]:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json; answers config.json's token ids."""
    tokenizer, roles = train_tokenizer(family, vocab_size), ROLES[family]
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    names = {role: token for role, token in roles.items() if role != "stop"}
    tokenizer_config = names | {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    ids = {f"{role}_id": tokenizer.token_to_id(token) for role, token in names.items()}
    generation = ids | {"do_sample": True, "eos_token_id": [tokenizer.token_to_id(token) for token in roles["stop"]]}
    for name, content in (("tokenizer_config.json", tokenizer_config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    return ids
