"""Trees at random, and their nodes' logits in one forward and one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from families import Inputs, Target
from family_configs import TEXT_IDS
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from dream_hf import DreamDrafter
from dream_hf.decoding import loop as loop_module
from dream_hf.decoding.target_forward import TargetForward
from dream_hf.decoding.tree import DraftTree
from dream_hf.targets import target as targets


def random_tree(
    batch: int, num_nodes: int, generator: torch.Generator, roots: Tensor | None = None, num_tokens: int | None = None
) -> DraftTree:
    """A tree for each row, parents first: tokens that all differ, or out of `num_tokens`, siblings differing."""
    rows_of_parents, rows_of_tokens = [], []
    for row in range(batch):
        parents = [0] + [int(torch.randint(node, (1,), generator=generator)) for node in range(1, num_nodes)]
        tokens = torch.randperm(TEXT_IDS[1] - TEXT_IDS[0], generator=generator)[:num_nodes] + TEXT_IDS[0]
        if num_tokens is not None:
            tokens = small_vocabulary(parents, num_tokens, generator)
        if roots is not None:
            tokens[0] = roots[row]
        rows_of_parents.append(parents)
        rows_of_tokens.append(tokens)
    return DraftTree.from_parents(torch.stack(rows_of_tokens), torch.tensor(rows_of_parents), max(num_nodes - 1, 1))


def small_vocabulary(parents: list[int], num_tokens: int, generator: torch.Generator) -> Tensor:
    """Tokens below `num_tokens` for nodes that have no more children than that; moves children that are too many."""
    tokens = [0]
    taken: dict[int, set[int]] = {}
    for node in range(1, len(parents)):
        while len(taken.setdefault(parents[node], set())) == num_tokens:
            parents[node] = int(torch.randint(node, (1,), generator=generator))
        free = sorted(set(range(num_tokens)) - taken[parents[node]])
        tokens.append(free[int(torch.randint(len(free), (1,), generator=generator))])
        taken[parents[node]].add(tokens[-1])
    return torch.tensor(tokens)


class Forced(LogitsProcessor):
    """Makes generate() write given rows."""

    def __init__(self, sequences: Tensor):
        self.sequences = sequences

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.sequences[:, input_ids.shape[1]][:, None], 0.0)


def force(target: Target, inputs: Inputs, sequences: Tensor, **settings: Any) -> Any:
    """Plain `generate()` made to write `sequences` (B, P + N)."""
    return target.generate(
        **inputs,
        max_new_tokens=sequences.shape[1] - inputs["input_ids"].shape[1],
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        logits_processor=LogitsProcessorList([Forced(sequences)]),
        **settings,
    )


def drive(target: Target, inputs: Inputs, drafter: DreamDrafter, act: Callable[[Any], Any], **settings: Any) -> Any:
    """Call `act` with a decoding loop that has read its prompt and may verify trees; returns what it returns."""
    results = []

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        view = targets.Target(model)
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        with view.recording() as record, torch.no_grad():
            forward = TargetForward(view, input_ids.shape[0], record, drafter.config.tree_size)
            decoding = loop_module._Decoding(view, drafter, forward, *arguments)
            decoding.prefill()
            with view.taking_trees(), decoding.verifying():
                results.append(act(decoding))
        return input_ids

    settings = {"max_new_tokens": 200, "do_sample": False} | settings
    target.generate(**inputs, custom_generate=loop, **settings)
    return results[0]


def texts_of(decoding: Any) -> list[Tensor]:
    """Each row's tokens so far, the prompt's padding included."""
    return [decoding.sequences.ids[row, :length] for row, length in enumerate(decoding.sequences.lengths)]


def verify_tree(decoding: Any, tree: DraftTree) -> Tensor:  # (B, N, V)
    """Logits of all nodes in one forward of the decoding loop, in the target's dtype."""
    return decoding.forward(tree).logits[:, -tree.num_nodes :]


def sequential_logits(
    target: Target, inputs: Inputs, texts: list[Tensor], tree: DraftTree, node: int
) -> Tensor:  # (B, V)
    """Logits after `node` when each row's text and the node's path are fed token by token."""
    paths = []
    for row, text in enumerate(texts):
        nodes = tree.ancestors[row, node].nonzero().flatten()[1:]  # parents come first
        paths.append(torch.cat([text, tree.tokens[row, nodes]]))
    sequences = nn.utils.rnn.pad_sequence(paths, batch_first=True, padding_value=TEXT_IDS[0])
    sequences = nn.functional.pad(sequences, (0, 1), value=TEXT_IDS[0])
    logits = []  # of each step, in the target's dtype: `generate()` returns them in float32
    with target.register_forward_hook(lambda module, arguments, out: logits.append(out.logits[:, -1])):
        force(target, inputs, sequences)
    start = inputs["input_ids"].shape[1]
    return torch.stack([logits[len(path) - start][row] for row, path in enumerate(paths)])
