"""Every kind of public bug that the catalogue was drawn up from has its mistakes, or a reason why it can have none.

Numbers are those of the survey that the catalogue started from: `python -m tests.golden.mistakes.test_rows` prints it.
"""

from assay.golden.mistakes import CATALOGUE

ROWS: dict[int, tuple[str, str]] = {
    1: ("YaRN ramp rounded", "yarn-ramp-rounded"),
    2: ("YaRN attention factor wrong, doubled or ignored", "yarn-factor-missing yarn-factor-twice"),
    3: ("YaRN dropped, plain RoPE", "yarn-missing yarn-frequencies-plain rope-base-10000"),
    4: ("YaRN scales positions", "yarn-scales-positions"),
    5: ("YaRN ramp on the wrong index", "yarn-ramp-by-channel"),
    6: ("Llama-3 scaling missing", "llama3-missing llama3-linear"),
    7: ("interleaved against half-split, permute twice", "rope-neighbours qk-rows-to-neighbours qk-rows-to-halves"),
    8: ("RoPE tables or positions in 16 bits", "rope-angles-bfloat16 rope-positions-bfloat16 rope-positions-float16"),
    9: ("window one too many or few", "window-one-more window-one-less"),
    10: ("window missing, or on other layers", "window-missing window-on-all-layers window-on-other-layers"),
    11: ("sliding cache rolled or wrapped", "cache-rolled cache-rolled-back cache-ring-rolled"),
    12: ("a masked row, NaN", "own-key-masked"),
    13: ("sinks missing", "sinks-missing"),
    14: ("sinks twice", "sinks-twice"),
    15: ("sink misread, or as a value", "sinks-have-a-value sinks-of-the-next-head sinks-scaled"),
    16: ("clamp missing", "clamp-missing clamp-of-gate-missing"),
    17: ("plain SiLU, or without the 1", "silu-plain plus-one-missing"),
    18: ("gate and up swapped, not de-interleaved", "gate-up-swapped gate-up-not-interleaved gate-up-weights-swapped"),
    19: ("a flavour of GELU", "gelu gelu-tanh"),
    20: ("square matrix transposed", "expert-gate-transposed expert-up-transposed expert-down-transposed"),
    21: ("expert bias missing or multiplied", "gate-up-bias-missing down-bias-missing down-bias-per-rank"),
    22: ("reduced twice", "reduced-twice reduced-four-times"),
    23: ("softmax over all experts", "softmax-over-all-experts"),
    24: ("router in bfloat16", "router-bfloat16"),
    25: ("expert weights in the wrong slot", "expert-weights-wrong-slot expert-weights-next-slot"),
    26: ("nibble order", "mxfp4-nibbles-swapped mxfp4-read-as-halves mxfp4-read-as-neighbours"),
    27: ("scale exponent off", "mxfp4-exponent-high mxfp4-exponent-low mxfp4-exponent-two-low"),
    28: ("E8M0 byte 0 or 255 misread", "!a weight's blocks by their scale byte: golden/weight_blocks.py"),
    29: ("scale tensor cast or dropped", "!as 28"),
    30: ("Q4_0 offset, Q6_K zeros", "!decoders are judged by assay vectors, their weights as 28"),
    31: ("Q2_K, Q3_K, Q5, Q4_1 decoded wrongly", "!as 30"),
    32: ("container's type numbers clash", "!a loader's fault: assay verify"),
    33: ("float16 overflow", "!values that are not finite: the report's structure"),
    34: ("RMSNorm epsilon, or 1 + w", "norm-epsilon-smaller norm-epsilon-larger norm-plus-one"),
    35: ("positions restart or shift in later chunks", "positions-restart positions-one-late positions-one-early"),
    36: ("cached keys skipped", "cached-keys-skipped mask-from-chunk-start"),
    37: ("embedding tied or untied", "head-tied"),
    38: ("begin-of-sequence token, special tokens", "!token ids are compared before any number"),
    39: ("kernels at small or odd shapes", "!no one formula: found as an unknown fault"),
    40: ("int16 overflow in a mask beyond 32 k", "!as 39; needs 32769 tokens"),
    41: ("vocabulary cut or padded", "!the logits' shape is refused with both shapes"),
}


def test_every_row_has_mistakes_that_exist_or_a_reason() -> None:
    assert list(ROWS) == list(range(1, 42))
    named = [id for _, ids in ROWS.values() if not ids.startswith("!") for id in ids.split()]
    assert [id for id in named if id not in CATALOGUE] == []
    assert sum(not ids.startswith("!") for _, ids in ROWS.values()) == 31


if __name__ == "__main__":
    for number, (what, ids) in ROWS.items():
        print(f"{number:2}  {what:55} {ids}")
