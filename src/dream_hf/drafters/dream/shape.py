"""Shapes of drafters that pay: how many weights a step reads, and what makes a drafter read fewer.

On an accelerator a step with few tokens takes as long as reading the weights does. A plain step reads the target's decoder and
its head; with a tree of depth d it also reads the drafter, and the head's rows that may be drafted, d times each.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from transformers import AutoModel
from transformers.configuration_utils import PreTrainedConfig

from .configuration import DreamConfig
from .modeling import DreamModel

MOST = 1.3  # plain steps that a step's weights may be worth
LEAST_DEPTH = 3
FEW_TOKENS = 32_000  # of a reduced draft vocabulary


def weight_ratio(target_config: PreTrainedConfig, config: DreamConfig) -> float:
    """Weights read in a step with a tree over those read in a plain one, both models in one dtype.

    Of a mixture of experts all experts count as read: the nodes of a tree use most of them.

    Args:
        target_config (`PreTrainedConfig`): The target's configuration, vision-language or text-only.
        config (`DreamConfig`): The drafter's.

    Returns:
        `float`: 1 for no drafting at all.

    Raises:
        ValueError: transformers knows no model for the target's text configuration.
    """
    text = target_config.get_text_config(decoder=True)
    return _ratio(_decoder_size(text), text.vocab_size * text.hidden_size, config)


def suggested_shape(target_config: PreTrainedConfig, most: float = MOST) -> dict[str, int]:
    """What to change in a new drafter for a target so that its steps read few weights.

    The deepest tree that allows it, and then as little as possible of: a draft vocabulary of 32,000 tokens, an MLP no wider
    than the hidden size. If nothing is enough, all of it, at the least depth.

    Args:
        target_config (`PreTrainedConfig`): The target's configuration, vision-language or text-only.
        most (`float`): The largest [`weight_ratio`].

    Returns:
        `dict`: Arguments of [`DreamConfig`]; `draft_vocab_size` is for the trainer, which chooses the tokens.

    Raises:
        ValueError: transformers knows no model for the target's text configuration.
    """
    text = target_config.get_text_config(decoder=True)
    decoder, head = _decoder_size(text), text.vocab_size * text.hidden_size
    shape: dict[str, int] = {}
    for shape in _shapes(DreamConfig.from_target(target_config)):
        if _ratio(decoder, head, DreamConfig.from_target(target_config, **shape)) <= most:
            break
    return shape


def _shapes(full: DreamConfig) -> Iterator[dict[str, int]]:
    """Shapes from the fullest on."""
    vocabulary = {"draft_vocab_size": FEW_TOKENS} if full.vocab_size > 2 * FEW_TOKENS else {}
    mlp = {"intermediate_size": full.hidden_size} if full.intermediate_size > full.hidden_size else {}
    for depth in range(full.tree_depth, LEAST_DEPTH - 1, -1):
        for parts in ({}, vocabulary, mlp, vocabulary | mlp):
            yield {"tree_depth": depth, **parts}


def _ratio(decoder: int, head: int, config: DreamConfig) -> float:
    with torch.device("meta"):
        drafter = sum(weight.numel() for weight in DreamModel(config).parameters())
    drafted = head * (config.draft_vocab_size or config.vocab_size) // config.vocab_size
    return 1 + config.tree_depth * (drafter + drafted) / (decoder + head)


def _decoder_size(text_config: Any) -> int:
    """Weights of a text decoder without its embeddings."""
    with torch.device("meta"):
        decoder = AutoModel.from_config(deepcopy(text_config))
    embedding = decoder.get_input_embeddings().weight
    return sum(weight.numel() for weight in decoder.parameters() if weight is not embedding)
