"""Bytes on disk to canonical names, configs and tokenizers; no model mathematics."""

from assay.loaders.checkpoint import Checkpoint, open_checkpoint
from assay.loaders.errors import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint"]
