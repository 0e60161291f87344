"""Features made for training: the selector against all attention maps, parity with decoding, rollouts against drafting."""

import math

import pytest
import torch
from answered import Answered, answer
from double import TIGHT
from families import FAMILIES, family
from grown import grow

from dream_hf.drafters.dream.drafter import DreamDrafter
from dream_hf.drafters.dream.state import DrafterState
from dream_hf.drafters.levels import TargetHead
from dream_hf.drafters.visibility import bias_of
from dream_hf.targets.target import Target
from dream_hf.training.objective import Objective
from dream_hf.training.rollout import StepCache, roll_out, sample_starts
from dream_hf.training.target_features import FeatureExtractor, LayerSelection, last_prompts, predictions

LENGTHS = [7, 4, 9]
SELECTED = ["llava_clip_llama", "gemma3", "qwen2_5_vl", "paligemma2", "llava_pixtral_mistral", "llama"]


def make_drafter(target, seed=0, **config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drafter = DreamDrafter.for_target(target, **config)
        for parameter in drafter.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))  # gates open, norms apart
    return drafter


def extract(target, text: Answered, selection=None, keep_ratio=1.0, importance="attention"):
    extractor = FeatureExtractor(Target(target), selection or LayerSelection("none"), keep_ratio, importance)
    made = extractor.run(text.inputs, text.answer_mask)
    return made, extractor.drafter_batch(text.inputs, text.answer_mask, made)


def test_what_tokens_are_is_asked_once(monkeypatch):
    made = family("llava_clip_llama").make_target()
    text, asked, is_visual = answer(family("llava_clip_llama"), made, [5]), [], Target.is_visual
    monkeypatch.setattr(Target, "is_visual", lambda self, ids: asked.append(ids) or is_visual(self, ids))
    extractor = FeatureExtractor(Target(made), LayerSelection("none"), 0.5)
    batch = extractor.drafter_batch(text.inputs, text.answer_mask)
    assert len(asked) == 1
    moved = batch.to(torch.device("meta"))
    for one, other in ((batch, moved), (batch.text, moved.text)):
        tensors = {name: value for name, value in vars(one).items() if isinstance(value, torch.Tensor)}
        assert len(tensors) >= 2 and all(getattr(other, name).is_meta for name in tensors)
        assert all(getattr(other, name).shape == value.shape for name, value in tensors.items())


# -- the selected layer -----------------------------------------------------------------------------------------------


def reference_selection(target, text: Answered, layers, mode):
    """The selected features from all attention maps and all hidden states, position by position, in float64."""
    config = target.config.get_text_config()
    implementation = config._attn_implementation
    target.set_attn_implementation("eager")
    inputs = Target(target).mark_answers(text.inputs, text.answer_mask)
    with torch.no_grad():
        out = target(**inputs, output_attentions=True, output_hidden_states=True, use_cache=False)
    target.set_attn_implementation(implementation)
    picked, chosen = [], []
    for row, mask in enumerate(text.answer_mask):
        places = [place for place in range(len(mask) - 1) if mask[place + 1]]
        entropies = {}
        for layer in layers:
            maps = out.attentions[layer - 1][row].double()  # (heads, T, T)
            entropies[layer] = [
                sum(-sum(p * p.log() for p in maps[head, place] if p > 0) for head in range(len(maps))) / len(maps)
                for place in places
            ]
        for index, place in enumerate(places):
            score = {
                layer: float(values[index] if mode == "token" else sum(values) / len(values))
                for layer, values in entropies.items()
            }
            best = min(score, key=score.get)
            chosen.append(best)
            picked.append(out.hidden_states[best][row, place])
    return torch.stack(picked), chosen


@pytest.mark.parametrize("mode", ["token", "sample"])
@pytest.mark.parametrize("name", SELECTED)
def test_selected_feature_equals_reference_from_all_maps(name, mode):
    target = family(name).make_target(attn_implementation="sdpa")
    text = answer(family(name), target, LENGTHS)
    layers = tuple(range(1, len(Target(target).decoder.layers)))  # all but the last: more to choose from
    made, _ = extract(target, text, LayerSelection(mode, layers))
    expected, chosen = reference_selection(target, text, layers, mode)
    assert made.mid.shape == expected.shape == (sum(LENGTHS), expected.shape[1])
    torch.testing.assert_close(made.mid, expected, **TIGHT)
    if mode == "token" and name != "paligemma2":
        assert len(set(chosen)) > 1  # there was a choice


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_static_layer_is_that_layers_output(layer):
    target = family("llava_clip_llama").make_target()
    text = answer(family("llava_clip_llama"), target, LENGTHS)
    made, _ = extract(target, text, LayerSelection("static", (layer,)))
    outputs = []
    hook = Target(target).decoder.layers[layer - 1].register_forward_hook(lambda _, __, out: outputs.append(out))
    with torch.no_grad():
        target(**text.inputs)
    hook.remove()
    hidden = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    torch.testing.assert_close(made.mid, hidden[:, :-1][text.answer_mask[:, 1:]], **TIGHT)


def test_candidates_are_those_of_the_published_code():
    assert LayerSelection.make("token", 32).layers == tuple(range(1, 12))
    assert LayerSelection.make("token", 3).layers == (1,)
    assert LayerSelection.make("static", 32, static_layer_depth=0.25).layers == (8,)
    assert LayerSelection.make("none", 32).layers == ()
    with pytest.raises(ValueError, match=r"static_layer_index.*40.*32 layers"):
        LayerSelection.make("static", 32, static_layer_index=40)


def test_hooks_are_gone_after_a_run():
    target = family("llava_clip_llama").make_target()
    text = answer(family("llava_clip_llama"), target, [3])

    def num_hooks():  # transformers has some of its own
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in target.modules())

    before = num_hooks()
    extract(target, text, LayerSelection("token", (1, 2)), keep_ratio=0.5)
    assert num_hooks() == before


# -- the same inputs as in decoding -----------------------------------------------------------------------------------


def decoding_inputs(target, drafter, prompt, length, monkeypatch):
    """Everything the drafter reads while `generate()` writes `length` tokens: embeddings, features, positions."""
    embeds, features, positions = [], [], []
    read = DrafterState.read

    def spy(self, new_embeds, new_features, new_positions, counts):
        embeds.append(new_embeds[0, : counts[0]])
        features.append(new_features[0, : counts[0] - (new_embeds.shape[1] - new_features.shape[1])])
        positions.append(new_positions[0, : counts[0]])
        read(self, new_embeds, new_features, new_positions, counts)

    with monkeypatch.context() as patch:
        patch.setattr(DrafterState, "read", spy)
        ids = target.generate(**prompt, assistant_model=drafter, max_new_tokens=length, do_sample=False)
    return ids, torch.cat(embeds), torch.cat(features), torch.cat(positions)


BY_NOVELTY = ["llava_clip_llama", "gemma3", "qwen2_5_vl", "idefics3", "llava_pixtral_mistral"]


@pytest.mark.parametrize(
    ("name", "importance", "ratio"),
    [(candidate.name, "attention", 0.5) for candidate in FAMILIES]
    + [(name, "novelty", 0.5) for name in BY_NOVELTY]
    + [(name, *how) for name in BY_NOVELTY[:3] for how in (("uniform", 0.05), ("pool", 0.3), ("pool", 0.0))],
)
def test_training_reads_what_decoding_reads(name, importance, ratio, monkeypatch):
    """Invariant 6: the same tokens kept, embeddings, features and positions, for padded rows and a part of the picture."""
    member = family(name)
    target = member.make_target()
    kept = {"visual_keep_ratio": ratio, "visual_importance": importance}
    drafter = make_drafter(target, **kept, tree_depth=2, tree_top_k=2, tree_size=4)
    lengths = [5, 3]
    text = answer(member, target, lengths)
    _, batch = extract(target, text, keep_ratio=ratio, importance=importance)
    for row, (prompt, length) in enumerate(zip(text.prompts, lengths, strict=True)):
        ids, embeds, features, positions = decoding_inputs(target, drafter, prompt, length, monkeypatch)
        assert ids[0, -length:].tolist() == text.answers[row].tolist()
        count = int(batch.text.counts[row])
        assert len(features) < len(embeds) <= count  # the last tokens are never read
        assert batch.text.positions[row, : len(positions)].tolist() == positions.tolist()
        torch.testing.assert_close(batch.text.embeds[row, : len(embeds)], embeds, **TIGHT)
        torch.testing.assert_close(batch.text.features[row, : len(features)], features, **TIGHT)
        num_visual = int(Target(target).is_visual(prompt["input_ids"]).sum())
        num_kept = math.ceil(num_visual * ratio - 1e-6)
        assert count == prompt["input_ids"].shape[1] + length - num_visual + num_kept


def test_predictions_are_followed_by_an_answer_token():
    answers = torch.tensor([[0, 0, 1, 1, 0, 1, 0]]).bool()
    visual = torch.tensor([[0, 1, 0, 0, 0, 0, 0]]).bool()
    assert predictions(answers, torch.zeros_like(visual)).int().tolist() == [[0, 1, 1, 0, 1, 0, 0]]
    assert predictions(answers, visual).int().tolist() == [[0, 0, 1, 0, 1, 0, 0]]
    real = torch.tensor([[1, 1, 1, 1, 1, 1, 0]]).bool()
    assert last_prompts(answers, real).int().tolist() == [[1, 1, 1, 1, 1, 0, 0]]
    assert last_prompts(torch.zeros_like(answers), real).int().tolist() == real.int().tolist()


# -- rollouts ---------------------------------------------------------------------------------------------------------


def drafted_chain(drafter, batch, row, base, num_steps):
    """Final features of a chain that decoding drafts below column `base`, its tokens those of the text."""
    text = batch.text
    state = DrafterState(drafter, 1)
    with torch.no_grad():
        state.read(
            text.embeds[row : row + 1, : base + 1],
            text.features[row : row + 1, :base],
            text.positions[row : row + 1, : base + 1],
            [base + 1],
        )
        hidden, features = [state.root_features[0, 0]], state.root_features
        for level in range(1, num_steps):
            sees = torch.ones(1, 1, base + 1 + level, dtype=torch.bool)  # a chain: all beams so far are ancestors
            features = state.beams(
                text.embeds[row, None, base + level, None], features, bias_of(sees, features.dtype), level
            )
            hidden.append(features[0, 0])
    return torch.stack(hidden)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llava_clip_llama", {}),
        ("qwen2_5_vl", {}),
        ("gemma3", {"block_types": ["initial", "cross", "cross", "final"]}),
    ],
)
def test_rollout_equals_drafting_a_chain(name, config):
    target = family(name).make_target()
    drafter = make_drafter(target, **config)
    text = answer(family(name), target, LENGTHS)
    _, batch = extract(target, text, keep_ratio=0.5)
    rows, columns = batch.predicts.nonzero(as_tuple=True)
    with torch.no_grad():
        steps = list(roll_out(drafter, batch, batch.text.features, 4))
    assert [len(step.predictions) for step in steps] == [sum(max(n - s, 0) for n in LENGTHS) for s in range(4)]
    compared = 0
    for base in range(0, len(rows), 2):
        row, column = int(rows[base]), int(columns[base])
        chain = drafted_chain(drafter, batch, row, column, 4) if column + 4 < batch.text.counts[row] else None
        for step in steps:
            at = (step.predictions == base + step.index).nonzero().flatten()
            is_same_row = base + step.index < len(rows) and rows[base + step.index] == row
            assert len(at) == int(is_same_row)
            if chain is not None and is_same_row:
                torch.testing.assert_close(step.hidden[at[0]], chain[step.index], **TIGHT)
                compared += 1
    assert compared > 10


def test_rollout_stops_at_the_end_of_an_answer():
    """Two answers, one token apart: no chain leads from one into the other."""
    target = family("llama").make_target()
    text = answer(family("llama"), target, [8])
    mask = text.answer_mask.clone()
    mask[0, -4] = False  # answers of 4 and 3 tokens
    extractor = FeatureExtractor(Target(target), LayerSelection("none"), 1.0)
    batch = extractor.drafter_batch(text.inputs, mask)
    with torch.no_grad():
        steps = list(roll_out(make_drafter(target), batch, batch.text.features, 4))
    assert [step.predictions.tolist() for step in steps] == [[0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 5, 6], [2, 3, 6], [3]]


def test_a_share_of_the_chains_says_what_all_of_them_say():
    target = family("llama").make_target()
    text = answer(family("llama"), target, [9, 6])
    _, batch = extract(target, text)
    drafter = make_drafter(target)
    starts = sample_starts(batch.predicts, 0.4, torch.Generator().manual_seed(0))
    assert 0 < starts.sum() < batch.predicts.sum()
    with torch.no_grad():
        every = list(roll_out(drafter, batch, batch.text.features, 4))
        some = list(roll_out(drafter, batch, batch.text.features, 4, starts))
    assert torch.equal(some[0].predictions, every[0].predictions)
    bases = starts[batch.predicts].nonzero().flatten()
    for whole, part in zip(every[1:], some[1:], strict=True):
        known = whole.predictions.tolist()
        assert part.predictions.tolist() == [
            base + part.index for base in bases.tolist() if base + part.index in known
        ]
        at = [known.index(prediction) for prediction in part.predictions.tolist()]
        torch.testing.assert_close(part.hidden, whole.hidden[at], **TIGHT)


@pytest.mark.parametrize("share", [0.1, 0.35, 1.0])
def test_every_position_is_as_likely_a_start(share):
    predicts = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0]]).bool()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([sample_starts(predicts, share, generator) for _ in range(4000)])
    assert not drawn[:, ~predicts].any()
    counts = drawn.sum(-1)
    wanted = share * predicts.sum(-1)
    assert ((counts - wanted).abs() < 1 + 1e-5).all()  # evenly spaced
    frequency = drawn.float().mean(0)[predicts]
    assert (frequency - share).abs().max() < 5 * (share * (1 - share) / 4000) ** 0.5 + 1e-6


def test_the_loss_of_a_share_is_that_of_all_on_average():
    target = family("llama").make_target()
    text = answer(family("llama"), target, [9, 6])
    _, batch = extract(target, text)
    drafter, view = make_drafter(target), Target(target)
    options = {"rollout_steps": 4, "mid_feature_loss_weight": 0.0}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        whole = Objective(**options)(drafter, batch, batch.text.features, view.logits)
        some = Objective(**options, rollout_share=0.3)
        drawn = [some(drafter, batch, batch.text.features, view.logits, generator).total for _ in range(300)]
        assert some(drafter, batch, batch.text.features, view.logits).total == whole.total  # all, when evaluated
    drawn = torch.stack(drawn)
    assert len(set(drawn.tolist())) > 10
    assert abs(drawn.mean() - whole.total) < 4 * drawn.std() / 300**0.5
    assert drawn.std() / 300**0.5 < 0.01 * whole.total  # the comparison means something


def test_gradient_flows_through_fed_back_features():
    target = family("llama").make_target()
    drafter = make_drafter(target)
    text = answer(family("llama"), target, [6])
    _, batch = extract(target, text)
    features = batch.text.features.clone().requires_grad_()
    *_, last = roll_out(drafter, batch, features, 3)
    first_base = int(batch.predicts[0].nonzero()[0])
    (gradient,) = torch.autograd.grad(last.hidden[0].sum(), features)
    assert gradient[0, :first_base].abs().sum() > 0  # through the verified features and what was drafted on them
    assert gradient[0, first_base:].abs().sum() == 0  # never through a feature the chain could not have had


@pytest.mark.parametrize("num_steps", [1, 3])
def test_gradient_checkpointing_changes_nothing(num_steps):
    target = family("llama").make_target()
    text = answer(family("llama"), target, LENGTHS)
    gradients = []
    for checkpointing in (False, True):
        drafter = make_drafter(target).train()
        if checkpointing:
            drafter.gradient_checkpointing_enable({"use_reentrant": False})
            assert all(layer.gradient_checkpointing for layer in drafter.layers)
        _, batch = extract(target, text)
        sum(step.hidden.square().sum() for step in roll_out(drafter, batch, batch.text.features, num_steps)).backward()
        gradients.append({name: value.grad for name, value in drafter.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **TIGHT, msg=name)


def test_step_cache_takes_the_same_update_twice():
    first = StepCache()
    keys = torch.randn(1, 2, 3, 4)
    for _ in range(2):
        assert first.update(keys, keys, 0)[0].shape[2] == 3
    second = first.next_step()
    assert second.get_seq_length(0) == 3 and second.update(keys, keys, 0)[0].shape[2] == 6


def test_trees_draft_from_training_inputs():
    """The first guess of a tree below a base is the training pass's likeliest token there."""
    target = family("llava_clip_llama").make_target()
    view = Target(target)
    drafter = make_drafter(target)
    text = answer(family("llava_clip_llama"), target, [5])
    _, batch = extract(target, text, keep_ratio=0.5)
    with torch.no_grad():
        (step,) = roll_out(drafter, batch, batch.text.features)
        base = int(batch.predicts[0].nonzero()[1])
        state = DrafterState(drafter, 1)
        state.read(
            batch.text.embeds[:, : base + 1],
            batch.text.features[:, :base],
            batch.text.positions[:, : base + 1],
            [base + 1],
        )
        drafter.config.tree_top_k = drafter.config.tree_depth = 1
        tree = grow(state, TargetHead(view.embed, view.logits), batch.token_ids[:, base : base + 1], drafter.config)
    assert int(tree.tokens[0, 1]) == int(view.logits(step.hidden[1]).argmax())
