"""Errors of recording and checking."""

from assay.loaders.errors import CheckpointError


class GoldenError(CheckpointError):
    """A golden, a dump or a request that cannot be used; said like every other bad input."""
