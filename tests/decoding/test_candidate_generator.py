"""Chains in transformers' own assisted decoding: the same output as plain decoding, the same drafts as our loop."""

from __future__ import annotations

import pytest
import torch
from distributions import draw, exact_joint, p_value, tiny_llama, tiny_prompt
from double import TIGHT, tolerance
from families import FAMILIES, Family, Target, family
from oracle import make_oracle, make_plan
from peft import LoraConfig, get_peft_model
from transformers import LogitsProcessor, LogitsProcessorList

import dream_hf
from dream_hf import DreamDrafter
from dream_hf.decoding.assisted import DreamCandidateGenerator, dream_chain_generate
from dream_hf.drafters import lazy_session
from dream_hf.drafters.dream.state import DrafterState

NUM_NEW = 24
READ = DrafterState.read
some_families = pytest.mark.parametrize(
    "name", ["llava_clip_llama", "idefics3", "gemma3", "qwen2_5_vl", "aya_vision", "llama"]
)


def chain(target: Target, drafter: DreamDrafter, inputs, **kwargs):
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False} | kwargs
    return target.generate(**inputs, custom_generate=dream_chain_generate, drafter=drafter, **settings)


def plain(target: Target, inputs, **kwargs):
    return target.generate(**inputs, **{"max_new_tokens": NUM_NEW, "do_sample": False} | kwargs)


def make_drafter(target: Target, **config) -> DreamDrafter:
    """An untrained drafter with open gates, so that what it reads matters."""
    torch.manual_seed(0)
    drafter = DreamDrafter.for_target(target, **config)
    with torch.no_grad():
        for name, weight in drafter.named_parameters():
            if name.endswith("_gate"):
                weight.fill_(0.7)
    return drafter


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_greedy_output_is_that_of_plain_decoding(family: Family):
    target = family.make_target()
    inputs = family.make_inputs(target)
    expected = plain(target, inputs)
    oracle = make_oracle(target, make_plan(expected, inputs["attention_mask"], 6, decoys=False))
    forwards = []
    handle = target.register_forward_hook(lambda *_: forwards.append(1))
    assert torch.equal(chain(target, oracle, inputs), expected)
    assert len(forwards) < NUM_NEW / 2  # candidates of all lengths were kept
    handle.remove()
    assert torch.equal(chain(target, make_drafter(target), inputs), expected)


@some_families
def test_it_drafts_what_our_own_loop_drafts(name, monkeypatch):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target)
    drafter = make_drafter(target, tree_top_k=1, tree_depth=4, tree_size=4, visual_keep_ratio=0.5)

    def drafts(generate):
        seen = []

        def spy(levels, *args):
            tree = grow_tree(levels, *args)
            seen.append((levels.state.root_features, levels.state.root_positions, tree.tokens[:, :2]))
            return tree

        grow_tree = lazy_session.grow_tree
        with monkeypatch.context() as patch:
            patch.setattr(lazy_session, "grow_tree", spy)
            target.generate(**inputs, max_new_tokens=8, do_sample=False, drafter=drafter, custom_generate=generate)
        return seen

    ours, theirs = drafts(dream_hf.dream_generate), drafts(dream_chain_generate)
    assert len(theirs) >= 5
    for mine, other in zip(ours, theirs, strict=False):  # ours also drafts for the last token
        torch.testing.assert_close(mine[0], other[0], **TIGHT)
        assert torch.equal(mine[1], other[1]) and torch.equal(mine[2], other[2])


def test_left_padding_is_not_read():
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target)
    padded = dict(inputs)
    for key in ("input_ids", "attention_mask"):
        padded[key] = torch.nn.functional.pad(inputs[key], (3, 0), value=0)
    drafter = make_drafter(target)
    expected = chain(target, drafter, inputs)
    assert torch.equal(chain(target, drafter, padded)[:, 3:], expected)


def test_processors_stops_and_outputs_are_those_of_the_loop():
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target)
    settings = {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    expected = plain(target, inputs, **settings)
    oracle = make_oracle(target, make_plan(expected.sequences, inputs["attention_mask"], 6, decoys=False))
    out = chain(target, oracle, inputs, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    scores = torch.stack(expected.scores)
    torch.testing.assert_close(torch.stack(out.scores), scores, **tolerance(scores))
    stop = int(expected.sequences[0, -6])
    assert torch.equal(
        chain(target, oracle, inputs, eos_token_id=stop, repetition_penalty=1.3, no_repeat_ngram_size=2),
        plain(target, inputs, eos_token_id=stop, repetition_penalty=1.3, no_repeat_ngram_size=2),
    )


class Rereading(LogitsProcessor):
    """Runs the target, as guidance does."""

    def __init__(self, target: Target):
        self.target = target

    def __call__(self, input_ids, scores):
        self.target(input_ids)
        return scores


def test_forwards_that_are_not_the_loops_are_not_read(monkeypatch):
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target)
    counts = []
    monkeypatch.setattr(DrafterState, "read", lambda self, *args: counts.append(args[1].shape[1]) or READ(self, *args))
    processors = LogitsProcessorList([Rereading(target)])
    assert torch.equal(chain(target, make_drafter(target), inputs, logits_processor=processors), plain(target, inputs))
    assert counts[0] == inputs["input_ids"].shape[1] and sum(counts[1:]) < NUM_NEW


def test_samples_have_the_targets_distribution():
    target = tiny_llama()
    inputs = tiny_prompt(target)
    torch.manual_seed(0)
    drafter = DreamDrafter.for_target(target, tree_depth=2)
    settings = {"temperature": 0.7, "top_k": 4, "repetition_penalty": 1.3}
    joint = exact_joint(target, inputs, 3, **settings)
    draws = draw(
        target, inputs, 300, 3, batch_size=1, custom_generate=dream_chain_generate, drafter=drafter, **settings
    )
    assert p_value(draws[:, 1:], joint.sum(0)) >= 1e-3


def test_a_subclass_may_hand_the_generator_out_itself():
    target = family("qwen2_vl").make_target()
    inputs = family("qwen2_vl").make_inputs(target)
    expected = plain(target, inputs)
    oracle = make_oracle(target, make_plan(expected, inputs["attention_mask"], 6, decoys=False))

    class Drafted(type(target)):
        def _get_candidate_generator(self, **kwargs):
            return generator

    target.__class__ = Drafted
    with DreamCandidateGenerator(target, oracle) as generator:
        for _ in range(2):  # one generator, call after call
            out = target.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False, prompt_lookup_num_tokens=1)
            assert torch.equal(out, expected)
    with pytest.raises(RuntimeError, match="`with` block"):
        target.generate(**inputs, max_new_tokens=4, prompt_lookup_num_tokens=1)


def test_nothing_is_left_on_the_target():
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target)
    plain(target, inputs)  # transformers' own hooks, which stay
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in target.modules()]
    attributes = set(vars(target))
    chain(target, make_drafter(target), inputs)
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in target.modules()]
    assert set(vars(target)) == attributes and "_get_candidate_generator" not in vars(type(target))


def test_batches_are_sent_to_our_own_loop():
    target = family("llama").make_target()
    drafter = make_drafter(target)
    with pytest.raises(ValueError, match=r"batch_size = 1"):
        chain(target, drafter, family("llama").make_inputs(target, 2))
    with DreamCandidateGenerator(target, drafter) as generator, pytest.raises(ValueError, match=r"takes batches"):
        generator.get_candidates(torch.ones(2, 3, dtype=torch.long), {}, None, True, 0)


@pytest.mark.parametrize("is_direct", [False, True])
def test_a_drafter_with_adapters_drafts(is_direct):
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target)
    adapted = get_peft_model(make_drafter(target), LoraConfig(r=2, target_modules="all-linear"))
    if is_direct:
        with DreamCandidateGenerator(target, adapted) as generator:
            assert generator.drafter is adapted.get_base_model()
    assert torch.equal(chain(target, adapted, inputs), plain(target, inputs))


def test_refusals_are_those_of_generate():
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target)
    with pytest.raises(TypeError, match="DreamDrafter"):
        chain(target, None, inputs)
    with pytest.raises(ValueError, match="ClassifierFreeGuidance"):
        chain(target, make_drafter(target), inputs, guidance_scale=1.5)
    with pytest.raises(ValueError, match="num_beams"):
        chain(target, make_drafter(target), inputs, num_beams=2)
