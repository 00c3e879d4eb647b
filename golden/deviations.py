"""What a backend does otherwise by design: accepted where it explains a tap, and listed with its effect."""

from typing import Any

import numpy as np

from assay.golden.diagnose import Diagnosis, together
from assay.golden.measure import Comparison, logit_view
from assay.golden.mistakes import mistake_named
from assay.golden.mistakes.replay import Replay, Run
from assay.golden.noise import PROFILES


class Deviations:
    """A profile's deviations, as far as they apply to the checkpoint; `seen` are those that explained some tap.

    `clean_TV` are the oracle's own logits of these tokens, if they are at hand: a whole pass less.
    """

    def __init__(self, diagnosis: Diagnosis, ids: tuple[str, ...], clean_TV: np.ndarray | None = None):
        self.diagnosis, self.clean_TV = diagnosis, clean_TV
        known = [mistake_named(id) for id in ids]
        self.accepted = tuple(mistake for mistake in known if mistake.acts(diagnosis.run.checkpoint))
        self.seen: dict[str, list[str]] = {}

    def explain(self, name: str) -> Comparison | None:
        """What is left of a diverging tap's error with the deviations; None if they do not explain it."""
        choices = [self.accepted] if len(self.accepted) < 2 else [self.accepted, *((one,) for one in self.accepted)]
        for mistakes in choices:
            found = self.diagnosis.judge(mistakes, name) if mistakes else None
            if found is not None and found.allowed:
                for mistake in mistakes:
                    self.seen.setdefault(mistake.id, []).append(name)
                return found
        return None

    def listed(self) -> list[dict[str, Any]]:
        """Those seen: how much each alone changes the oracle's predictions on these tokens."""
        run = self.diagnosis.run
        rows = []
        clean_TV = self.clean_TV
        if clean_TV is None and self.seen:
            clean_TV = _logits(run, ())
        for id, taps in self.seen.items():
            mistake = mistake_named(id)
            assert clean_TV is not None
            effect = logit_view(clean_TV, _logits(run, (mistake,)))
            changes = round(len(run.tokens) * (1 - effect["top1_agreement"]))
            rows.append(
                {
                    "id": id,
                    "title": mistake.title,
                    "taps": len(taps),
                    "first": taps[0],
                    "kl_nats": effect["kl_nats"],
                    "top1_changes": changes,
                    "of": len(run.tokens),
                }
            )
        return rows


def _logits(run: Run, mistakes: tuple[Any, ...]) -> np.ndarray:
    """The oracle's own logits with these mistakes, nothing forced."""
    free = Run(run.checkpoint, run.tokens, run.chunks, {})
    return Replay(free, together(mistakes), PROFILES["float64"]).value("logits")
