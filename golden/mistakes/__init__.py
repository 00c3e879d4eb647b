"""The catalogue: mistakes that inference backends are known to have made, each as a variant of the oracle.

Every module here with a tuple `MISTAKES` is a family, and its `FAMILY` the heading: a file that is put beside the
others is part of the catalogue. Its function `injections()`, if it has one, makes them in the Numba path, by id.
"""

import pkgutil
from importlib import import_module
from types import ModuleType

from assay.golden.errors import GoldenError
from assay.golden.mistakes.mistake import Mistake


def _families() -> dict[str, ModuleType]:
    """The modules with mistakes, by heading; their names decide the order."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("inject"))
    modules = [import_module(f"{__name__}.{name}") for name in names]
    return {module.FAMILY: module for module in modules if hasattr(module, "MISTAKES")}


MODULES = _families()
FAMILIES: dict[str, tuple[Mistake, ...]] = {heading: module.MISTAKES for heading, module in MODULES.items()}
CATALOGUE: dict[str, Mistake] = {mistake.id: mistake for family in FAMILIES.values() for mistake in family}


def mistake_named(id: str) -> Mistake:
    """A mistake of the catalogue; GoldenError says which ids are near."""
    if id not in CATALOGUE:
        import difflib

        near = difflib.get_close_matches(id, CATALOGUE, 5, 0.4)
        raise GoldenError(f"unknown mistake {id!r}", expected=", ".join(near) or "an id that `assay mistakes` lists")
    return CATALOGUE[id]


__all__ = ["CATALOGUE", "FAMILIES", "MODULES", "Mistake", "mistake_named"]
