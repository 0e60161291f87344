"""Where `convert_checkpoint` has always been importable from; it lives in `drafters.dream.conversion`."""

from .drafters.dream.conversion import convert_checkpoint

__all__ = ["convert_checkpoint"]
