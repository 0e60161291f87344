"""The target's forwards over draft trees: as they come, or compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache

from ..drafters.dream.configuration import DreamConfig
from ..runtime.compilation import Settings, compiled_function, let_nodes_vary, pad_tree, padded_count, run_model
from ..runtime.kv_cache import SlotLayer, Slots, slot_layers
from ..runtime.static_kv_cache import StaticSlots, static_layers
from ..targets.target import DecoderRecord, Target
from ..targets.tree_proof import TreeProof, are_tree_masks
from .tree import DraftTree


class Forwards:
    """The target's forwards, run as they are.

    Args:
        target (`Target`): The target.
        batch_size (`int`): Rows.
        record (`DecoderRecord`): Where the features of the forwards are recorded.
    """

    layers: list[SlotLayer]
    settings: Settings | None = None  # how they are compiled, if they are

    def __init__(self, target: Target, batch_size: int, record: DecoderRecord):
        self.target, self.record = target, record
        self.slots = Slots([0] * batch_size)
        self.proof = TreeProof(target.model, target.decoder, [m.q_proj for m in target.rescaled_attentions])

    def arguments(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """The target's arguments from the prefill on."""
        return model_kwargs

    @contextmanager
    def using(self, cache: Cache) -> Iterator[None]:
        """Let a prefilled cache take trees while in the block; after it, it is as plain decoding would have left it."""
        with slot_layers(cache, self.slots) as self.layers:
            yield

    def pad(self, tree: DraftTree) -> DraftTree:
        """The tree that the forward runs over: `tree`, with nodes behind it that nobody looks at."""
        return tree

    def __call__(self, inputs: dict[str, Any], num_nodes: int) -> Any:
        """The target's outputs for the prepared `inputs` of `num_nodes` nodes per row."""
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = num_nodes
        with self.proof.watching(num_nodes):
            return self.target.model(**inputs, return_dict=True)

    def features(self, outputs: Any) -> torch.Tensor:
        """Features (B, N, H) of the nodes in the last forward, whose outputs these are."""
        return self.record.take()[1]

    def keep(self, path: torch.Tensor) -> None:
        """Keep the nodes `path` (B, P) in the cache, and take the others back."""
        is_in_place = path.device.type == "cpu" and bool((path[:, -1] == path.shape[1] - 1).all())  # elsewhere a sync
        if is_in_place:
            return
        for layer in self.layers:
            layer.keep(path)


class CompiledForwards(Forwards):
    """The target's forwards, compiled: over padded trees, in buffers that stay where they are.

    Args:
        target (`Target`): The target.
        batch_size (`int`): Rows.
        record (`DecoderRecord`): Where the features of the prefill are recorded.
        settings (`Settings`): How to compile.
        config (`DreamConfig`): The largest tree: its levels, and drafted nodes.
    """

    slots: StaticSlots
    settings: Settings

    def __init__(
        self, target: Target, batch_size: int, record: DecoderRecord, settings: Settings, config: DreamConfig
    ):
        super().__init__(target, batch_size, record)
        self.settings = settings
        self.tree_size = config.tree_size
        self.slots = StaticSlots([0] * batch_size, path_size=config.tree_depth + 1)

    def arguments(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        # The last hidden states are the features. The prefill returns them, too, and so installs transformers' hooks.
        return {**model_kwargs, "output_hidden_states": model_kwargs.get("output_hidden_states") or -1}

    @contextmanager
    def using(self, cache: Cache) -> Iterator[None]:
        self.run = compiled_function(
            self.target.model, run_model, self.settings
        )  # now that the prefill's hooks are gone
        with static_layers(cache, self.slots, self.tree_size + 1, self.is_dynamic) as self.static_layers:
            yield

    @property
    def is_dynamic(self) -> bool:
        """Whether one graph serves all numbers of nodes and slots: on a CPU, where that costs next to nothing."""
        return self.target.model.device.type == "cpu" and self.settings.dynamic is not False

    def pad(self, tree: DraftTree) -> DraftTree:
        num_nodes = padded_count(tree.num_nodes, self.tree_size, tree.tokens.device)
        for layer in self.static_layers:
            layer.reserve(num_nodes)
        return pad_tree(tree, num_nodes)

    def __call__(self, inputs: dict[str, Any], num_nodes: int) -> Any:
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = 0  # all: a number of nodes would be compiled in
        if self.is_dynamic:
            let_nodes_vary(inputs)
        run = self.run if num_nodes <= self.tree_size + 1 else self.run.function  # an odd shape is not worth a graph
        if self.proof.is_missing(num_nodes) and not self._is_proven_by_masks(inputs):
            run = self.run.function  # compiled code cannot be watched
        elif self.proof.is_missing(num_nodes):
            self.proof.take(num_nodes)
        with self.proof.watching(num_nodes):
            outputs = run(self.target.model, {**inputs, "return_dict": True})
        self.run.watched.add(self.target.text_config._attn_implementation)
        self.slots.settle()
        return outputs

    def _is_proven_by_masks(self, inputs: dict[str, Any]) -> bool:
        """Whether the masks were built beforehand and the model has been seen, in an earlier call, to use such masks."""
        is_known = self.target.text_config._attn_implementation in self.run.watched
        return is_known and are_tree_masks(inputs.get("attention_mask"))

    def features(self, outputs: Any) -> torch.Tensor:
        return outputs.hidden_states[-1]

    def keep(self, path: torch.Tensor) -> None:
        self.slots.keep(path)


def make_forwards(
    target: Target, config: DreamConfig, settings: Settings | None, batch_size: int, record: DecoderRecord
) -> Forwards:
    """Forwards that are compiled as `settings` say, if there are any."""
    if settings is None:
        return Forwards(target, batch_size, record)
    return CompiledForwards(target, batch_size, record, settings, config)
