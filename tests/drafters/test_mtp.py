"""MTP heads out of targets' own checkpoints compute what plain tensor operations do, and the output stays the target's."""

from __future__ import annotations

import functools

import hybrid_configs
import mtp_reference as reference
import pytest
import torch
import transformers as hf
from distributions import NUM_TOKENS, _flat_target, extended, repeated
from double import TIGHT
from families import family
from family_configs import TEXT_IDS, VOCAB_SIZE
from lossless import assert_counts_add_up, assert_same_tokens, gains, generate, seeded_runs, stop_tokens
from test_eagle import Watch
from test_sampling import LIMIT, p_values

import dream_hf
from dream_hf import MTPDrafter
from dream_hf.compat import CACHE, cache_of
from dream_hf.drafters.mtp.loading import load_mtp
from dream_hf.drafters.paired_state import PairedState
from dream_hf.targets.target import Target

FAMILIES = ["qwen3_next", "qwen3_5", "qwen3_5_moe"]
every_family = pytest.mark.parametrize("name", FAMILIES)
SMALL = {"tree_depth": 4, "tree_top_k": 3, "tree_size": 9}
WIDE = {"tree_depth": 3, "tree_top_k": 10, "tree_size": 40}


@functools.cache
def target_of(name):
    return family(name).make_target()


@pytest.fixture(scope="module")
def publish(tmp_path_factory):
    """Family -> its target, a folder with its checkpoint, and the MTP head in it."""

    @functools.cache
    def published(name):
        target = target_of(name)
        tensors = reference.weights(Target(target).text_config)
        return target, reference.publish(tmp_path_factory.mktemp("published") / name, target, tensors), tensors

    return published


def passed(target, inputs):
    """What went through the decoder, in a forward over the whole of a text: embeddings, features (L, H), positions (3, L)."""
    with Target(target).recording(positions=True) as record, torch.no_grad():
        target(**inputs)
    positions = record.positions[0] if record.positions else torch.arange(inputs["input_ids"].shape[1])[None]
    return record.embeds[0][0], record.features[0][0], positions.reshape(-1, positions.shape[-1])[-3:].expand(3, -1)


def reader_of(target, tensors, inputs, ids, image_rows="merged", row_positions="feature"):
    """The reference below any part of a text, ids (1, L), that goes on from the prompt `inputs` of one row."""
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, more))
    embeds, features, positions = passed(target, whole)
    view = Target(target)
    if image_rows == "token":
        embeds = view.embedding(ids[0])
    if row_positions == "token":
        positions = torch.cat([positions[:, 1:], positions.amax() + 1 + positions[:, :1] * 0], dim=1)
    shifted = torch.cat([embeds[1:], embeds[:1]])  # the last row is behind all that is asked
    return reference.Reader(
        tensors, view.text_config, view.embedding.weight, view.lm_head.weight, shifted, features, positions
    )


def check_trees(watch, target, tensors, out, rows, **wiring):
    """Every node of every tree has the log-probability that the reference gives it on its own path."""
    num_nodes = 0
    for row, inputs in enumerate(rows):
        prompt, new = inputs["input_ids"], out.sequences.shape[1] - max(each["input_ids"].shape[1] for each in rows)
        ids = torch.cat([prompt, out.sequences[row : row + 1, -new:]], dim=1)
        reader = reader_of(target, tensors, inputs, ids, **wiring)
        length = prompt.shape[1]  # rows that were read: all tokens have a row but the root
        for gain, (roots, tree) in zip(gains(out)[row], watch.trees, strict=False):
            assert roots[row] == int(ids[0, length])
            for node in range(1, tree.num_nodes):
                path = tuple(tree.tokens[row, tree.ancestors[row, node]].tolist()[1:])
                expected = sum(reader.log_probs(length, path[:at])[token] for at, token in enumerate(path))
                torch.testing.assert_close(tree.log_probs[row, node], expected, **TIGHT)
                num_nodes += 1
            length += gain
    return num_nodes


@pytest.fixture
def exact_logits(monkeypatch):
    """The head's logits as they are, where the package makes them float32 as transformers does."""
    monkeypatch.setattr(Target, "logits", lambda self, features: self.lm_head(features))


def drafter_for(name, publish, **settings):
    target, folder, _ = publish(name)
    return dream_hf.load_drafter(folder, target).with_settings(**settings)


# --- arithmetic ---


@every_family
def test_the_full_pass_and_the_cached_one_are_the_reference_s(name, publish):
    target, folder, tensors = publish(name)
    drafter = dream_hf.load_drafter(folder, target)
    assert isinstance(drafter, MTPDrafter) and drafter.dtype == target.dtype
    inputs = family(name).make_inputs(target, text_len=20)
    embeds, features, positions = passed(target, inputs)
    text = Target(target).text_config
    expected = reference.run(tensors, text, embeds, features, positions)[None]
    planes = positions[:, None] if drafter.needs.positions else positions[0, None]
    some, later = len(embeds) - 4, [slice(at, at + 2) for at in (len(embeds) - 4, len(embeds) - 2)]
    with torch.no_grad():
        whole = drafter(embeds[None], features[None], position_ids=planes).last_hidden_state
        state = PairedState(drafter, 1)
        parts = [state.read(embeds[None, :some], features[None, :some], planes[..., :some], [some])]
        parts += [state.read_on(embeds[None, part], features[None, part], [2]) for part in later]
    torch.testing.assert_close(whole, expected, **TIGHT)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **TIGHT)


@pytest.mark.parametrize("wiring", [{}, {"image_rows": "token"}, {"row_positions": "token"}], ids=str)
@every_family
def test_trees_are_the_reference_s_on_each_path(name, wiring, publish, exact_logits):
    target, folder, tensors = publish(name)
    rows = family(name).make_rows(target, 3, text_len=14)
    loaded = dream_hf.load_drafter(folder, target, wiring=wiring)
    watch = Watch(loaded.with_settings(**SMALL))
    out = generate(target, family(name).collate(rows), max_new_tokens=10, assistant_model=watch)
    assert check_trees(watch, target, tensors, out, rows, **wiring) > 100


# --- generate ---


@pytest.mark.parametrize("batch", [1, 3])
@every_family
def test_the_output_is_the_target_s(name, batch, publish):
    target, drafter = target_of(name), drafter_for(name, publish, **WIDE)
    inputs = family(name).make_inputs(target, batch, text_len=20)
    expected = generate(target, inputs, max_new_tokens=40)
    out = generate(target, inputs, max_new_tokens=40, assistant_model=drafter)
    assert_same_tokens(expected, out)
    assert_counts_add_up(out, target.generation_config.pad_token_id)
    assert max(gain for row in gains(out) for gain in row) > 1
    for settings in ({"eos_token_id": stop_tokens(expected.sequences, 40, (5, 11, 17))}, {"repetition_penalty": 1.4}):
        settings |= {"max_new_tokens": 40}
        assert_same_tokens(
            generate(target, inputs, **settings), generate(target, inputs, assistant_model=drafter, **settings)
        )
    runs = seeded_runs(target, inputs, [drafter, drafter])
    assert torch.equal(runs[0].sequences, runs[1].sequences) and gains(runs[0]) == gains(runs[1])


def test_samples_have_the_target_s_distribution():
    config = hf.Qwen3NextConfig(**hybrid_configs.qwen3_next().to_dict() | {"vocab_size": NUM_TOKENS})
    target = _flat_target(config, hf.Qwen3NextForCausalLM)
    drafter = load_mtp("here", config.to_dict(), reference.weights(config), target, None)
    drafter = drafter.with_settings(tree_depth=3, tree_top_k=2, tree_size=6)
    assert min(p_values(target, drafter, num_draws=1024, temperature=1.0)) > LIMIT


@pytest.mark.parametrize("images", [1, [1, 0, 2]], ids=["one", "mixed"])
def test_rows_with_pictures_are_drafted_as_if_alone(images, publish):
    kind, target = family("qwen3_5"), target_of("qwen3_5")
    rows = kind.make_rows(target, 3, images=images, text_len=20)
    together = Watch(drafter_for("qwen3_5", publish, **WIDE))
    out = generate(target, kind.collate(rows), max_new_tokens=24, assistant_model=together)
    for row, inputs in enumerate(rows):
        alone = Watch(drafter_for("qwen3_5", publish, **WIDE))
        single = generate(target, inputs, max_new_tokens=24, assistant_model=alone)
        assert gains(single)[0] == gains(out)[row]
        for (_, ours), (_, theirs) in zip(alone.trees[: len(gains(single)[0]) - 4], together.trees, strict=False):
            assert ours.tokens[0].tolist() == theirs.tokens[row].tolist()


@pytest.mark.parametrize("batch", [1, 3])
@every_family
def test_a_chat_goes_on(name, batch, publish):
    """Two turns, a picture in the first: what was read is not read again, and the second drafts as if all were read at once."""
    target, watch = target_of(name), Watch(drafter_for(name, publish, **WIDE))
    inputs = repeated(family(name).make_inputs(target), batch)
    first = generate(target, inputs, max_new_tokens=20, assistant_model=watch)
    ids = torch.cat([first.sequences, inputs["input_ids"][:, -5:]], dim=1)
    whole = extended(inputs, ids[:, inputs["input_ids"].shape[1] :])
    expected = generate(target, whole, max_new_tokens=20)
    watch.trees.clear()
    cache = {CACHE: cache_of(first)}
    out = generate(target, {"input_ids": ids}, max_new_tokens=20, assistant_model=watch, **cache)
    assert_same_tokens(expected, out)
    anew = Watch(drafter_for(name, publish, **WIDE))
    assert_same_tokens(expected, generate(target, whole, max_new_tokens=20, assistant_model=anew))
    assert torch.equal(watch.trees[0][1].tokens, anew.trees[0][1].tokens)


@pytest.mark.parametrize("prompt", ["embeddings", "in chunks", "one token"])
def test_prompts_of_any_kind(prompt, publish):
    target, drafter = target_of("qwen3_next"), drafter_for("qwen3_next", publish, **WIDE)
    inputs, more = family("qwen3_next").make_inputs(target, 3), {"max_new_tokens": 16}
    if prompt == "embeddings":
        ids = inputs.pop("input_ids")
        inputs = {"inputs_embeds": target.get_input_embeddings()(ids), **inputs}
    elif prompt == "in chunks":
        more["prefill_chunk_size"] = 4
    else:
        inputs = {"input_ids": inputs["input_ids"][:, -1:]}
    assert_same_tokens(generate(target, inputs, **more), generate(target, inputs, assistant_model=drafter, **more))


def test_a_reduced_vocabulary(publish):
    """What is drafted is the likeliest of some tokens; what is written stays the same."""
    target, folder, _ = publish("qwen3_5")
    drafter, inputs, ids = (
        dream_hf.load_drafter(folder, target),
        family("qwen3_5").make_inputs(target),
        [*range(3, 90, 2)],
    )
    whole = dream_hf.draft_log_probs(target, drafter, inputs, 5, [7])
    drafter.set_draft_vocabulary(ids)
    some = dream_hf.draft_log_probs(target, drafter, inputs, 5, [7])
    assert some.isfinite().sum(-1).tolist() == [len(ids)] * 2
    torch.testing.assert_close(some[:, ids], whole[:, ids].log_softmax(-1), rtol=1e-5, atol=1e-5)
    expected = generate(target, inputs, max_new_tokens=16)
    assert_same_tokens(expected, generate(target, inputs, max_new_tokens=16, assistant_model=drafter))
    with pytest.raises(ValueError, match=r"`tree_top_k` \(45\) must not exceed the number of tokens in .* \(44\)"):
        generate(target, inputs, assistant_model=drafter.with_settings(tree_top_k=45))
    drafter.set_draft_vocabulary(None)
    assert torch.equal(dream_hf.draft_log_probs(target, drafter, inputs, 5, [7]), whole)
    with pytest.raises(ValueError, match="tokens lie in"):
        drafter.set_draft_vocabulary([1, 104])


# --- a head that knows ---


FIRST, STOP = TEXT_IDS


def turns(width):
    """Embeddings (V, width) of tokens that stand on a circle, and the matrix that turns each into the next one's."""
    steps = torch.arange(1, width // 2 + 1).double() * 2 * torch.pi / (STOP - FIRST)
    angles = torch.arange(STOP - FIRST)[:, None] * steps
    table = torch.zeros(VOCAB_SIZE, width, dtype=torch.float64)
    table[FIRST:STOP] = torch.cat([angles.cos(), angles.sin()], dim=1)
    cos, sin = steps.cos().diag(), steps.sin().diag()
    return table, torch.cat([torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)])


def counting(name):
    """A target that writes the token after the last one, which nothing but that one decides, and a head's weights."""
    target = family(name).make_target(seed=1)
    table, turn = turns(32)
    for part, parameter in target.get_decoder().named_parameters():
        if part.removesuffix(".weight").split(".")[-1] in ("o_proj", "out_proj", "down_proj"):
            parameter.zero_()
    target.get_decoder().norm.weight.zero_()
    target.get_input_embeddings().weight.copy_(table)
    target.get_output_embeddings().weight.copy_(table @ turn)  # the row of token k is the embedding of k - 1
    tensors = reference.weights(Target(target).text_config)
    for tensor_name, tensor in tensors.items():
        if "norm" in tensor_name or ".o_proj" in tensor_name or "down_proj" in tensor_name:
            tensor.zero_()
    return target, tensors, turn


@pytest.mark.parametrize("half", ["embedding", "feature", "both", "swapped"])
@every_family
def test_a_head_that_knows_is_believed(name, half):
    """The next token follows from the embedding of the last one, and, turned twice, from the feature of the one before."""
    target, tensors, turn = counting(name)
    one, none = torch.eye(32, dtype=torch.float64), torch.zeros(32, 32, dtype=torch.float64)
    halves = {"embedding": (one, none), "feature": (none, turn), "both": (one, turn), "swapped": (turn, none)}[half]
    tensors["mtp.fc.weight"] = torch.cat(halves, dim=1)
    drafter = load_mtp("here", target.config.to_dict(), tensors, target, None).with_settings(
        tree_depth=5, tree_top_k=1
    )
    inputs = family(name).make_inputs(target, 3)
    out = generate(target, inputs, max_new_tokens=31, assistant_model=drafter)
    assert_same_tokens(generate(target, inputs, max_new_tokens=31), out)
    assert len(out.sequences[0, -31:].unique()) == 31
    if half == "swapped":
        assert gains(out) == [[1] * 30] * 3  # one token too far
    else:
        assert gains(out) == [[6] * 5] * 3
