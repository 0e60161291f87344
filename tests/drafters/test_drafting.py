"""The drafter's forms agree, it sees no more than it may, and trees are those of a plain, slow EAGLE-2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from double import TIGHT, doubled, doubles
from families import family
from grown import grow
from lossless import generate, open_gates, oracle, untrained
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from dream_hf import DreamConfig, DreamDrafter
from dream_hf.drafters.dream.modeling import DraftMasks
from dream_hf.drafters.dream.state import DrafterState
from dream_hf.drafters.levels import TargetHead
from dream_hf.targets.target import Target

VOCABULARY, WIDTH = 40, 16

each_attention = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def make_drafter(attention: str = "sdpa", seed: int = 0, **config: Any) -> DreamDrafter:
    """A small drafter whose every part matters."""
    shape = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 4}
    drafter = DreamDrafter(DreamConfig(**shape, num_key_value_heads=2, **config)).eval()
    drafter.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in drafter.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) / module.in_features**0.5)
    return doubled(open_gates(drafter)).requires_grad_(False)


def make_head(seed: int = 0, sharpness: float = 0.7) -> TargetHead:
    generator = torch.Generator().manual_seed(seed)
    table = doubles(VOCABULARY, WIDTH, generator=generator)
    weight = doubles(VOCABULARY, WIDTH, generator=generator) * sharpness
    return TargetHead(embed=lambda ids: table[ids], logits=lambda features: features @ weight.T)


def draw(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings (B, T, H) and features (B, T - 1, H)."""
    generator = torch.Generator().manual_seed(100 + seed)
    return (
        doubles(batch, length, WIDTH, generator=generator),
        doubles(batch, length - 1, WIDTH, generator=generator),
    )


def full_pass(drafter: DreamDrafter, embeds: Tensor, features: Tensor, **kwargs: Any) -> Tensor:
    return drafter(embeds, features, **kwargs).last_hidden_state


# --- one drafter, many forms ---


@each_attention
@pytest.mark.parametrize("cuts", [[1], [5], [3, 4, 9], list(range(1, 12))], ids=str)
def test_a_cache_changes_nothing(attention, cuts):
    drafter = make_drafter(attention)
    embeds, features = draw(2, 12)
    whole = full_pass(drafter, embeds, features)
    cache = DynamicCache()
    parts, start = [], 0
    for end in [*cuts, 12]:
        piece = features[:, max(start - 1, 0) : end - 1]
        parts.append(full_pass(drafter, embeds[:, start:end], piece, past_key_values=cache))
        start = end
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **TIGHT)


@each_attention
def test_left_padding_changes_nothing(attention):
    drafter = make_drafter(attention)
    embeds, features = draw(1, 9)
    junk, _ = draw(1, 5, seed=7)
    padded = torch.cat([junk, embeds], dim=1)
    # The feature before a row's first token is padding as well.
    padded_features = torch.cat([junk, features], dim=1)
    mask = torch.tensor([[0] * 5 + [1] * 9])
    out = full_pass(drafter, padded, padded_features, attention_mask=mask)[:, 5:]
    torch.testing.assert_close(out, full_pass(drafter, embeds, features), **TIGHT)


def read_in_steps(state: DrafterState, texts: list[tuple[Tensor, Tensor]], steps: list[list[int]]) -> None:
    """Let the rows read their texts (embeddings (T, H), features (T - 1, H)), so many tokens of each at a time."""
    taken = [0] * len(texts)
    for number, counts in enumerate(steps):
        width = max(counts)
        embeds, features = doubles(len(texts), width, WIDTH), doubles(len(texts), width - (number == 0), WIDTH)
        positions = torch.zeros(len(texts), width, dtype=torch.long)
        for row, count in enumerate(counts):
            start = taken[row]
            embeds[row, :count] = texts[row][0][start : start + count]
            first, last = max(start - 1, 0), start + count - 1
            features[row, : last - first] = texts[row][1][first:last]
            positions[row] = torch.arange(start, start + width)
            taken[row] += count
        state.read(embeds, features, positions, counts)


STEPS = [[6, 4, 5], [1, 3, 2], [5, 1, 4], [2, 2, 1]]  # tokens each row gains; what is left of the width is rubbish
LENGTHS = [sum(row) for row in zip(*STEPS, strict=True)]


def make_state(
    drafter: DreamDrafter, seed: int = 0, steps: list[list[int]] | None = None
) -> tuple[DrafterState, list]:
    """A state of three rows of different lengths, and their texts."""
    steps = STEPS if steps is None else steps
    lengths = [sum(row) for row in zip(*steps, strict=True)]
    texts = [tuple(part[0] for part in draw(1, length, seed + row)) for row, length in enumerate(lengths)]
    state = DrafterState(drafter, len(texts))
    read_in_steps(state, texts, steps)
    return state, texts


@each_attention
@pytest.mark.parametrize("num_steps", range(1, len(STEPS) + 1))
def test_ragged_rows_read_as_alone(attention, num_steps):
    drafter = make_drafter(attention)
    state, texts = make_state(drafter, steps=STEPS[:num_steps])
    for row, (embeds, features) in enumerate(texts):
        alone = full_pass(drafter, embeds[None], features[None])[0, -1]
        torch.testing.assert_close(state.root_features[row, 0], alone, **TIGHT)
        assert int(state.root_positions[row]) == len(embeds) - 1


def test_resting_rows_read_nothing():
    drafter = make_drafter()
    state, _ = make_state(drafter)
    read_in_steps_before = state.tokens.lengths
    state.read(doubles(3, 2, WIDTH), doubles(3, 2, WIDTH), torch.full((3, 2), 20), [2, 0, 1])
    assert state.tokens.lengths == [length + n for length, n in zip(read_in_steps_before, (2, 0, 1), strict=True)]
    assert state.features.lengths == [length - 1 for length in state.tokens.lengths]


# --- trees ---


def expand(drafter, head, text, path, own_features) -> tuple[Tensor, Tensor]:
    """After the path's tokens below the root: own feature (H,) and log-probabilities (V,), by a pass over everything."""
    embeds, features = text
    if path:
        embeds = torch.cat([embeds, head.embed(torch.tensor(path))])
        features = torch.cat([features, torch.stack(own_features)])
    feature = full_pass(drafter, embeds[None], features[None])[0, -1]
    return feature, head.logits(feature).log_softmax(-1)


def slow_tree(drafter, head, text, depth: int, top_k: int, size: int) -> dict[tuple[int, ...], float]:
    """EAGLE-2's dynamic tree of one row in plain Python: paths below the root and their cumulative log-probabilities."""
    beams: list[tuple[tuple[int, ...], float, list[Tensor]]] = [((), 0.0, [])]
    candidates: dict[tuple[int, ...], float] = {}
    for _ in range(depth):
        level = []
        for path, score, own_features in beams:
            feature, log_probs = expand(drafter, head, text, list(path), own_features)
            for token in sorted(range(VOCABULARY), key=lambda token: -float(log_probs[token]))[:top_k]:
                child = (*path, token)
                candidates[child] = score + float(log_probs[token])
                level.append((child, candidates[child], [*own_features, feature]))
        beams = sorted(level, key=lambda beam: -beam[1])[:top_k]
    best = sorted(candidates, key=lambda path: -candidates[path])[:size]
    return {path: candidates[path] for path in best}


def paths_of(tree, row: int) -> list[tuple[int, ...]]:
    """Token paths of a row's nodes, root left out."""
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, len(tokens)):
        assert parents[node] < node
        paths.append((*paths[parents[node]], tokens[node]))
    return paths[1:]


@each_attention
@pytest.mark.parametrize("shape", [(4, 3, 12), (3, 2, 60), (5, 1, 5), (1, 6, 4), (6, 4, 32)], ids=str)
def test_trees_are_eagle_2_s(attention, shape):
    depth, top_k, size = shape
    drafter = make_drafter(attention, tree_depth=depth, tree_top_k=top_k, tree_size=size)
    state, texts = make_state(drafter)
    head = make_head()
    tree = grow(state, head, torch.tensor([[1], [2], [3]]), drafter.config)
    assert tree.tokens[:, 0].tolist() == [1, 2, 3]
    assert tree.num_nodes - 1 == min(size, top_k + (depth - 1) * top_k**2)
    for row, text in enumerate(texts):
        got = paths_of(tree, row)
        assert len(set(got)) == len(got)
        assert set(got) == set(slow_tree(drafter, head, text, *shape))


@each_attention
def test_growing_leaves_the_state_as_it_was(attention):
    """Drafting twice, and reading on after it, gives what no drafting gives."""
    drafter = make_drafter(attention)
    head, roots = make_head(), torch.tensor([[1], [2], [3]])
    state, _ = make_state(drafter)
    first = grow(state, head, roots, drafter.config)
    again = grow(state, head, roots, drafter.config)
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.parents, again.parents)
    untouched, _ = make_state(drafter)
    more, more_features = doubles(3, 2, WIDTH), doubles(3, 2, WIDTH)
    for each in (state, untouched):
        positions = torch.tensor(each.tokens.lengths)[:, None] + torch.arange(2)
        each.read(more, more_features, positions, [2, 1, 2])
    torch.testing.assert_close(state.root_features, untouched.root_features, **TIGHT)


def test_a_kept_node_s_parent_is_kept():
    """Also where a child is certain, so that its score ties with its parent's."""
    drafter = make_drafter(tree_depth=6, tree_top_k=4, tree_size=3)
    state, _ = make_state(drafter)
    for sharpness in (0.1, 3.0, 300.0):
        head = make_head(sharpness=sharpness)
        tree = grow(state, head, torch.tensor([[1], [2], [3]]), drafter.config)
        depths = tree.depths
        assert torch.equal(depths.gather(1, tree.parents)[:, 1:] + 1, depths[:, 1:])
        for row in range(3):
            assert len(set(paths_of(tree, row))) == 3


# --- who sees what ---


@each_attention
def test_a_position_sees_features_below_it_and_tokens_up_to_it(attention):
    drafter = make_drafter(attention)
    embeds, features = draw(1, 10)
    before = full_pass(drafter, embeds, features)
    for index in range(9):
        changed = features.clone()
        changed[:, index] += torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))
        difference = (full_pass(drafter, embeds, changed) - before).abs().amax(-1)[0]
        assert (difference[: index + 1] == 0).all() and (difference[index + 1 :] > 1e-6).all()
    for index in range(10):
        changed = embeds.clone()
        changed[:, index] += torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))
        difference = (full_pass(drafter, changed, features) - before).abs().amax(-1)[0]
        assert (difference[:index] == 0).all() and (difference[index:] > 1e-6).all()


class Replay:
    """The calls that growing a tree made of the drafter, to be made again with a beam changed."""

    def __init__(self, monkeypatch, drafter: DreamDrafter, head: TargetHead):
        self.calls: list[tuple] = []
        self.results: list[Tensor] = []
        self.state, _ = make_state(drafter)
        original = DrafterState.beams

        def beams(state, *arguments):
            hidden = original(state, *arguments)
            self.calls.append(tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments))
            self.results.append(hidden)
            return hidden

        with monkeypatch.context() as patch:
            patch.setattr(DrafterState, "beams", beams)
            grow(self.state, head, torch.tensor([[1], [2], [3]]), drafter.config)

    def __call__(self, level: int, beam: int, noise: float = 1.0) -> list[Tensor]:
        """Every level's features with one beam's embedding, and so its own feature, changed."""
        results: list[Tensor] = []
        for number, (original, features, *rest) in enumerate(self.calls, start=1):
            embeds = original.clone()
            if number == level:
                embeds[:, beam] += noise
            given = features
            if results:
                parents = self.parents(number)[..., None].expand(-1, -1, WIDTH)
                given = results[-1].gather(1, parents)
            results.append(self.state.beams(embeds, given, *rest))
        self.state.forget_beams()
        return results

    def parents(self, level: int) -> Tensor:
        """Which beam of the level above each beam (B, k) sees."""
        _, _, sees, _ = self.calls[level - 1]
        top_k = sees.shape[1]
        above = self.state.tokens.tensor(sees.device)[:, None] + (level - 2) * top_k + torch.arange(top_k)
        is_parent = (sees == 0).gather(2, above[:, None].expand(-1, top_k, -1))
        assert (is_parent.sum(-1) == 1).all()
        return is_parent.int().argmax(-1)


@each_attention
def test_beams_see_their_ancestors_and_nothing_else(monkeypatch, attention):
    """Change any beam: only itself and those below it change, by tokens and by features, in no other row or branch."""
    top_k = 3
    drafter = make_drafter(attention, tree_depth=5, tree_top_k=top_k)
    # A flat head, so that several beams live on.
    head = make_head(sharpness=0.05)
    replay = Replay(monkeypatch, drafter, head)
    assert all(torch.equal(one, two) for one, two in zip(replay(0, 0), replay.results, strict=True))
    parents = beam_parents(replay, head, top_k)
    num_spared = 0
    for level in range(1, 5):
        for beam in range(top_k):
            changed = replay(level, beam)
            for row in range(3):
                touched = {beam}
                for later in range(level, 5):
                    if later > level:
                        touched = {b for b in range(top_k) if parents[later][row][b] in touched}
                    differences = (changed[later - 1][row] - replay.results[later - 1][row]).abs().amax(-1)
                    for b in range(top_k):
                        assert (differences[b] > 1e-6) == (b in touched), (level, beam, row, later, b)
                        num_spared += b not in touched
    assert num_spared > 50


def beam_parents(replay: Replay, head: TargetHead, top_k: int) -> dict[int, list[list[int]]]:
    """Which beam of the level above each beam continues, found by scoring all continuations anew, row by row."""
    parents: dict[int, list[list[int]]] = {}
    scores = head.logits(replay.state.root_features).log_softmax(-1)[:, 0].topk(top_k).values  # (B, k)
    for level, hidden in enumerate(replay.results, start=1):
        children, ancestors = [], []
        for row in range(hidden.shape[0]):
            log_probs = head.logits(hidden[row]).log_softmax(-1)
            options = []
            for beam in range(top_k):
                best = log_probs[beam].topk(top_k).values.tolist()
                options += [(float(scores[row, beam]) + value, beam) for value in best]
            options.sort(key=lambda option: -option[0])
            children.append([score for score, _ in options[:top_k]])
            ancestors.append([beam for _, beam in options[:top_k]])
        scores = torch.tensor(children)
        parents[level + 1] = ancestors
    return parents


@each_attention
def test_given_masks_are_obeyed(attention):
    drafter = make_drafter(attention)
    embeds, features = draw(1, 6)
    tokens = torch.eye(6, dtype=torch.bool)[None]
    seen = torch.zeros(1, 6, 5, dtype=torch.bool)
    seen[0, 3, 1] = True
    before = full_pass(drafter, embeds, features, attention_mask=DraftMasks(tokens, seen))
    changed = features.clone()
    changed[:, 1] *= -1.5
    differs = (full_pass(drafter, embeds, changed, attention_mask=DraftMasks(tokens, seen)) - before).abs().amax(
        -1
    ) > 0
    assert differs.tolist() == [[False, False, False, True, False, False]]


# --- in generation ---


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        ("llava_clip_llama", None),
        ("llava_clip_llama", 1.5),
        ("gemma3", None),
        ("qwen2_vl", None),
        ("gemma4_shared", None),
    ],
)
def test_the_drafter_reads_the_accepted_text(monkeypatch, name, batch, guidance):
    """Embeddings, features and positions it is given are those of one pass of the target over the final text."""
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, batch)
    settings = {"max_new_tokens": 24} | ({"guidance_scale": guidance} if guidance else {})
    expected = generate(target, inputs, output_hidden_states=True, **settings)
    read: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(batch)]
    original = DrafterState.read

    def spy(state, embeds, features, positions, counts):
        if state.tokens.longest:  # the prompt is read under compression, tested elsewhere
            for row, count in enumerate(counts):
                read[row].append((embeds[row, :count], features[row, :count], positions[row, :count]))
        original(state, embeds, features, positions, counts)

    monkeypatch.setattr(DrafterState, "read", spy)
    drafter, _ = oracle(target, inputs, expected.sequences, visual_keep_ratio=0.5)
    out = generate(target, inputs, assistant_model=drafter, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    for row in range(batch):
        embeds, features, positions = (torch.cat(parts) for parts in zip(*read[row], strict=True))
        num_read = len(embeds)
        assert num_read > 12
        tokens = out.sequences[row, inputs["input_ids"].shape[1] + 1 :][:num_read]
        torch.testing.assert_close(embeds, target.get_input_embeddings()(tokens[None])[0])
        # The feature read with a token is the one that produced it: the root's comes with the first accepted token.
        wanted = torch.stack([expected.hidden_states[step][-1][row, -1] for step in range(1, num_read + 1)])
        torch.testing.assert_close(features, wanted, **TIGHT)
        num_real = int(inputs["attention_mask"][row].sum())
        assert positions.tolist() == list(range(num_real + 1, num_real + 1 + num_read))


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava_clip_llama", "gemma3", "qwen2_vl"])
def test_the_drafter_s_prompt_keeps_what_receives_most_attention(monkeypatch, name, attention, ratio):
    target = family(name).make_target(attn_implementation=attention)
    eager = family(name).make_target(attn_implementation="eager")
    inputs = family(name).make_inputs(target, 3, images=[1, 0, 2])
    outputs = eager(**inputs, output_attentions=True, output_hidden_states=True)
    is_real = inputs["attention_mask"].bool()
    received = (outputs.attentions[-1] * is_real[:, None, :, None]).sum((1, 2))
    is_visual = Target(target).is_visual(inputs["input_ids"])
    calls = []
    original = DrafterState.read
    monkeypatch.setattr(DrafterState, "read", lambda *args: (calls.append(args[1:]), original(*args))[1])
    generate(target, inputs, assistant_model=untrained(target, visual_keep_ratio=ratio), max_new_tokens=2)
    _, features, positions, counts = calls[0]
    for row in range(3):
        visual = (is_visual & is_real)[row].nonzero().flatten()
        best = sorted(visual.tolist(), key=lambda slot: -float(received[row, slot]))[: -int(-len(visual) * ratio // 1)]
        kept = sorted(set((is_real & ~is_visual)[row].nonzero().flatten().tolist()) | set(best))
        assert counts[row] == len(kept) + 1
        offset = int((~is_real[row]).sum())
        assert positions[row, : len(kept)].tolist() == [slot - offset for slot in kept]
        assert int(positions[row, len(kept)]) == int(is_real[row].sum())
        wanted = outputs.hidden_states[-1][row, kept]
        torch.testing.assert_close(features[row, : len(kept)], wanted, **TIGHT)
