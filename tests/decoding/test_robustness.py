"""Nothing half-done is left behind, whatever goes wrong; and calls at the same time do not disturb each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from double import TIGHT
from families import Inputs, Target, family
from lossless import untrained
from oracle import make_oracle, make_plan
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from dream_hf import CombinedDrafter, DreamDrafter, LayerSkipDrafter, ModelDrafter, RetrievalDrafter
from dream_hf.targets import attention_statistics as attention
from dream_hf.targets import target as targets
from dream_hf.targets import tree_masks

NUM_NEW = 24
NAMES = ["llava_clip_llama", "gemma3", "qwen2_5_vl"]  # plain, sliding windows, three axes of positions


def plain(target: Target, inputs: Inputs, **kwargs: Any):
    return target.generate(**inputs, **{"max_new_tokens": NUM_NEW, "do_sample": False} | kwargs)


def drafted(target: Target, drafter: DreamDrafter, inputs: Inputs, **kwargs: Any):
    return plain(target, inputs, assistant_model=drafter, **kwargs)


def oracle_for(target: Target, inputs: Inputs) -> DreamDrafter:
    return make_oracle(target, make_plan(plain(target, inputs), inputs["attention_mask"], 6))


def traces(target: Target) -> dict[str, Any]:
    """Everything a call could leave behind, by value."""
    return {
        "generation config": target.generation_config.to_dict(),
        "config": target.config.to_dict(),
        "attention": [
            module.config._attn_implementation for module in target.modules() if isinstance(module, PreTrainedModel)
        ],
        "hooks": [
            [*module._forward_hooks.values(), *module._forward_pre_hooks.values()] for module in target.modules()
        ],
        "attributes": [sorted(vars(module)) for module in target.modules()],
        "training": target.training,
        "masks": dict(AttentionMaskInterface._global_mapping),
        "attention functions": dict(AttentionInterface._global_mapping),
        "look-ups": [vars(owner).get("__getitem__") for owner in (AttentionMaskInterface, AttentionInterface)],
        "tree": tree_masks._tree.get(),
        "observed": attention._observed.get(),
        "recorded": targets._record.get(),
        "gradients": torch.is_grad_enabled(),
    }


class Broken(Exception):
    pass


def breaker(error: BaseException, at_call: int) -> Callable[..., None]:
    """A callable that raises at its n-th call."""
    calls = []

    def act(*_: Any, **__: Any) -> None:
        calls.append(1)
        if len(calls) == at_call:
            raise error

    return act


class BreakingStreamer(BaseStreamer):
    def __init__(self, act):
        self.act = act

    def put(self, value):
        self.act()

    def end(self):
        pass


class BreakingProcessor(LogitsProcessor):
    def __init__(self, act):
        self.act = act

    def __call__(self, input_ids, scores):
        self.act()
        return scores


class BreakingCriterion(StoppingCriteria):
    def __init__(self, act):
        self.act = act

    def __call__(self, input_ids, scores, **kwargs):
        self.act()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def break_in(
    place: str, target: Target, drafter: DreamDrafter, act: Callable[..., None]
) -> tuple[dict[str, Any], list]:
    """Arguments of generate() and hooks that make `act` be called in mid-decoding."""
    match place:
        case "streamer":
            return {"streamer": BreakingStreamer(act)}, []
        case "processor":
            return {"logits_processor": LogitsProcessorList([BreakingProcessor(act)])}, []
        case "criterion":
            return {"stopping_criteria": [BreakingCriterion(act)]}, []
        case "decoder layer":
            return {}, [target.get_decoder().layers[1].register_forward_hook(act)]
        case "drafter":
            return {}, [drafter.register_forward_pre_hook(act)]
    raise KeyError(place)


PLACES = ["streamer", "processor", "criterion", "decoder layer", "drafter"]


@pytest.mark.parametrize("at_call", [1, 7])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", [Broken("in mid-decoding"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
def test_nothing_is_left_behind(place, error, at_call):
    target = family("gemma3").make_target()
    inputs = family("gemma3").make_inputs(target)
    expected = plain(target, inputs)
    drafter = DreamDrafter.for_target(target)
    before = traces(target)
    arguments, handles = break_in(place, target, drafter, breaker(error, at_call))
    with pytest.raises(type(error)):
        drafted(target, drafter, inputs, **arguments)
    for handle in handles:
        handle.remove()
    after = traces(target)
    assert after == before, [name for name in before if before[name] != after[name]]
    assert torch.equal(plain(target, inputs), expected)
    assert torch.equal(drafted(target, drafter, inputs), expected)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_behind_by_success(name):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, 2)
    expected = plain(target, inputs)
    drafter = DreamDrafter.for_target(target)
    before, drafter_before = traces(target), drafter.config.to_dict()
    weights = [weight._version for weight in (*target.parameters(), *drafter.parameters())]
    assert torch.equal(drafted(target, drafter, inputs), expected)
    assert traces(target) == before and drafter.config.to_dict() == drafter_before
    assert weights == [weight._version for weight in (*target.parameters(), *drafter.parameters())]


AT_CALL = {"drafter": 5, "decoder layer": 4}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NAMES)
def test_a_cache_passed_in_holds_a_verified_text(name, place):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target)
    expected = plain(target, inputs)
    drafter = oracle_for(target, inputs)
    cache = DynamicCache(config=target.config.get_text_config())
    kinds = [type(layer) for layer in cache.layers]
    arguments, handles = break_in(place, target, drafter, breaker(Broken(), AT_CALL.get(place, 9)))
    with pytest.raises(Broken):
        drafted(target, drafter, inputs, past_key_values=cache, **arguments)
    for handle in handles:
        handle.remove()
    assert [type(layer) for layer in cache.layers] == kinds
    length, prompt_length = cache.get_seq_length(), inputs["input_ids"].shape[1]
    assert prompt_length <= length < expected.shape[1]
    if place in ("streamer", "criterion", "processor"):
        assert length > prompt_length

    reference = plain(
        target, inputs, max_new_tokens=length - prompt_length + 1, return_dict_in_generate=True, use_cache=True
    ).past_key_values
    assert reference.get_seq_length() == length
    for layer, other in zip(cache.layers, reference.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, **TIGHT)
        torch.testing.assert_close(layer.values, other.values, **TIGHT)
        assert layer.get_seq_length() == other.get_seq_length()


class Observer(BaseStreamer):
    """Lets another thread go when a call is in the middle, and waits for it to be there too."""

    def __init__(self, barrier: threading.Barrier, at_put: int = 5):
        self.barrier, self.at_put, self.num_puts = barrier, at_put, 0

    def put(self, value):
        self.num_puts += 1
        if self.num_puts == self.at_put:
            self.barrier.wait(timeout=60)

    def end(self):
        pass


def at_once(*calls: Callable[[BaseStreamer], Any]) -> list[Any]:
    """Run calls in threads of their own; each is in mid-decoding when the others are."""
    barrier = threading.Barrier(len(calls))
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call, Observer(barrier)) for call in calls]
        return [future.result(timeout=120) for future in futures]


def test_two_drafters_on_one_target_at_once():
    target = family("gemma3").make_target()
    first, second = (family("gemma3").make_inputs(target, seed=seed, text_len=8 + 4 * seed) for seed in (0, 1))
    expected = [plain(target, first), plain(target, second)]
    drafters = [oracle_for(target, first), oracle_for(target, second)]
    assert len({id(drafter) for drafter in drafters}) == 2
    before = traces(target)
    results = at_once(
        lambda streamer: drafted(target, drafters[0], first, streamer=streamer),
        lambda streamer: drafted(target, drafters[1], second, streamer=streamer),
    )
    assert torch.equal(results[0], expected[0]) and torch.equal(results[1], expected[1])
    assert traces(target) == before


def test_two_targets_and_plain_decoding_at_once():
    names = ["llava_clip_llama", "qwen2_5_vl"]
    made = [family(name).make_target() for name in names]
    inputs = [family(name).make_inputs(target) for name, target in zip(names, made, strict=True)]
    expected = [plain(target, given) for target, given in zip(made, inputs, strict=True)]
    drafters = [oracle_for(target, given) for target, given in zip(made, inputs, strict=True)]
    before = [traces(target) for target in made]
    results = at_once(
        lambda streamer: drafted(made[0], drafters[0], inputs[0], streamer=streamer),
        lambda streamer: drafted(made[1], drafters[1], inputs[1], streamer=streamer),
        lambda streamer: plain(made[0], inputs[0], streamer=streamer),
        lambda streamer: plain(made[1], inputs[1], streamer=streamer),
    )
    for index, result in enumerate(results):
        assert torch.equal(result, expected[index % 2])
    assert [traces(target) for target in made] == before


def test_one_drafter_in_two_threads():
    target = family("llama").make_target()
    first, second = (family("llama").make_inputs(target, seed=seed) for seed in (0, 1))
    expected = [plain(target, first), plain(target, second)]
    drafter = DreamDrafter.for_target(target)
    results = at_once(
        lambda streamer: drafted(target, drafter, first, streamer=streamer),
        lambda streamer: drafted(target, drafter, second, streamer=streamer),
    )
    assert torch.equal(results[0], expected[0]) and torch.equal(results[1], expected[1])


def test_one_call_fails_while_another_runs():
    target = family("gemma3").make_target()
    inputs = family("gemma3").make_inputs(target)
    expected, drafter = plain(target, inputs), oracle_for(target, inputs)
    failing = DreamDrafter.for_target(target)
    failing.register_forward_pre_hook(breaker(Broken(), 60))  # well after the threads have met
    before = traces(target)

    def fail(streamer):
        with pytest.raises(Broken):
            drafted(target, failing, inputs, streamer=streamer, max_new_tokens=80)

    results = at_once(fail, lambda streamer: drafted(target, drafter, inputs, streamer=streamer))
    assert torch.equal(results[1], expected)
    assert traces(target) == before


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_processor_that_runs_the_target_itself(batch_size):
    """Classifier-free guidance does: its forwards are not the loop's."""
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target, batch_size)
    guided = {"guidance_scale": 1.5}
    expected = plain(target, inputs, **guided)
    assert not torch.equal(plain(target, inputs), expected)
    assert torch.equal(drafted(target, DreamDrafter.for_target(target), inputs, **guided), expected)
    oracle = make_oracle(target, make_plan(expected, inputs["attention_mask"], 6, decoys=False))
    out = drafted(target, oracle, inputs, **guided, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    assert out.accepted_lengths.max() > 3


def test_a_drafter_that_says_nonsense_costs_speed_only():
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target, 2)

    class Nonsense(DreamDrafter):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.last_hidden_state = torch.full_like(out.last_hidden_state, float("nan"))
            return out

    assert torch.equal(drafted(target, Nonsense.for_target(target), inputs), plain(target, inputs))


def test_tensors_are_made_where_they_belong():
    """Whoever calls may have another default device: here one that holds nothing, so that no number could be read back."""
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target, 3)
    expected = plain(target, inputs)
    pausing, retrieval = untrained(target, pause_below=3.0), RetrievalDrafter(draft_text=expected[:, -NUM_NEW:])
    drafters = [oracle_for(target, inputs), pausing, retrieval, CombinedDrafter([pausing, retrieval])]
    drafters += [ModelDrafter(target), LayerSkipDrafter(target, skip=["1.mlp"])]
    for drafter in drafters:
        with torch.device("meta"):
            out = drafted(target, drafter, inputs)
        assert torch.equal(out, expected)
