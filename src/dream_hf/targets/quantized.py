"""Targets whose weights are rounded to few bits while they are loaded, by bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

QUANTIZATIONS = ("4bit", "8bit")


def check_quantization(name: str) -> None:
    """Refuse what cannot be, before anything is loaded.

    Raises:
        ValueError: Another name than those of `QUANTIZATIONS`.
        ImportError: bitsandbytes is not installed.
    """
    if name not in QUANTIZATIONS:
        raise ValueError(f"`quantization` ({name!r}) is unknown: use {' or '.join(map(repr, QUANTIZATIONS))}.")
    if find_spec("bitsandbytes") is None:
        raise ImportError(
            f"`quantization` ({name!r}) needs bitsandbytes, which is not installed. It is the extra `quantization` of "
            'dream-hf: `pip install ".[quantization]"` in a clone, or `pip install bitsandbytes`.'
        )


def quantization_config(name: str, dtype: Any) -> Any:
    """What `from_pretrained` is to be told; embeddings and head keep their bits.

    Args:
        name (`str`): `"4bit"` (NF4, as in QLoRA, arXiv 2305.14314) or `"8bit"` (LLM.int8(), arXiv 2208.07339).
        dtype (`torch.dtype`): What products with 4-bit weights are computed in; bfloat16 where this is no dtype.
    """
    from transformers import BitsAndBytesConfig

    if name == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute_dtype = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)
