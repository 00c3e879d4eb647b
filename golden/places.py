"""Places on an axis, and numbers, in few words."""

from collections.abc import Sequence

import numpy as np

NOUNS = {
    "T": "position",
    "S": "key",
    "D": "channel",
    "H": "query head",
    "K": "key/value head",
    "C": "head channel",
    "N": "expert",
    "A": "expert slot",
    "F": "channel",
    "V": "vocabulary id",
    "O": "row",
    "I": "column",
}


def at(letter: str, places: np.ndarray, n: int) -> str:
    """Places with what they are places of: `position 3`, `query heads 0 and 1`."""
    return f"{NOUNS[letter]}{'s' if len(places) != 1 else ''} {placed(places, n)}"


def placed(places: np.ndarray, n: int) -> str:
    """Ascending indices into n entries: `all 40`, `3`, `from 12 on`, `4 to 9`, `every 2nd from 1`, or the first few."""
    count = len(places)
    if count == n:
        return f"all {n}"
    if count <= 2:
        return " and ".join(map(str, places))
    steps = np.unique(np.diff(places))
    first, last = int(places[0]), int(places[-1])
    if len(steps) == 1 and steps[0] == 1:
        return f"from {first} on" if last == n - 1 else f"{first} to {last}"
    if len(steps) == 1:
        return f"every {steps[0]}{'nd' if steps[0] == 2 else 'rd' if steps[0] == 3 else 'th'} from {first} to {last}"
    return ", ".join(map(str, places[:3])) + f" and {count - 3} more"


def numbers(values: Sequence[float] | np.ndarray, digits: int = 3, most: int = 4) -> str:
    """The first few of some numbers."""
    shown = ", ".join(f"{value:.{digits}g}" for value in values[:most])
    return shown + (", ..." if len(values) > most else "")
