"""What differs between the versions of transformers that are supported, 5.20 to 5.24. No other module asks for a version."""

from __future__ import annotations

from inspect import signature
from typing import Any

from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin

# The argument of forwards, the entry in `model_kwargs` and the field of outputs that hold the cache: `past_key_values` until
# transformers 5.23. `generate()` goes on taking the old name.
CACHE = (
    "cache" if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
)


def cache_of(outputs: Any) -> Cache:
    """The cache in the outputs of a model or of `generate()`."""
    return getattr(outputs, CACHE)
