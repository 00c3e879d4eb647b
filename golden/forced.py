"""The forced pass: each tap computed by the oracle from the backend's own previous taps."""

from collections.abc import Collection, Mapping

import numpy as np

import assay.reference as reference
from assay.golden.backends import Progress
from assay.golden.noise import PROFILES, Profile
from assay.golden.routing import next_best, tied
from assay.loaders.checkpoint import Checkpoint
from assay.reference.config import GptOssConfig
from assay.reference.taps import Recorder, tap_table

ROUNDOFF = 2.0**-23  # a factor of 1 + less than half of it would be rounded away
ENOUGH = 32  # accidents of rounding from which noise is an average
A_POSITION = 4  # as so many count those of a position of a dense model; in gpt-oss as many as it has experts


def forced_pass(
    checkpoint: Checkpoint,
    tokens: list[int],
    chunks: list[int],
    backend: Mapping[str, np.ndarray],
    names: Collection[str],
    profile: Profile = PROFILES["float64"],
    progress: Progress = None,
    jitter: np.random.Generator | None = None,
    flipped: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """What the oracle computes for each named tap when every earlier tap has the backend's value.

    Taps that the backend lacks keep the oracle's own value (rounded to the profile), and the next one that
    it has spans them. Values that are not finite are not handed on either: everything after would be lost.
    With `jitter` all that is handed on is off by up to a float32 roundoff, so that sums round in another way.
    `flipped`, bool [T] by the names of choices of experts, says where the next best is taken for the last one.
    """
    table = tap_table(checkpoint.config)
    emulation = profile.emulation(checkpoint.model(profile.compute))
    recorder = Recorder(checkpoint.config, names, progress)
    cache, start = reference.KVCache(), 0
    for T in chunks:
        emulation.begin(start, T)

        def tap(name: str, array: np.ndarray, start: int = start, T: int = T) -> np.ndarray:
            array = profile.round(name, emulation.computed(name, array))
            if flipped is not None and name in flipped:
                array = next_best(array, emulation.now["router_logits"], flipped[name][start : start + T])
            recorder(name, array)
            checkpoint.layer_done(name)
            if name not in backend:
                return emulation.handed_on(name, array)
            theirs = backend[name]
            axis = table[name].axes.index("T")
            theirs = np.take(theirs, np.arange(start, start + T), axis=axis)
            if table[name].heavy:
                theirs = theirs[..., : start + T]
            finite = np.where(np.isfinite(theirs), theirs, array).astype(array.dtype, copy=False)
            if jitter is not None and finite.dtype == np.float32:
                finite = finite * (1 + jitter.uniform(-ROUNDOFF, ROUNDOFF, finite.shape)).astype(np.float32)
            return emulation.handed_on(name, finite)

        reference.forward(emulation.model, np.array(tokens[start : start + T]), cache=cache, tap=tap)
        start += T
    return recorder.values


def noisy_pass(
    checkpoint: Checkpoint,
    tokens: list[int],
    chunks: list[int],
    backend: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    profile: Profile,
    progress: Progress = None,
) -> dict[str, np.ndarray]:
    """The forced pass as a profile computes it, its distance from `expected` being its typical noise.

    Few tokens leave too little to judge by, a few experts' values, or one factor that a norm has for all values of a
    position: the distance then is the root mean square over several seeds of jitter. Where choices of experts are
    spanned and nearly tied, the noise is that of choosing otherwise too. float64 has nothing above it to be compared
    with: its noise is float32's, made smaller by the ratio of their roundoffs.
    """
    if profile.name == "float64":
        rough = PROFILES["float32"]
        passed = noisy_pass(checkpoint, tokens, chunks, backend, expected, rough, progress)
        smaller = profile.unit_roundoff / rough.unit_roundoff
        return {name: expected[name] + smaller * (array - expected[name]) for name, array in passed.items()}
    passes = [forced_pass(checkpoint, tokens, chunks, backend, expected, profile, progress)]
    config = checkpoint.config
    few = len(tokens) * (config.num_experts_per_tok if isinstance(config, GptOssConfig) else A_POSITION)
    for seed in range(1, min(16, -(-ENOUGH // few))):
        jitter = np.random.default_rng(seed)
        passes.append(forced_pass(checkpoint, tokens, chunks, backend, expected, profile, jitter=jitter))
    open_choices = nearly_tied(checkpoint, backend, expected, passes[0])
    if len(passes) == 1 and not open_choices:
        return passes[0]
    noise = {name: _root_mean_square([p[name] - value for p in passes]) for name, value in expected.items()}
    if open_choices:
        other = forced_pass(checkpoint, tokens, chunks, backend, expected, profile, flipped=open_choices)
        noise = {name: np.hypot(noise[name], other[name] - value) for name, value in expected.items()}
    return {name: value + noise[name] for name, value in expected.items()}


def nearly_tied(
    checkpoint: Checkpoint,
    backend: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    noisy: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Choices of experts that the backend does not show and noise may decide: bool [T] by tap, if there are any."""
    config = checkpoint.config
    if not isinstance(config, GptOssConfig) or config.num_experts_per_tok == config.num_local_experts:
        return {}
    found, A = {}, config.num_experts_per_tok
    for name, logits_TN in expected.items():
        ids = name.replace("router_logits", "expert_ids")
        if ids == name or name in backend or ids in backend:
            continue
        open_T = tied(logits_TN, A, noisy[name] - logits_TN)
        if open_T.any():
            found[ids] = open_T
    return found


def _root_mean_square(arrays: list[np.ndarray]) -> np.ndarray:
    return np.sqrt(np.mean(np.square(arrays), axis=0))
