"""In bfloat16, a token that differs from plain decoding was a tie: the two candidates' logits are a few roundings apart."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from families import Family, Inputs, Target, family
from oracle import make_oracle, make_plan
from torch import Tensor

from dream_hf import DreamDrafter, tree_masks

NUM_NEW = 60
MAX_ROUNDINGS = 6  # units in the last place of a bfloat16 number as large as the logit; plain decoding has 5 below
NAMES = [
    "llava_clip_llama", "llava_pixtral_mistral", "llava_onevision", "gemma3", "gemma4_shared", "qwen2_5_vl", "glm4v",
    "aya_vision", "llama4", "llama",
]  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """Where two runs part: the step, and how far apart each run saw its token and the other's, in roundings."""

    step: int
    gaps: tuple[float, float]


def decode(target: Target, inputs: Inputs, drafter: DreamDrafter | None = None):
    settings = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False, "max_new_tokens": NUM_NEW}
    return target.generate(**inputs, **settings, assistant_model=drafter)


def differences(first, second, num_rows: int) -> list[Difference]:
    """The first difference of every row that has one; what follows it is another text."""
    found = []
    for row in range(num_rows):
        tokens = [out.sequences[row, -NUM_NEW:] for out in (first, second)]
        if torch.equal(*tokens):
            continue
        step = int((tokens[0] != tokens[1]).nonzero()[0])
        logits = [first.logits[step][row], second.logits[step][row]]
        choices = [tokens[0][step], tokens[1][step]]
        gaps = [
            float((scores[ours] - scores[theirs]) / spacing(scores[ours]))
            for scores, ours, theirs in zip(logits, choices, reversed(choices), strict=True)
        ]
        found.append(Difference(step, (gaps[0], gaps[1])))
    return found


def spacing(value: Tensor) -> Tensor:
    """Distance from a number to the next one in bfloat16, which keeps eight significant bits."""
    return torch.exp2(value.abs().log2().floor() - 7)


def is_tie(difference: Difference) -> bool:
    return max(difference.gaps) <= MAX_ROUNDINGS


def setup(of: Family, batch_size: int) -> tuple[Target, Inputs]:
    target = of.make_target(dtype=torch.bfloat16)
    return target, of.make_inputs(target, batch_size, seed=1)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_differ_at_ties_only(name):
    target, inputs = setup(family(name), 3)
    plain = decode(target, inputs)
    oracle = make_oracle(target, make_plan(plain.sequences, inputs["attention_mask"], 6))
    out = decode(target, inputs, oracle)
    assert out.accepted_lengths.max() > 4
    found = differences(plain, out, 3)
    assert all(map(is_tie, found)), found


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_plain_decoding_itself_differs_so_between_batch_sizes(name):
    of = family(name)
    target = of.make_target(dtype=torch.bfloat16)
    rows = of.make_rows(target, 3, seed=1)
    together = decode(target, of.collate(rows))
    for index, row in enumerate(rows):
        alone = decode(target, row)
        in_batch = SimpleNamespace(
            sequences=together.sequences[index : index + 1],
            logits=[step[index : index + 1] for step in together.logits],
        )
        found = differences(alone, in_batch, 1)
        assert all(map(is_tie, found)), found


def test_ties_are_rare():
    """Otherwise the test above would excuse anything."""
    target, inputs = setup(family("gemma3"), 3)
    logits = torch.stack(decode(target, inputs).logits).flatten(0, 1)
    best = logits.topk(2, dim=-1).values
    roundings = (best[:, 0] - best[:, 1]) / spacing(best[:, 0])
    assert (roundings <= MAX_ROUNDINGS).float().mean() < 0.2 and roundings.median() > 10


def test_a_wrong_mask_is_no_tie(monkeypatch):
    target, inputs = setup(family("gemma3"), 3)
    plain = decode(target, inputs)
    monkeypatch.setattr(tree_masks, "tree_mask_function", lambda scope, mask_function, q_offset: mask_function)
    oracle = make_oracle(target, make_plan(plain.sequences, inputs["attention_mask"], 6))
    found = differences(plain, decode(target, inputs, oracle), 3)
    assert found and not all(map(is_tie, found))


def test_the_drafter_may_have_another_dtype():
    target, inputs = setup(family("llama"), 3)
    plain = decode(target, inputs)
    drafter = DreamDrafter.for_target(target).float()
    assert all(map(is_tie, differences(plain, decode(target, inputs, drafter), 3)))
    reference = family("llama").make_target()
    inputs = family("llama").make_inputs(reference, 3)
    out = decode(reference, inputs, DreamDrafter.for_target(reference).to(torch.bfloat16))
    assert torch.equal(out.sequences, decode(reference, inputs).sequences)
