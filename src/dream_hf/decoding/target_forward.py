"""The target's forwards over draft trees, as they come or compiled: where the nodes stand, what they see, what is kept.

B rows, N nodes of a tree, P nodes of an accepted path, H width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers.cache_utils import Cache

from ..compat import CACHE
from ..runtime import crossings
from ..runtime.compilation import Settings as CompileSettings
from ..runtime.compilation import compiled_function, run_model
from ..runtime.counts import Counts
from ..runtime.kv_cache import SlotLayer, capacity_for, into_slots, slot_layers
from ..runtime.leases import give_back, take_lease
from ..runtime.phases import CACHE_WORK, TARGET, phase
from ..runtime.recurrent.layers import TreeStates, state_layers
from ..runtime.recurrent.paths import NodePaths
from ..runtime.slots import Slots
from ..targets.target import PER_TOKEN, TOKEN_TYPES, DecoderRecord, Target
from ..targets.tree_masks import TreeScope, tree_scope
from ..targets.tree_proof import TreeProof, are_tree_masks
from .drafter import Drafter
from .settings import DraftSettings
from .tree import DraftTree

BUCKET = 8  # drafted nodes of a verification are padded to a multiple of it where fewer nodes are cheaper


class TargetForward:
    """Runs the target over trees, as it is.

    Args:
        target (`Target`): The target.
        batch_size (`int`): Rows.
        record (`DecoderRecord`): Where the features of the forwards are recorded.
        tree_size (`int`): Most drafted nodes of a tree.
    """

    layers: list[SlotLayer]
    compilation: CompileSettings | None = None  # how it is compiled, if it is

    def __init__(self, target: Target, batch_size: int, record: DecoderRecord, tree_size: int):
        self.target, self.record, self.tree_size = target, record, tree_size
        self.slots = Slots([0] * batch_size)
        self.states = TreeStates()
        self.proof = TreeProof(target.model, target.decoder, [m.q_proj for m in target.rescaled_attentions])

    def arguments(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """The target's arguments from the prefill on."""
        return model_kwargs

    def begin(self, cache: Cache, model_kwargs: dict[str, Any], max_new_tokens: int | None) -> None:
        """Set aside, after the prefill, what changes with every tree; the rest of the arguments stays the same from here on.

        Args:
            cache (`Cache`): Holds the prompt.
            model_kwargs (`dict`): Arguments of the target's forward.
            max_new_tokens (`int`, *optional*): Tokens that may follow the prompt, if there is a limit.
        """
        kwargs = {**model_kwargs, CACHE: cache}
        self.prompt_mask: torch.Tensor | None = kwargs.pop("attention_mask", None)
        positions = kwargs.pop("position_ids", None)
        self.root_positions = None if positions is None else positions[..., -1:] + 1
        self.slots.place([int(cache.get_seq_length())] * len(self.slots.lengths))
        self.prompt_slots = self.slots.longest
        self.longest_text: int | None = None
        if max_new_tokens is not None:  # never more slots than the longest text and a tree need
            self.longest_text = self.prompt_slots + max_new_tokens
            self.slots.limit = self.longest_text + self.tree_size + 1
        for name in TOKEN_TYPES:
            if kwargs.get(name) is not None:  # new tokens are text
                kwargs[name] = torch.zeros_like(kwargs[name][:, :1])
        self.kwargs = kwargs
        num_positions = getattr(self.target.text_config, "max_position_embeddings", None)
        self.last_position: int | None = None  # the last one the target was made for, counted from the first root's
        if self.root_positions is not None and num_positions is not None:
            self.last_position = num_positions - 1 - int(self.root_positions.max())

    @contextmanager
    def using(self, cache: Cache, is_kept: bool) -> Iterator[None]:
        """Let a prefilled cache take trees while in the block; after it, it is as plain decoding would have left it.

        If nobody keeps the cache, there may be nothing of use in it afterwards.
        """
        originals = list(cache.layers)
        with slot_layers(cache, self.slots) as self.layers, state_layers(cache, originals, self.states):
            yield

    def take_over(self, cache: Cache) -> None:
        """Let a prefilled cache that nobody else looks at take trees from here on."""
        self.layers = list(into_slots(cache, self.slots).values())

    def positions_left(self) -> int | None:
        """How deep a tree may grow below the longest row while the target knows the positions; past them it is its affair."""
        if self.last_position is None:
            return None
        left = self.last_position - (self.slots.longest - self.prompt_slots)
        return left if left >= 0 else None

    def __call__(self, tree: DraftTree) -> Any:
        """The target's outputs for all nodes at once, each seeing the verified text and its own ancestors."""
        with phase(TARGET):
            tree = self._pad(tree)
            lengths = self.slots.tensor(tree.tokens.device)
            self.states.begin(NodePaths(tree.parents, tree.depths, tree.ancestors))
            with self._scope(tree, lengths):
                outputs = self._run(self._inputs(tree.tokens, tree.depths, lengths), tree.num_nodes)
            self._check_states()
            return outputs

    @property
    def looks_ahead(self) -> bool:
        """Whether [`look_ahead`] is of use."""
        return False

    def look_ahead(self, tree: DraftTree, path: torch.Tensor, counts: torch.Tensor) -> Any:
        """The outputs for the next tree while the host has yet to hear what is kept of the last one; [`commit`] says it then.

        Most likely the first `counts` (B,) nodes of `path` (B, P). It may be fewer, where a text ends: then the outputs are
        of no use.
        """
        raise NotImplementedError

    def draft(self, tokens: torch.Tensor, depths: torch.Tensor, ancestors: torch.Tensor) -> Any:
        """The outputs for `tokens` (B, Q), the last of N nodes whose others stand in the tentative slots, where these go, too.

        `depths` are (N,) and `ancestors` (B, Q, N). Nothing is proven here: what comes of it is a draft.
        """
        lengths = self.slots.tensor(tokens.device)
        depths = depths.expand(tokens.shape[0], -1)
        inputs = self._inputs(tokens, depths, lengths)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = 0
        with tree_scope(TreeScope(lengths, depths, ancestors)):
            outputs = self.target.model(**inputs, return_dict=True)
        self.slots.extend(tokens.shape[1])
        return outputs

    def take_back(self) -> None:
        """Empty the tentative slots. Where rows differ no number that a draft may have spoilt is left beside longer ones."""
        if self.slots.longest != self.slots.shortest:
            for layer in self.layers:
                layer.clear()
        self.slots.rollback()

    def features(self, outputs: Any) -> torch.Tensor | None:
        """Features (B, N, layers * H) of the nodes in the last forward, whose outputs these are; None where none are wanted."""
        return self.record.take()[1]

    def commit(self, path: torch.Tensor | None, counts: Sequence[int]) -> None:
        """Let the verified text go on by the first `counts` (B,) nodes of `path` (B, P), from the root down; or of a chain."""
        counts = Counts.of(counts)
        is_kept = self.slots.ahead is not None  # by the forward that has begun
        if path is not None and max(counts) > 1 and not is_kept:  # the root is where it belongs, and so is a chain
            self.keep(path)
        if self.states.layers and any(counts):
            self.states.keep(path, counts)
        self.slots.commit(counts)

    def keep(self, path: torch.Tensor) -> None:
        """Keep the nodes `path` (B, P) in the cache, and take the others back."""
        can_look = not crossings.reads_wait(path.device)
        if can_look and bool((path[:, -1] == path.shape[1] - 1).all()):  # they are in place
            return
        with phase(CACHE_WORK):
            for layer in self.layers:
                layer.keep(path)

    def _scope(self, tree: DraftTree, lengths: torch.Tensor) -> AbstractContextManager[None]:
        """Where a forward sees `tree` behind `lengths` (B,) verified slots.

        Roots alone behind texts of one length are a step of plain decoding: no mask of ours, the attention that the target has.
        """
        if tree.num_nodes == 1 and self.slots.longest == self.slots.shortest and not self.states.layers:
            return nullcontext()
        return tree_scope(TreeScope(lengths, tree.depths, tree.ancestors))

    def _inputs(self, tokens: torch.Tensor, depths: torch.Tensor, lengths: torch.Tensor) -> dict[str, Any]:
        """What the target's forward takes for `tokens` (B, Q), the last nodes of a tree behind `lengths` (B,) verified slots.

        `depths` (B, N) are those of all nodes.
        """
        kwargs, num_new = dict(self.kwargs), tokens.shape[1]
        if self.prompt_mask is not None:
            num_slots = self.slots.reach + depths.shape[1] - self.prompt_mask.shape[1]
            kwargs["attention_mask"] = torch.nn.functional.pad(self.prompt_mask, (0, num_slots), value=1)
        if self.root_positions is not None:
            ahead = (lengths - self.prompt_slots)[:, None] + depths[:, -num_new:]
            if (
                self.longest_text is not None
            ):  # what lies behind the last token that is ever read need not have a place
                ahead = ahead.clamp(max=self.longest_text - self.prompt_slots - 2)
            kwargs["position_ids"] = self.root_positions + ahead
        for name in TOKEN_TYPES:
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name].expand(-1, num_new)
        inputs = self.target.model.prepare_inputs_for_generation(
            tokens, next_sequence_length=num_new, is_first_iteration=False, **kwargs
        )
        if inputs.get("position_ids") is None:
            inputs["position_ids"] = self.target.own_positions(lengths[:, None] + depths[:, -num_new:])
        return inputs

    def _check_states(self) -> None:
        """Raise a RuntimeError where a layer with state was not seen to go down the tree."""
        if self.states.missing:
            raise RuntimeError(
                f"{self.states.missing} layers with state of `{type(self.target.model).__name__}` were not seen to go down "
                "the draft tree, so that its output would not be that of plain `generate()`. Generate without "
                "`assistant_model`."
            )

    def _pad(self, tree: DraftTree) -> DraftTree:
        """The tree that the forward runs over: `tree`, with nodes behind it that nobody looks at."""
        return tree

    def _run(self, inputs: dict[str, Any], num_nodes: int) -> Any:
        """The target's outputs for the prepared `inputs` of `num_nodes` nodes per row."""
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = num_nodes
        with self.proof.watching(num_nodes):
            return self.target.model(**inputs, return_dict=True)


class CompiledTargetForward(TargetForward):
    """Runs the target over padded trees, compiled, in buffers that stay where they are.

    Args:
        target (`Target`): The target.
        batch_size (`int`): Rows.
        record (`DecoderRecord`): Where the features of the prefill are recorded.
        settings (`DraftSettings`): The largest tree: its levels, and drafted nodes.
        compilation (`CompileSettings`): How to compile.
        layers (`tuple[int, ...]`): Whose features are wanted, as [`Needs`] names them.
    """

    compilation: CompileSettings

    def __init__(
        self,
        target: Target,
        batch_size: int,
        record: DecoderRecord,
        settings: DraftSettings,
        compilation: CompileSettings,
        layers: tuple[int, ...],
    ):
        super().__init__(target, batch_size, record, settings.tree_size)
        self.compilation = compilation
        # Of transformers' hidden states the first are the embeddings, and the last those after the final norm.
        self.hidden_states = [layer if layer == -1 else layer + 1 for layer in layers]
        self.slots = Slots([0] * batch_size, path_size=settings.tree_depth + 1)

    def arguments(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        # The prefill returns the features, too, and so installs transformers' hooks.
        wanted: Any = self.hidden_states[0] if len(self.hidden_states) == 1 else self.hidden_states
        return {**model_kwargs, "output_hidden_states": model_kwargs.get("output_hidden_states") or wanted or False}

    @contextmanager
    def using(self, cache: Cache, is_kept: bool) -> Iterator[None]:
        # The prefill's hooks are gone by now.
        model, room = self.target.model, self.tree_size + 1
        self.run = compiled_function(model, run_model, self.compilation)
        lease = take_lease(model, len(self.slots.lengths), self.slots.path_size, capacity_for(self.slots.end + room))
        self.slots.lease = lease
        with slot_layers(cache, self.slots, room, is_kept) as self.layers:
            yield
        give_back(model, lease)  # not after an error: what runs on an accelerator may be writing to it

    @property
    def is_dynamic(self) -> bool:
        """Whether one graph serves all numbers of nodes and slots: on a CPU, where that costs next to nothing."""
        return self.target.model.device.type == "cpu" and self.compilation.dynamic is not False

    def features(self, outputs: Any) -> torch.Tensor | None:
        parts = [outputs.hidden_states[index] for index in self.hidden_states]
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0] if parts else None

    @property
    def looks_ahead(self) -> bool:
        return crossings.reads_wait(self.target.model.device)  # else there is nothing to wait for

    def look_ahead(self, tree: DraftTree, path: torch.Tensor, counts: torch.Tensor) -> Any:
        with phase(CACHE_WORK):
            self.slots.go_ahead(path, counts)
        return self(tree)

    def keep(self, path: torch.Tensor) -> None:
        with phase(CACHE_WORK):
            self.slots.keep(path)

    def _pad(self, tree: DraftTree) -> DraftTree:
        num_nodes = padded_count(tree.num_nodes, self.tree_size, tree.tokens.device)
        for layer in self.layers:
            layer.reserve(num_nodes)
        return tree.padded(num_nodes)

    def _run(self, inputs: dict[str, Any], num_nodes: int) -> Any:
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = 0  # all: a number of nodes would be compiled in
        if self.is_dynamic:
            _let_nodes_vary(inputs)
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


def make_target_forward(
    target: Target, drafter: Drafter, compilation: CompileSettings | None, batch_size: int, record: DecoderRecord
) -> TargetForward:
    """The target's forward over trees of a drafter, compiled as `compilation` says, if anything."""
    settings = drafter.settings
    if compilation is None:
        return TargetForward(target, batch_size, record, settings.tree_size)
    return CompiledTargetForward(target, batch_size, record, settings, compilation, drafter.needs.layers)


def padded_count(num_nodes: int, tree_size: int, device: torch.device) -> int:
    """How many nodes a compiled forward runs over: one of a few numbers. Fewer nodes are cheaper on a CPU only."""
    if device.type != "cpu" and num_nodes <= tree_size + 1:
        return tree_size + 1
    # A root alone is padded, too: another graph is dearer than a few nodes.
    padded = -(-max(num_nodes - 1, 1) // BUCKET) * BUCKET + 1
    return min(padded, tree_size + 1) if num_nodes <= tree_size + 1 else padded


def _let_nodes_vary(inputs: dict[str, Any]) -> None:
    """Let code compiled for these inputs of a model serve any other number of nodes and of slots."""
    for name in PER_TOKEN:
        if inputs.get(name) is not None:
            torch._dynamo.maybe_mark_dynamic(inputs[name], inputs[name].ndim - 1)
    for mask in _masks(inputs.get("attention_mask")):
        torch._dynamo.maybe_mark_dynamic(mask, [2, 3])


def _masks(mask: Any) -> Iterable[torch.Tensor]:
    parts = mask.values() if isinstance(mask, dict) else [mask]
    return (part for part in parts if isinstance(part, torch.Tensor) and part.ndim == 4)
