"""Which encoding each tensor gets in another container: the same values if it can hold them, quantised if asked."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from assay.loaders.errors import CheckpointError
from assay.loaders.quantise import Accuracy, AccuracySums, Encoder
from assay.loaders.recode import Kept, candidates, keeps, recode
from assay.loaders.weight import Parts, Weight, group_of
from assay.loaders.write_gguf import is_gguf_vector
from assay.reference.formats import BF16, F16, F32
from assay.reference.formats.floats import FloatFormat
from assay.reference.weights import Encoding

FLOATS = {"F32": F32, "F16": F16, "BF16": BF16}


@dataclass
class Rounding:
    """What quantising did to a weight; known once it was written."""

    accuracy: Accuracy | None = None


@dataclass(frozen=True)
class Choice:
    """What becomes of one weight: `after` holds it in the target's encoding."""

    before: Weight
    after: Weight
    kept: Kept
    rounding: Rounding = field(default_factory=Rounding)


def plan(weights: Mapping[str, Weight], to: str, quant: Encoder | None, narrow_vectors: bool) -> Iterator[Choice]:
    """Choose an encoding for each weight in turn; reads the values where the encodings do not decide.

    `narrow_vectors` undoes GGUF's habit of widening vectors to F32, where no bit is lost.
    """
    common = _common_float(list(weights.values())) if narrow_vectors else F32
    forms = {}
    if to == "safetensors" and any(".mlp.experts." in name for name in weights):
        forms = _expert_forms(weights, quant, common)
    for name, weight in weights.items():
        yield _into(weight, forms[name]) if name in forms else choose(weight, to, quant, common)


def choose(weight: Weight, to: str, quant: Encoder | None, common: FloatFormat) -> Choice:
    """The smallest encoding that keeps the values; `quant` for a matrix that is in floats here or would become so."""
    source = weight.encoding
    if to == "gguf" and is_gguf_vector(weight.name):
        return _into(weight, F32)
    is_float = source in FLOATS.values()
    for form in [] if is_float else candidates(source, to, ".mlp.experts." in weight.name):
        if kept := keeps(weight, form):
            return Choice(weight, recoded(weight, form), kept)
    if quant is not None and weight.is_matrix and _fits(weight, quant.encoding, to):
        return _quantised_choice(weight, quant)
    if is_float and not (source is F32 and is_gguf_vector(weight.name)):
        return _into(weight, source)
    return next(_into(weight, form) for form in (common, BF16, F16, F32) if keeps(weight, form) is Kept.BITS)


def _into(weight: Weight, form: Encoding) -> Choice:
    """The weight in a given encoding that keeps its values; AssertionError if it does not."""
    kept = keeps(weight, form)
    assert kept, f"{weight.name} as {form.name}"
    return Choice(weight, recoded(weight, form), kept)


def _quantised_choice(weight: Weight, quant: Encoder) -> Choice:
    """The weight as `quant` makes it; where that is a float format, it may still keep the values."""
    if isinstance(quant.encoding, FloatFormat) and (kept := keeps(weight, quant.encoding)):
        return Choice(weight, recoded(weight, quant.encoding), kept)
    rounding = Rounding()
    return Choice(weight, quantised(weight, quant, rounding), Kept.NOT, rounding)


def recoded(weight: Weight, form: Encoding) -> Weight:
    """The weight in another encoding that keeps its values."""
    source = weight.encoding

    def pieces(rows: int) -> Iterator[Parts]:
        return (recode(source, parts, form) for parts in weight.pieces(rows))

    return weight if form is source or form == source else replace(weight, encoding=form, pieces=pieces)


def quantised(weight: Weight, quant: Encoder, rounding: Rounding) -> Weight:
    """The weight rounded to another encoding, its rounding error counted as the pieces pass."""
    source = weight.encoding

    def pieces(rows: int) -> Iterator[Parts]:
        sums = AccuracySums()
        for parts in weight.pieces(rows):
            values = source.decode(parts)
            try:
                coded = quant.encode(values)
            except ValueError as error:
                what = f"{weight.name} cannot be encoded as {quant.encoding.name}: {error}"
                raise CheckpointError(what, remedy="choose another --quant") from error
            sums.add(values, quant.encoding.decode(coded))
            yield coded
        rounding.accuracy = sums.result(weight.shape)

    return replace(weight, encoding=quant.encoding, pieces=pieces)


def _fits(weight: Weight, form: Encoding, to: str) -> bool:
    """Whether the rows of a matrix are whole blocks, and the container has a place for this encoding there."""
    if isinstance(form, FloatFormat):
        return True
    return weight.shape[-1] % group_of(form) == 0 and (to != "safetensors" or ".mlp.experts." in weight.name)


def _common_float(weights: list[Weight]) -> FloatFormat:
    """The float format that a GGUF's model had: of its matrices, or the first that holds all its vectors."""
    sizes: Counter[str] = Counter()
    for weight in weights:
        if weight.is_matrix and weight.encoding in FLOATS.values():
            sizes[weight.encoding.name] += weight.nbytes
    if sizes:
        return FLOATS[sizes.most_common(1)[0][0]]
    vectors = [weight for weight in weights if not weight.is_matrix]
    return next((f for f in (BF16, F16) if all(keeps(v, f) is Kept.BITS for v in vectors)), F32)


def _expert_forms(weights: Mapping[str, Weight], quant: Encoder | None, common: FloatFormat) -> dict[str, Encoding]:
    """Floats for all expert matrices if some need them: Hugging Face's layout has gate and up in one tensor."""
    experts = [w for name, w in weights.items() if ".mlp.experts." in name and name.endswith(".weight")]
    forms = [choose(weight, "safetensors", quant, common).after.encoding for weight in experts]
    if all(form is forms[0] for form in forms):
        return {}
    return {weight.name: F32 for weight in experts}
