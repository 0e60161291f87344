"""Where `compress_text` has always been importable from; it lives in `drafters.dream.compression`."""

from .drafters.dream.compression import DrafterText, compress_text, novelty, tokens_to_keep
from .runtime.alignment import left_aligned

__all__ = ["DrafterText", "compress_text", "left_aligned", "novelty", "tokens_to_keep"]
