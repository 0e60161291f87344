"""Plain and speculative decoding of the same inputs, and what must be equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from families import Inputs, Target
from family_configs import TEXT_IDS
from fuzz import FuzzDrafter
from oracle import NoisyOracle, Plan, make_oracle, make_plan
from torch import Tensor, nn

from dream_hf import DreamDrafter
from dream_hf.decoding.settings import DraftSettings
from dream_hf.drafters.retrieval.drafter import RetrievalDrafter
from dream_hf.drafters.retrieval.lookup import PromptLookupDrafter

NUM_NEW = 64
DEPTH = 6  # of the default tree
CHAIN = {"tree_top_k": 1}
SMALL_TREE = {"tree_depth": 2, "tree_top_k": 3, "tree_size": 8}

Settings = Callable[[], dict[str, Any]]  # makes the arguments of generate() anew for every call: some hold state


def generate(target: Target, inputs: Inputs, **settings: Any) -> Any:
    """Greedy `generate()` that returns everything with its tokens."""
    defaults = {"max_new_tokens": NUM_NEW, "do_sample": False, "return_dict_in_generate": True}
    return target.generate(**inputs, **{**defaults, **settings})


def seeded_runs(target: Target, inputs: Inputs, drafters: Sequence[Any]) -> list[Any]:
    """What is sampled with each of the drafters, from one seed."""
    runs = []
    for drafter in drafters:
        torch.manual_seed(5)
        runs.append(generate(target, inputs, do_sample=True, assistant_model=drafter, max_new_tokens=NUM_NEW))
    return runs


def open_gates(drafter: DreamDrafter, value: float = 0.7) -> DreamDrafter:
    """An untrained drafter's cross-attention is shut; open it, so that what it reads matters."""
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(value)
    return drafter


def untrained(target: Target, seed: int = 0, **config: Any) -> DreamDrafter:
    """A drafter with random weights of some spread and open gates."""
    drafter = open_gates(DreamDrafter.for_target(target, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in drafter.modules():
            if isinstance(module, nn.Linear):
                noise = torch.randn(module.weight.shape, generator=generator)
                module.weight.copy_(noise / module.in_features**0.5)
    return drafter


def oracle(target: Target, inputs: Inputs, sequences: Tensor, **config: Any) -> tuple[NoisyOracle, Plan]:
    """A noisy oracle that knows `sequences` (B, P + N), the continuation of `inputs`."""
    is_chain = config.get("tree_top_k") == 1
    plan = make_plan(sequences, inputs["attention_mask"], config.get("tree_depth", DEPTH), decoys=not is_chain)
    return make_oracle(target, plan, **config), plan


def stop_tokens(sequences: Tensor, num_new: int = NUM_NEW, at: Sequence[int] = (9, 22, 37)) -> list[int]:
    """For each row a token that it writes first at a different time, as far as there is one: early, later, late."""
    new = sequences[:, -num_new:].tolist()
    chosen = []
    for row, start in zip(new, at, strict=False):
        taken = {token for other in new if other is not row for token in other[:start]} | set(row[:start])
        chosen.append(next((token for token in row[start:] if token not in taken), row[start]))
    return chosen


def gains(out: Any) -> list[list[int]]:
    """Tokens gained by each verification, row by row."""
    return [[gain for gain in row if gain >= 0] for row in out.accepted_lengths.tolist()]


def assert_same_tokens(expected: Any, actual: Any) -> None:
    """Token-identical sequences; a difference says how near to a tie the first one was."""
    if torch.equal(expected.sequences, actual.sequences):
        return
    assert expected.sequences.shape == actual.sequences.shape, (expected.sequences, actual.sequences)
    differs = (expected.sequences != actual.sequences).int()
    row = int(differs.any(1).int().argmax())
    column = int(differs[row].argmax())
    pair = [int(out.sequences[row, column]) for out in (expected, actual)]
    message = f"row {row}, token {column}: {pair[0]} became {pair[1]}"
    if expected.logits is not None:
        step = column - expected.sequences.shape[1] + len(expected.logits)
        logits = expected.logits[step][row]
        message += f"; their logits are {logits[pair[0]]:.5f} and {logits[pair[1]]:.5f}"
    raise AssertionError(message)


def assert_lossless(
    target: Target,
    inputs: Inputs,
    settings: Settings = dict,
    foresight: Settings | None = None,
    drafts: Sequence[str] = ("tree", "chain", "fuzz", "retrieval"),
    **config: Any,
) -> Any:
    """Plain and speculative decoding agree under `settings`; returns plain's output.

    The oracles know what plain decoding writes under `foresight`: what it would have written but for a stop, say, so
    that stops fall into the middle of accepted paths.
    """
    expected = generate(target, inputs, output_logits=True, **settings())
    known = expected if foresight is None else generate(target, inputs, **foresight())
    for name in drafts:
        drafter = make_drafter(name, target, inputs, known.sequences, config)
        out = generate(target, inputs, assistant_model=drafter, **settings())
        try:
            assert_same_tokens(expected, out)
        except AssertionError as error:
            raise AssertionError(f"drafts: {name}; {error}") from None
        assert_counts_add_up(out, target.generation_config.pad_token_id)
    return expected


def make_drafter(name: str, target: Target, inputs: Inputs, known: Tensor, config: dict[str, Any]) -> Any:
    """What drafts: an untrained drafter, an oracle that knows (B, P + N) tokens, lookup, retrieval, or random trees."""
    if name in ("fuzz", "lookup", "retrieval"):
        sizes = {key: value for key, value in config.items() if key in DraftSettings.names()}
        if name == "lookup":
            return PromptLookupDrafter(settings=DraftSettings(tree_depth=4).changed(**sizes))
        if name == "retrieval":  # what was written is known, so that paths get accepted
            settings = DraftSettings(tree_size=16, tree_min_node_probability=0.01).changed(**sizes)
            return RetrievalDrafter(draft_text=known[:, -NUM_NEW:], settings=settings)
        settings = DraftSettings(tree_depth=7, tree_size=13).changed(**sizes)
        return FuzzDrafter(range(*TEXT_IDS), known, favourites=range(3, 12), settings=settings)
    shape = {"untrained": SMALL_TREE, "tree": {}, "chain": CHAIN}[name] | config
    if name == "untrained":
        return untrained(target, **shape)
    return oracle(target, inputs, known, **shape)[0]


def assert_counts_add_up(out: Any, pad_token_id: int | None = None) -> None:
    """A row's gains sum to its new tokens but the first; none exceeds what was drafted, plus the bonus token."""
    accepted, drafted = out.accepted_lengths, out.drafted_lengths
    assert accepted.shape == drafted.shape and accepted.shape[0] == out.sequences.shape[0]
    assert torch.equal(accepted < 0, drafted < 0)
    assert (accepted <= drafted + 1)[accepted >= 0].all()
    is_past = (accepted < 0).int()
    assert torch.equal(is_past, is_past.cummax(1).values) if accepted.shape[1] else True  # only ends are padded
