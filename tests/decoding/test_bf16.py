"""In float32 and bfloat16, a token that differs from plain decoding's was a tie: rounding alone decided it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families import Family, Inputs, Target, family
from oracle import make_oracle, make_plan
from ties import GAP, assert_only_ties, differences, error, exact_logits

from dream_hf import DreamDrafter
from dream_hf.targets import tree_masks

NUM_NEW = 60
NAMES = [
    "llava_clip_llama", "llava_pixtral_mistral", "llava_onevision", "gemma3", "gemma4_shared", "qwen2_5_vl", "glm4v",
    "aya_vision", "llama4", "llama",
]  # fmt: skip

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def decode(target: Target, inputs: Inputs, drafter: DreamDrafter | None = None):
    settings = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False, "max_new_tokens": NUM_NEW}
    return target.generate(**inputs, **settings, assistant_model=drafter)


def setup(of: Family, batch_size: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Target, Inputs]:
    target = of.make_target(dtype=dtype)
    return target, of.make_inputs(target, batch_size, seed=1)


@each_dtype
@pytest.mark.parametrize("name", NAMES)
def test_tokens_differ_at_ties_only(name, dtype):
    target, inputs = setup(family(name), 3, dtype)
    plain = decode(target, inputs)
    oracle = make_oracle(target, make_plan(plain.sequences, inputs["attention_mask"], 6))
    out = decode(target, inputs, oracle)
    assert out.accepted_lengths.max() > 4
    assert_only_ties(target, inputs, plain, out)


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_plain_decoding_itself_differs_so_between_batch_sizes(name):
    of = family(name)
    target = of.make_target(dtype=torch.bfloat16)
    rows = of.make_rows(target, 3, seed=1)
    together = decode(target, of.collate(rows))
    for index, row in enumerate(rows):
        in_batch = SimpleNamespace(
            sequences=together.sequences[index : index + 1, -NUM_NEW - row["input_ids"].shape[1] :],
            logits=[step[index : index + 1] for step in together.logits],
        )
        assert_only_ties(target, row, decode(target, row), in_batch)


@each_dtype
def test_ties_are_rare(dtype):
    """Otherwise the rule would excuse anything."""
    target, inputs = setup(family("gemma3"), 3, dtype)
    plain = decode(target, inputs)
    reference = exact_logits(target, inputs, plain.sequences)
    best = torch.stack(plain.logits).topk(2, dim=-1).values
    is_open = best[..., 0] - best[..., 1] <= GAP * error(torch.stack(plain.logits), reference).amax(0)
    # In bfloat16 the share is the CPU's own: 0.2 with AVX-512, 0.3 without vector instructions.
    assert is_open.float().mean() < (0.5 if dtype == torch.bfloat16 else 0.01)


@each_dtype
def test_a_wrong_mask_is_no_tie(monkeypatch, dtype):
    target, inputs = setup(family("gemma3"), 3, dtype)
    plain = decode(target, inputs)
    monkeypatch.setattr(tree_masks, "tree_mask_function", lambda scope, mask_function, q_offset: mask_function)
    oracle = make_oracle(target, make_plan(plain.sequences, inputs["attention_mask"], 6))
    found = differences(target, inputs, plain, decode(target, inputs, oracle))
    assert found and not all(each.is_tie for each in found)


def test_the_drafter_may_have_another_dtype():
    target, inputs = setup(family("llama"), 3)
    plain = decode(target, inputs)
    assert_only_ties(target, inputs, plain, decode(target, inputs, DreamDrafter.for_target(target).float()))
    reference = family("llama").make_target()
    inputs = family("llama").make_inputs(reference, 3)
    for dtype in (torch.bfloat16, torch.float32):
        out = decode(reference, inputs, DreamDrafter.for_target(reference).to(dtype))
        assert torch.equal(out.sequences, decode(reference, inputs).sequences)
